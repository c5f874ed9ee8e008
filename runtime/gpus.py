"""On which GPUs the ranks of an engine run, and how much memory is left there for the state of sequences."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.errors import CapacityError, EngineryError, TargetError
from ..engines.sizes import format_bytes
from ..engines.targets import Target
from .capacity import StateShape
from .config import EngineConfig
from .files import EngineFiles

# What the driver takes beside what is asked of it: for kernels, and for the graphs of decoding steps.
_DRIVER_BYTES = 512 << 20
# The null device writes down every token of its state, in the host's memory.
_NULL_SEQUENCES = 4


@dataclass(frozen=True)
class Gpu:
    """Where a rank will run.

    arch      compute capability, 90 is 9.0
    number    among the GPUs that the driver shows; ranks of one number share a GPU
    executor  "cuda", or "cuda-null"
    """

    name: str
    arch: int
    free_bytes: int
    total_bytes: int
    number: int = 0
    executor: str = "cuda"


def null_gpus(target: Target, num_ranks: int = 1) -> list[Gpu]:
    """The null device, which no model is too large for: it checks plans of `target`, and computes nothing."""
    return [Gpu("null device", target.arch, 1 << 50, 1 << 50, rank, "cuda-null") for rank in range(num_ranks)]


def find_gpus(files: EngineFiles, target: Target, config: EngineConfig) -> list[Gpu]:
    """The GPU of each rank. Raises TargetError where there are too few, or one that does not run `target`."""
    from ._core import cuda_gpu, cuda_gpu_count

    manifest = files.manifest
    remedy = f"Run it on a machine with {_known_as(target)}, or build one for this machine: build-engine "
    remedy += f"{manifest.model.source} --precision {manifest.precision} --target "
    try:
        numbers = _numbers(files, config, cuda_gpu_count())
        found = {number: cuda_gpu(number) for number in dict.fromkeys(numbers)}
    except TargetError as error:
        remedy = remedy.replace("--precision fp8", "--precision int8")  # no CPU has fp8
        raise TargetError(f"{files.directory} was built for {target.name}. {error}\n{remedy}cpu -o DIR") from None
    for gpu in found.values():
        if not runs_on(target.arch, gpu["arch"]):
            raise TargetError(
                f"{files.directory} was built for {target.name}; this machine's {gpu['name']} has compute capability "
                f"{gpu['arch'] // 10}.{gpu['arch'] % 10}.\n{remedy}cuda-sm{gpu['arch']} -o DIR"
            )
    facts = ("name", "arch", "free_bytes", "total_bytes")
    return [Gpu(**{fact: found[number][fact] for fact in facts}, number=number) for number in numbers]


def _numbers(files: EngineFiles, config: EngineConfig, shown: int) -> tuple[int, ...]:
    """Of each rank the GPU: as asked for, else rank r's is r."""
    num_ranks = files.manifest.tensor_parallel_size
    shared = ",".join("0" * num_ranks)
    if config.gpus is None and num_ranks > shown:
        raise TargetError(
            f"It has {num_ranks} ranks (--tensor-parallel-size), each for a GPU of its own; the NVIDIA driver shows "
            f"{shown}. Ranks may share one, more slowly: --gpus {shared}"
        )
    if config.gpus is not None and len(config.gpus) != num_ranks:
        raise EngineryError(
            f"gpus names {len(config.gpus)}; {files.directory} has {num_ranks} ranks, and each needs one: --gpus "
            f"{','.join(map(str, range(num_ranks)))}. Ranks may share one: --gpus {shared}"
        )
    return config.gpus or tuple(range(num_ranks))


def runs_on(built: int, found: int) -> bool:
    """Machine code for 8.x runs on every later 8.x; from 9.0 on it is made for one architecture alone."""
    return built == found or (built // 10 == found // 10 == 8 and built <= found)


def _known_as(target: Target) -> str:
    return f"compute capability {target.arch // 10}.{target.arch % 10} ({', '.join(target.gpus)})"


def choose_gpu_blocks(
    shape: StateShape, max_model_len: int, target: Target, config: EngineConfig, gpus: list[Gpu], beside: list[int]
) -> list[int]:
    """Blocks of each state group, the same on every rank. Raises CapacityError where not one sequence fits.

    shape   of one rank
    gpus    of each rank
    beside  bytes of all else of each rank
    """
    needed = shape.sequence_bytes(max_model_len)
    rooms = []
    for gpu in dict.fromkeys(gpus):
        sharing = gpus.count(gpu)
        others = sum(size for size, each in zip(beside, gpus, strict=True) if each == gpu)
        is_null = gpu.executor == "cuda-null" and config.kv_cache_bytes is None
        rooms.append(_NULL_SEQUENCES * needed if is_null else _room(gpu, sharing, others, len(gpus), config))
        if rooms[-1] < needed:
            raise _too_small(gpu, others, sharing * max(rooms[-1], 0), sharing * needed, shape, max_model_len, config)
    return shape.largest(min(rooms), config.sequences(target), max_model_len)


def _room(gpu: Gpu, sharing: int, beside: int, num_ranks: int, config: EngineConfig) -> int:
    """Bytes for the state of one of the ranks that share this GPU."""
    if config.kv_cache_bytes is None:
        taken = gpu.total_bytes - gpu.free_bytes
        return (int(gpu.total_bytes * config.gpu_share) - taken - beside - _DRIVER_BYTES) // sharing
    budget = config.kv_cache_bytes // num_ranks
    if sharing * budget + beside > gpu.free_bytes:
        raise CapacityError(
            f"The KV cache is to have {format_bytes(sharing * budget)}, weights and activations take "
            f"{format_bytes(beside)}; {format_bytes(gpu.free_bytes)} of {gpu.name} are free. Give less with "
            f"--kv-cache-memory-bytes."
        )
    return budget


def _too_small(
    gpu: Gpu, beside: int, room: int, needed: int, shape: StateShape, max_model_len: int, config: EngineConfig
) -> CapacityError:
    longest = shape.longest_sequence(room * shape.sequence_bytes(max_model_len) // needed, max_model_len)
    shorter = f", or run it with --max-model-len {longest} or less" if longest else ""
    return CapacityError(
        f"{gpu.name} has {format_bytes(gpu.total_bytes)}, of which others hold "
        f"{format_bytes(gpu.total_bytes - gpu.free_bytes)}; weights and activations take {format_bytes(beside)}. That "
        f"leaves {format_bytes(room)} for the KV cache; one sequence of {max_model_len} tokens needs "
        f"{format_bytes(needed)}. Give it a larger --gpu-memory-utilization (now {config.gpu_share}) or a smaller "
        f"--max-num-batched-tokens{shorter}."
    )
