"""Building an engine: checkpoint, graph, passes, lowering, then the files of the engine, manifest.json last.

Everything is written into a directory beside the output and renamed at the end, so nothing that looks like an engine is
left by a build that was interrupted.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..engines.errors import CompileError
from ..engines.manifest import MANIFEST, FileEntry, Manifest, Model, encode_manifest, hash_file
from ..engines.plan import Plan
from ..engines.plan_format import encode_plan
from ..engines.precisions import KV_CACHE_DTYPES, Precision, find_kv_cache_dtype, find_precision
from ..engines.targets import Target, find_target
from ..plugins.launches import Kernel
from .calibration.file import Calibration, read_calibration
from .checkpoint.source import Source, find_checkpoint
from .checkpoint.tensors import Checkpoint, open_checkpoint
from .cuda.choice import Choice, compile_chosen
from .cuda.kernels import CompiledKernel
from .documents import DOCUMENTS, check_documents
from .graph.builder import GraphBuilder
from .lower.cpu import lower
from .lower.tensors import TensorJobs
from .memory_plan import MemoryPlan, plan_memory
from .models import build_graph, read_config
from .models.config import Config
from .output_directory import directory_beside, disk_full, publish, require_space, require_vacant
from .passes import run_passes
from .passes.layer_precision import parse_layers
from .passes.options import Options
from .passes.shard import check_divisible
from .write import weights_layout, write_weights

# Precisions that a calibration makes better.
CALIBRATED = ("int8", "int4")


@dataclass(frozen=True)
class BuildRequest:
    """What `build-engine` was asked for. max_model_len, group_size: 0 means the model's own, the precision's."""

    model: str
    output: Path | None
    target: str = "cpu"
    precision: str = "int8"
    kv_cache_dtype: str = "auto"
    max_model_len: int = 0
    tensor_parallel_size: int = 1
    save_graph: Path | None = None
    force: bool = False
    num_threads: int = 2
    batch_invariant: bool = False
    group_size: int = 0
    zero_points: bool = False
    calibration: Path | None = None
    layer_precisions: tuple[str, ...] = ()

    def find_precision(self, target: Target) -> Precision:
        """As `engines.precisions` has it, for what was asked for."""
        some_int4 = any(text.endswith("=int4") for text in self.layer_precisions)
        return find_precision(self.precision, target, self.group_size, self.zero_points, some_int4)


@dataclass(frozen=True)
class Lowered:
    """One rank before its weights are read and its kernels compiled."""

    plan: Plan
    jobs: TensorJobs
    choice: Choice = field(default_factory=Choice)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those that the plan names."""
        return tuple(first for first, *_ in self.choice.ways)


@dataclass(frozen=True)
class Prepared:
    """A build as far as it goes without reading a weight."""

    request: BuildRequest
    source: Source
    config: Config
    target: Target
    kv_cache_dtype: str
    max_model_len: int
    num_parameters: int
    ranks: list[Lowered]
    calibration: Calibration | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(weights_layout(rank.jobs).size for rank in self.ranks)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: what `build` tells its progress of, in the end."""
        return sum(job.tensor.num_bytes for rank in self.ranks for job in rank.jobs.jobs.values())

    @property
    def batch_invariant(self) -> bool:
        """Whether results do not depend on what else is in a step: on a CPU always, on a GPU if that was asked for."""
        return self.request.batch_invariant or not self.target.is_cuda

    def memory(self, num_threads: int) -> MemoryPlan:
        """What the engine will need."""
        plans = [rank.plan for rank in self.ranks]
        return plan_memory(plans, self.weights_bytes, num_threads, self.target.is_cuda, self.max_model_len)


def check_request(request: BuildRequest) -> None:
    """Raises what `prepare` and `build` would, but for weights, for a request that a calibration will be added to."""
    assert request.output is not None
    with prepare(request):
        _require_calibrated(request.find_precision(find_target(request.target)))
        with _place_of(request.output, request.force):
            pass


def _require_apart(save_graph: Path | None, output: Path | None) -> None:
    """The engine's directory is made at the end, and holds the engine alone."""
    if save_graph is None or output is None:
        return
    graph, engine = Path(os.path.abspath(save_graph)), Path(os.path.abspath(output))
    if graph == engine or engine in graph.parents:
        raise CompileError(
            f"--save-graph {save_graph}: lies within the engine, {output}. Choose a directory beside it."
        )


def _require_calibrated(precision: Precision) -> None:
    if precision.name not in CALIBRATED:
        raise CompileError(
            f"a calibration is of no use to {precision.name}, only to {' and '.join(CALIBRATED)}. Leave it out."
        )


@contextmanager
def prepare(request: BuildRequest) -> Iterator[Prepared]:
    """Reads what is small, checks everything that can be checked without weights, and lowers every rank.

    Raises CheckpointError, CompileError or TargetError with all that is wrong.
    """
    target = find_target(request.target)
    precision = request.find_precision(target)
    layers = parse_layers(request.layer_precisions, precision, target)
    kv_cache_dtype = find_kv_cache_dtype(request.kv_cache_dtype, precision, target)
    _require_apart(request.save_graph, request.output)
    source = find_checkpoint(request.model)
    config = read_config(source.directory)
    max_model_len = _max_model_len(request, config)
    check_divisible(config, request.tensor_parallel_size)
    check_documents(source)
    if request.calibration is not None:
        _require_calibrated(precision)
    with open_checkpoint(source.directory) as checkpoint:
        calibration = read_calibration(request.calibration, checkpoint) if request.calibration is not None else None
        num_parameters = sum(_num_elements(tensor.shape) for tensor in checkpoint.tensors.values())
        ranks = []
        for rank in range(request.tensor_parallel_size):
            options = Options(
                target,
                precision,
                KV_CACHE_DTYPES[kv_cache_dtype],
                rank,
                request.tensor_parallel_size,
                request.batch_invariant,
                calibration,
                layers,
            )
            ranks.append(_lower_rank(checkpoint, config, options, request.save_graph))
        yield Prepared(
            request, source, config, target, kv_cache_dtype, max_model_len, num_parameters, ranks, calibration
        )


