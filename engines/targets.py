"""Targets: what an engine can be built for."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import TargetError


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    name      as the manifest spells it: "cpu-avx512-vnni", "cuda-sm90"
    isa       of a CPU target, as the runtime's kernel tables are called: "avx512-vnni"
    features  CPUID features that the machine must have, as `cpu_features()` of the runtime names them
    block_size  tokens in a block of state
    unsigned_activations  int8 kernels multiply unsigned activations by signed weights (VNNI)
    arch      of a CUDA target, its compute capability: 90 is 9.0; 0 for a CPU
    gpus      what such machines are called
    shared_bytes  shared memory that a block of threads can have
    num_sms   multiprocessors of its largest GPU, which decide how work is split
    """

    name: str
    isa: str = ""
    features: tuple[str, ...] = ()
    block_size: int = 32
    unsigned_activations: bool = False
    arch: int = 0
    gpus: tuple[str, ...] = ()
    shared_bytes: int = 0
    num_sms: int = 0

    @property
    def is_cuda(self) -> bool:
        """True for an NVIDIA GPU, False for a CPU."""
        return self.arch > 0


def _cuda(arch: int, shared_kib: int, num_sms: int, *gpus: str) -> Target:
    return Target(f"cuda-sm{arch}", block_size=64, arch=arch, gpus=gpus, shared_bytes=shared_kib << 10, num_sms=num_sms)


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")

# Of the CPU's, best last: `cpu` takes the last one that a machine can run.
TARGETS: dict[str, Target] = {
    "cpu-avx2": Target("cpu-avx2", "avx2", _AVX2),
    "cpu-avx2-vnni": Target("cpu-avx2-vnni", "avx2-vnni", (*_AVX2, "avxvnni"), unsigned_activations=True),
    "cpu-avx512": Target("cpu-avx512", "avx512", _AVX512),
    "cpu-avx512-vnni": Target("cpu-avx512-vnni", "avx512-vnni", (*_AVX512, "avx512vnni"), unsigned_activations=True),
    "cuda-sm80": _cuda(80, 163, 108, "a100"),
    "cuda-sm86": _cuda(86, 99, 84, "a10"),
    "cuda-sm89": _cuda(89, 99, 142, "l4", "l40s"),
    "cuda-sm90": _cuda(90, 227, 132, "h100", "h200"),
    "cuda-sm100": _cuda(100, 227, 148, "b200"),
    "cuda-sm120": _cuda(120, 99, 170, "rtx5090"),
}


def missing_features(target: Target, features: list[str]) -> list[str]:
    """The features that `target` needs and a machine with `features` lacks."""
    return [feature for feature in target.features if feature not in features]


def best_target(features: list[str]) -> Target:
    """The best CPU target for a machine with `features`. Raises TargetError where none fits."""
    fitting = [t for t in TARGETS.values() if not t.is_cuda and not missing_features(t, features)]
    if not fitting:
        lacking = ", ".join(missing_features(TARGETS["cpu-avx2"], features))
        raise TargetError(
            f"target cpu: this machine has none of the CPU targets' instruction sets; cpu-avx2, the least, needs "
            f"{lacking}. Name the target of the machine that will serve, e.g. --target cpu-avx2."
        )
    return fitting[-1]


def find_target(name: str, features: list[str] | None = None) -> Target:
    """The target called `name`, or as its GPUs are; "cpu" means the best for a machine with `features`.

    Raises TargetError.
    """
    if name == "cpu":
        return best_target(host_features() if features is None else features)
    for target in TARGETS.values():
        if name == target.name or name in target.gpus:
            return target
    raise TargetError(f"target {name!r} is not known. Known are: {', '.join(target_names())}.")


def target_names() -> list[str]:
    """Everything that `--target` takes."""
    return ["cpu", *TARGETS, *(gpu for target in TARGETS.values() for gpu in target.gpus)]


# What /proc/cpuinfo calls the features that targets name.
_CPUINFO_NAMES = {"avx_vnni": "avxvnni", "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16"}


def host_features() -> list[str]:
    """The CPU features of this machine, read from /proc/cpuinfo, under the names that targets use."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return []
    return [_CPUINFO_NAMES.get(flag, flag) for flag in flags]
