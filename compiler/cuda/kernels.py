"""The kernels of an engine: from the user's cache, or compiled in parallel and kept there.

An entry of the cache is named by everything that decides its content: the plugins' sources, the version of Triton, the
kernel's constants and the architecture. It is written beside and renamed, and one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgpack

from ...engines.errors import CompileError
from ...engines.plan import KernelImage
from ...engines.targets import Target
from ...plugins.launches import Kernel
from .worker import compile_kernel, prepare_process

_PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's description for the plan, and its machine code."""

    image: KernelImage
    cubin: bytes


def compile_kernels(
    kernels: Sequence[Kernel],
    target: Target,
    num_processes: int,
    progress: Progress = lambda done, total: None,
) -> dict[str, CompiledKernel]:
    """Machine code of every kernel by name. `progress` is told how many of those that had to be compiled are done.

    Raises CompileError where Triton is missing or refuses a kernel.
    """
    directory, compiled, missing = cache_directory(), {}, []
    for kernel in dict.fromkeys(kernels):
        found = _read(directory / cache_key(kernel, target.arch))
        if found is None:
            missing.append(kernel)
        else:
            compiled[kernel.name] = found
    if not missing:
        return compiled
    require_triton()
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(num_processes, len(missing)))
    with (
        tempfile.TemporaryDirectory(prefix="enginery-triton-") as scratch,
        ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_process, initargs=(scratch,)) as pool,
    ):
        futures = {pool.submit(compile_kernel, each, target.arch, file_name(each, target)): each for each in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                kernel = futures[future]
                compiled[kernel.name] = CompiledKernel(*_result(future.result, kernel, target))
                _write(directory / cache_key(kernel, target.arch), compiled[kernel.name])
                progress(done, len(missing))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return compiled


def file_name(kernel: Kernel, target: Target) -> str:
    """What the kernel's cubin is called in an engine."""
    return f"{kernel.name}.sm{target.arch}.cubin"


def require_triton() -> None:
    """Raises CompileError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise CompileError('CUDA targets need Triton to compile kernels: pip install "enginery[cuda]"')


def cache_directory() -> Path:
    """Where compiled kernels are kept: under $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "enginery" / "kernels"


def cache_key(kernel: Kernel, arch: int) -> str:
    """Names the entry of `kernel` for `arch`: a hash of all that decides its machine code."""
    document = {"kernel": asdict(kernel), "arch": arch, "sources": _sources(), "triton": _triton_version()}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted([*_PLUGINS.glob("*/triton*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _result(result: Callable[[], Any], kernel: Kernel, target: Target) -> Any:
    try:
        return result()
    except CompileError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise CompileError(
            f"kernel {kernel.name} could not be compiled for {target.name}: {reason[-2000:]}\n"
            f"Constants: {dict(kernel.constants)}. This is a mistake of ours: please report it."
        ) from None


def _read(path: Path) -> CompiledKernel | None:
    try:
        data = path.read_bytes()
        digest, entry = data[:32], data[32:]
        if hashlib.sha256(entry).digest() != digest:
            return None
        document = msgpack.unpackb(entry)
        image = document["image"]
        return CompiledKernel(KernelImage(**image | {"parameters": tuple(image["parameters"])}), document["cubin"])
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException):
        return None


def _write(path: Path, kernel: CompiledKernel) -> None:
    """Without a cache everything works, only slower: a directory that cannot be written is no error."""
    entry = msgpack.packb({"image": asdict(kernel.image), "cubin": kernel.cubin})
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(hashlib.sha256(entry).digest() + entry)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