def _lower_rank(checkpoint: Checkpoint, config: Config, options: Options, save_graph: Path | None) -> Lowered:
    stages = 0

    def observe(name: str, g: GraphBuilder) -> None:
        nonlocal stages
        if save_graph is not None:
            from .graph.save import save_stage

            try:
                save_stage(g, save_graph, f"rank{options.rank}.{stages:02}.{name}")
            except OSError as error:
                raise CompileError(
                    f"--save-graph {save_graph}: cannot be written: {error}. Choose another directory."
                ) from None
        stages += 1

    g = build_graph(config, checkpoint)
    run_passes(g, options, observe)
    if options.target.is_cuda:
        from .lower.cuda import lower_to_cuda

        return Lowered(*lower_to_cuda(g, config, options))
    return Lowered(*lower(g, config, options))


def build(
    prepared: Prepared,
    progress: Callable[[int], None] = lambda count: None,
    compiled: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the engine and returns its directory.

    progress  is told of bytes of weights as they are written
    compiled  is told how many of the kernels that had to be compiled are
    """
    request = prepared.request
    assert request.output is not None
    output = _spelled_out(request.output)
    with _place_of(output, request.force, prepared.weights_bytes) as partial:
        _write_files(prepared, partial, progress, compiled)
        publish(partial, output, request.force)
    return output


@contextmanager
def _place_of(output: Path, force: bool, needed: int = 0) -> Iterator[Path]:
    """A directory beside `output` for an engine with `needed` bytes of weights. Raises CompileError."""
    output = _spelled_out(output)
    try:
        require_vacant(output, force)
        with directory_beside(output) as partial:
            require_space(partial, needed)
            yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompileError(disk_full(output, needed)) from None
        raise CompileError(f"{output}: cannot be written: {error}. Choose another directory.") from None


def _spelled_out(output: Path) -> Path:
    """So that it has a name and a parent, however it was written."""
    return Path(os.path.abspath(output)) if output.name == "" or ".." in output.parts else output


def _write_files(
    prepared: Prepared, directory: Path, progress: Callable[[int], None], told: Callable[[int, int], None]
) -> None:
    files: dict[str, FileEntry] = {}
    for name, role in DOCUMENTS.items():
        if (origin := prepared.source.directory / name).is_file():
            shutil.copyfile(origin, directory / name)
            files[name] = hash_file(directory / name, role, Path(name).suffix[1:])
    compiled = _compile_kernels(prepared, told)
    for kernel in compiled.values():
        (directory / kernel.image.file).write_bytes(kernel.cubin)
        files[kernel.image.file] = hash_file(directory / kernel.image.file, "kernels", "cubin")
    for rank, lowered in enumerate(prepared.ranks):
        name = f"plan.rank{rank}.msgpack"
        (directory / name).write_bytes(encode_plan(lowered.choice.settle(lowered.plan, compiled)))
        files[name] = hash_file(directory / name, "plan", "msgpack", rank)
        name = f"weights.rank{rank}.safetensors"
        threads = prepared.request.num_threads
        files[name] = write_weights(directory / name, lowered.jobs, rank, threads, progress, prepared.calibration)
    partial = directory / f"{MANIFEST}.partial"
    partial.write_bytes(encode_manifest(_manifest(prepared, files)))
    os.rename(partial, directory / MANIFEST)


def _compile_kernels(prepared: Prepared, told: Callable[[int, int], None]) -> dict[str, CompiledKernel]:
    ways = [way for rank in prepared.ranks for way in rank.choice.ways]
    return compile_chosen(ways, prepared.target, prepared.request.num_threads, told)


def _manifest(prepared: Prepared, files: dict[str, FileEntry]) -> Manifest:
    request, config = prepared.request, prepared.config
    memory = prepared.memory(num_threads=1)
    return Manifest(
        model=Model(
            architecture=config.model_type,
            source=Path(request.model).name if Path(request.model).is_dir() else request.model,
            revision=prepared.source.revision,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
            num_parameters=prepared.num_parameters,
        ),
        target=prepared.target.name,
        precision=request.precision,
        kv_cache_dtype=prepared.kv_cache_dtype,
        default_max_model_len=prepared.max_model_len,
        tensor_parallel_size=request.tensor_parallel_size,
        batch_invariant=prepared.batch_invariant,
        calibration=prepared.calibration.sha256 if prepared.calibration is not None else "",
        layer_precisions=request.layer_precisions,
        memory={
            "weights": memory.weights,
            "activations": memory.activations,
            "state_per_token": memory.state_bytes_per_token,
        },
        files=files,
    )


def _max_model_len(request: BuildRequest, config: Config) -> int:
    if not 0 <= request.max_model_len <= config.max_model_len:
        raise CompileError(
            f"--max-model-len {request.max_model_len}: {request.model} is made for {config.max_model_len} tokens."
        )
    return request.max_model_len or config.max_model_len


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
