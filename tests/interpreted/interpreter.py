"""Triton kernels run by Triton's interpreter on NumPy arrays: what a kernel computes, without a GPU.

The interpreter of Triton 3.6 gets bfloat16 wrong: products and sums of raw bits, conversions that cut off. `repair`
mends that. It does not see races, limits of shared memory, or the reduced precision of sm_90's fp8 accumulation.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from enginery.plugins.launches import Kernel
from numpy.typing import NDArray
from triton._C.libtriton import ir as _ir
from triton.runtime import interpreter

from .traces import Declared, Trace

_TYPES = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8e4nv",
    np.dtype(np.int8): "i8",
    np.dtype(np.uint8): "u8",
    np.dtype(np.int32): "i32",
    np.dtype(np.int64): "i64",
}


_FLOATS: dict[Any, Any] = {
    tl.float32: np.dtype(np.float32),
    tl.float16: np.dtype(np.float16),
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
}
# What the interpreter holds as bits.
_RAW: dict[Any, Any] = {tl.bfloat16: np.dtype(np.uint16), tl.float8e4nv: np.dtype(np.uint8)}


class Pointer:
    """A NumPy array as the interpreter wants its tensors; `type` as Triton spells it."""

    def __init__(self, array: NDArray[Any], offset: int = 0) -> None:
        assert array.flags.c_contiguous
        self.array, self.dtype, self._offset = array, _TYPES[array.dtype], offset

    def data_ptr(self) -> int:
        """The address of its first element, after `offset` bytes."""
        return self.array.ctypes.data + self._offset


def launch(
    kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, NDArray[Any] | Pointer | int | float | None]
) -> Trace:
    """Runs every program of the grid, one after the other. Arguments are changed in place."""
    given = {}
    for name, kind in kernel.parameters:
        value = arguments[name]
        if isinstance(value, np.ndarray):
            value = Pointer(value)
        assert not isinstance(value, Pointer) or kind == f"*{value.dtype}", f"{name}: {value.dtype} given for {kind}"
        given[name] = value
    unknown = set(arguments) - set(given)
    assert not unknown, f"{kernel.name} has no parameters {unknown}"
    return run_kernel(kernel, grid, given, {})


def run_kernel(
    kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, Any], declared: Mapping[str, Declared]
) -> Trace:
    """Runs every program of the grid and tells what it has touched; arguments are what the interpreter takes.

    declared: what may be touched, where it is less than the array that is given.
    """
    module = importlib.import_module(f"enginery.plugins.{kernel.plugin}.triton")
    # Ranks run one after the other: none waits for another.
    constants = {name: False if name == "WAIT" else value for name, value in kernel.constants}
    assert constants.get("PDL", False) == kernel.pdl, f"{kernel.name} waits for its predecessor, or not"
    pointers = {name: item for name, item in arguments.items() if hasattr(item, "data_ptr")}
    trace = Trace(kernel.name, kernel.pdl, pointers, declared)
    return run_function(getattr(module, kernel.function), grid, {**arguments, **constants}, trace)


def run_function(function: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], trace: Trace) -> Trace:
    """A Triton function, with the pointers of the trace in place of those of the arguments. Returns the trace."""
    _running.trace = trace
    try:
        function[grid](**{**arguments, **trace.arguments})
        trace.end()
    finally:
        _running.trace = None
    return trace


class _Running:
    """The launch that is being run, if any."""

    trace: Trace | None = None


_running = _Running()


def follow() -> None:
    """Makes the interpreter tell the trace of a launch what its programs do."""
    builder = interpreter.InterpreterBuilder
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    set_grid_idx = builder.set_grid_idx

    def seen(kind: str, pointers: Any, mask: Any, ordered: bool = False) -> Any:
        if _running.trace is None:
            return pointers
        addresses = _running.trace.access(kind, pointers.data, mask.data, ordered)
        return interpreter.TensorHandle(addresses, pointers.dtype)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, seen("loads", pointers, mask), mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, seen("stores", pointers, mask), value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        ordered = sem == _ir.MEM_SEMANTIC.ACQUIRE_RELEASE
        return atomic(self, operation, seen("counts", pointers, mask, ordered), value, mask, sem, scope)

    def begin_program(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, x, y, z)
        if _running.trace is not None:
            _running.trace.begin_program(x, y, z)

    def create_barrier(self: Any) -> None:
        if _running.trace is not None:
            _running.trace.barrier()

    def create_inline_asm(self: Any, text: str, constraints: str, values: Any, *rest: Any) -> Any:
        assert text.startswith("prefetch.global.L2 "), f"the interpreter knows no {text!r}"
        if _running.trace is not None:
            _running.trace.prefetch(values[0].data, 128)
        found = interpreter.TensorHandle(np.zeros(values[0].data.shape, np.int32), tl.int32)
        return SimpleNamespace(get_result=lambda index: found)

    def wait() -> None:
        if _running.trace is not None:
            _running.trace.wait()

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_atomic_rmw, builder.create_barrier = create_atomic_rmw, create_barrier
    builder.set_grid_idx, builder.create_inline_asm = begin_program, create_inline_asm
    # As kernels import it: the attribute of the package is another module object.
    cuda: Any = importlib.import_module("triton.language.extra.cuda")
    cuda.gdc_wait, cuda.gdc_launch_dependents = wait, lambda: None


def repair() -> None:
    """Makes the interpreter's bfloat16 and fp8 what a GPU's are, and lets it take NumPy arrays."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "conftest.py sets it before Triton is imported"
    builder = interpreter.InterpreterBuilder
    plain_binary, plain_cast, patch_tensor = builder.binary_op, builder.cast_impl, interpreter._patch_lang_tensor
    plain_integer = builder.create_si_to_fp

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return plain_binary(self, left, right, operation)
        result = operation(_widen(left), _widen(right))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(_round(result), tl.bfloat16)

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        converted = _convert(source, wanted)
        return plain_cast(self, source, wanted) if converted is None else converted

    def create_fp_to_fp(self: Any, source: Any, wanted: Any, rounding: Any) -> Any:
        converted = _convert(source, wanted)
        assert converted is not None, f"no kernel converts {source.dtype} to {wanted}"
        return converted

    def create_si_to_fp(self: Any, source: Any, wanted: Any) -> Any:
        if wanted.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_round(source.data), tl.bfloat16)
        return plain_integer(self, source, wanted)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(_exact(a), _exact(b)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # NumPy 2.4 wants scalars

    builder.binary_op, builder.cast_impl, builder.create_dot = binary_op, cast_impl, create_dot
    builder.create_fp_to_fp, builder.create_si_to_fp = create_fp_to_fp, create_si_to_fp
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, source, wanted: self.cast_impl(source, wanted))
    interpreter._patch_lang_tensor = patch_lang_tensor
    # For each call of a function the interpreter looks through the whole language: once for each module is enough in a
    # launch, and takes a quarter of the time off.
    patched: set[str] = set()

    def call(self: Any, *positional: Any, **named: Any) -> Any:
        module = self.fn.__module__
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*positional, **named)

    def begin_launch(self: Any, positional: Any, named: Any) -> tuple[list[Any], dict[str, Any]]:
        patched.clear()
        return list(positional), dict(named)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor._init_args_hst = begin_launch
    interpreter.GridExecutor._restore_args_dev = lambda self, *arguments: None


def _convert(handle: Any, wanted: Any) -> Any:
    """A float tensor in another float type, rounded to nearest even; None for other types."""
    source, kind = _FLOATS.get(handle.dtype.scalar), _FLOATS.get(wanted.scalar)
    if source is None or kind is None:
        return None
    values = np.ascontiguousarray(handle.data)
    if values.dtype != source:
        values = values.view(source)
    converted = values.astype(kind)
    return interpreter.TensorHandle(converted.view(_RAW.get(wanted.scalar, kind)), wanted.scalar)


def _widen(handle: Any) -> NDArray[np.float32]:
    data = np.ascontiguousarray(handle.data)
    return data.view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def _round(values: NDArray[Any]) -> NDArray[np.uint16]:
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def _exact(handle: Any) -> NDArray[Any]:
    """Values as they are multiplied: products and their sums in float64, which holds them in whatever order. NumPy's
    order depends on where in a matrix a row stands, and a GPU's does not.
    """
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return _widen(handle).astype(np.float64)
    if kind.is_fp8():
        return np.ascontiguousarray(handle.data).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return handle.data.astype(np.float64)
