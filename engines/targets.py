"""Targets: what an engine can be built for."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import TargetError


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    name      as the manifest spells it: "cpu-avx512-vnni"
    isa       of a CPU target, as the runtime's kernel tables are called: "avx512-vnni"
    features  CPUID features that the machine must have, as `cpu_features()` of the runtime names them
    block_size  tokens in a block of state
    unsigned_activations  int8 kernels multiply unsigned activations by signed weights (VNNI)
    """

    name: str
    isa: str
    features: tuple[str, ...]
    block_size: int = 32
    unsigned_activations: bool = False


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")

# Best last: `cpu` takes the last one that a machine can run.
TARGETS: dict[str, Target] = {
    "cpu-avx2": Target("cpu-avx2", "avx2", _AVX2),
    "cpu-avx2-vnni": Target("cpu-avx2-vnni", "avx2-vnni", (*_AVX2, "avxvnni"), unsigned_activations=True),
    "cpu-avx512": Target("cpu-avx512", "avx512", _AVX512),
    "cpu-avx512-vnni": Target("cpu-avx512-vnni", "avx512-vnni", (*_AVX512, "avx512vnni"), unsigned_activations=True),
}


def missing_features(target: Target, features: list[str]) -> list[str]:
    """The features that `target` needs and a machine with `features` lacks."""
    return [feature for feature in target.features if feature not in features]


def best_target(features: list[str]) -> Target:
    """The best CPU target for a machine with `features`. Raises TargetError where none fits."""
    fitting = [target for target in TARGETS.values() if not missing_features(target, features)]
    if not fitting:
        lacking = ", ".join(missing_features(TARGETS["cpu-avx2"], features))
        raise TargetError(
            f"target cpu: this machine has none of the CPU targets' instruction sets; cpu-avx2, the least, needs "
            f"{lacking}. Name the target of the machine that will serve, e.g. --target cpu-avx2."
        )
    return fitting[-1]


def find_target(name: str, features: list[str] | None = None) -> Target:
    """The target called `name`; "cpu" means the best for a machine with `features`. Raises TargetError."""
    if name == "cpu":
        return best_target(host_features() if features is None else features)
    if name not in TARGETS:
        known = ", ".join(["cpu", *TARGETS])
        raise TargetError(f"target {name!r} is not known. Known are: {known}.")
    return TARGETS[name]


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
