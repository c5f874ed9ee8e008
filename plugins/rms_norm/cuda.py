"""rms_norm's kernel for a GPU: one program for a row."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.errors import CompileError
from ...engines.layouts import GPU_PADDING, round_up
from ..launches import Constant, Kernel, Launch

_LARGEST_HIDDEN = 32768  # a row must fit in the registers of one program
_ELEMENTS_PER_THREAD = 16
_OUT_TYPES = {"bf16": "*bf16", "fp8": "*fp8e4nv", "i8": "*i8"}


@dataclass(frozen=True)
class RmsNorm:
    """What an rms_norm reads and writes. out: bf16, fp8 or i8; domain: tokens or rows."""

    hidden: int
    eps: float
    out: str
    delta: bool = False
    post_weight: bool = False
    weight: bool = True
    sum: bool = False
    domain: str = "tokens"


def launches(norm: RmsNorm, *, architecture: int) -> tuple[Launch, ...]:
    """architecture: 80, 90 … Raises CompileError where a row is too long."""
    if norm.hidden > _LARGEST_HIDDEN:
        # What has no weight is an activation that is quantized: of more GPUs each has a part of it.
        remedy = "Build it for a CPU" if norm.weight else "Build it with --precision bf16, or for more GPUs"
        raise CompileError(
            f"rms_norm has no GPU kernel for rows of {norm.hidden} elements, only to {_LARGEST_HIDDEN}. {remedy}."
        )
    stride = round_up(norm.hidden, GPU_PADDING)
    block = 1 << (stride - 1).bit_length()
    types = {
        "x": "*bf16",
        "delta": "*bf16",
        "post_weight": "*fp32",
        "weight": "*fp32",
        "sum": "*bf16",
        "out": _OUT_TYPES[norm.out],
        "out_scale": "*fp32",
    }
    absent = {name for name in ("delta", "post_weight", "weight", "sum") if not getattr(norm, name)}
    if norm.out == "bf16":
        absent.add("out_scale")
    constants: dict[str, Constant] = {name: None for name in types if name in absent}
    constants |= {"HIDDEN": norm.hidden, "STRIDE": stride, "BLOCK": block, "EPS": norm.eps, "PDL": architecture >= 90}
    kernel = Kernel(
        plugin="rms_norm",
        function="rms_norm",
        role="norm",
        parameters=tuple((name, kind) for name, kind in types.items() if name not in absent),
        constants=tuple(constants.items()),
        num_warps=min(32, max(1, block // (32 * _ELEMENTS_PER_THREAD))),
        pdl=architecture >= 90,
    )
    return (Launch(kernel, (norm.domain, 1, 1)),)
