"""The CUDA driver from Python: machine code loaded as the runtime loads it, launched on torch's stream and context.

Triton's own launcher would compile the kernels anew, specialised for the numbers of each call; engines hold these.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, Union, byref, c_char, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from functools import cache
from typing import Any

_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ORDINARY_SHARED_BYTES = 48 << 10
_PDL = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class LaunchAttributeValue(Union):
    """CUlaunchAttributeValue."""

    _fields_ = (("bytes", c_char * 64), ("alignment", c_ulonglong), ("pdl_allowed", c_int))


class LaunchAttribute(Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("padding", c_char * 4), ("value", LaunchAttributeValue))


class LaunchConfig(Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("num_attributes", c_uint),
    )


class Function:
    """A kernel on the GPU of the calling thread's context. cubin: its machine code, of which it is the only kernel."""

    def __init__(self, cubin: bytes, symbol: str, num_warps: int, shared_bytes: int, pdl: bool) -> None:
        self._module, self._function = c_void_p(), c_void_p()
        self._num_warps, self._shared_bytes = num_warps, shared_bytes
        self._attribute = LaunchAttribute(_PDL)
        self._attribute.value.pdl_allowed = 1
        self._num_attributes = int(pdl)
        _check("cuModuleLoadData", byref(self._module), cubin)
        _check("cuModuleGetFunction", byref(self._function), self._module, symbol.encode())
        if shared_bytes > _ORDINARY_SHARED_BYTES:
            _check("cuFuncSetAttribute", self._function, c_int(_SHARED_BYTES), c_int(shared_bytes))

    def bind(self, grid: tuple[int, int, int], arguments: Sequence[Any]) -> Call:
        """A launch with arguments of ctypes; what they point to must live as long as it does."""
        config = LaunchConfig(*grid, 32 * self._num_warps, 1, 1, self._shared_bytes)
        config.attributes, config.num_attributes = ctypes.pointer(self._attribute), self._num_attributes
        return Call(self, self._function, config, arguments)


class Call:
    """A launch that can be made again and again."""

    def __init__(self, owner: Function, function: c_void_p, config: LaunchConfig, arguments: Sequence[Any]) -> None:
        self._owner, self._function, self._config, self._arguments = owner, function, config, list(arguments)
        self._pointers = (c_void_p * max(len(self._arguments), 1))(*(ctypes.addressof(item) for item in arguments))

    def __call__(self, stream: int) -> None:
        """Launches on this stream."""
        self._config.stream = stream
        _check("cuLaunchKernelEx", byref(self._config), self._function, self._pointers, None)


def make_current() -> None:
    """The first GPU's primary context, which is torch's and the runtime's too."""
    device, context = c_int(), c_void_p()
    _check("cuInit", c_uint(0))
    _check("cuDeviceGet", byref(device), c_int(0))
    _check("cuDevicePrimaryCtxRetain", byref(context), device)
    _check("cuCtxSetCurrent", context)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(name: str, *arguments: Any) -> None:
    result = getattr(_library(), name)(*arguments)
    if result:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(c_int(result), byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'error %d' % result).decode()}")


def count_parameters(function: Function) -> int:
    """What the driver says of the kernel: parameters, the two hidden ones included."""
    count, offset, size = 0, c_size_t(), c_size_t()
    # Asking for one too many is an error.
    while _library().cuFuncGetParamInfo(function._function, c_size_t(count), byref(offset), byref(size)) == 0:
        count += 1
    return count
