"""Products at real sizes: operands as plans lay them out, and what must come out, by torch in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from enginery.engines.expressions import evaluate
from enginery.plugins.launches import Launch
from enginery.plugins.linear.cuda import Linear, linear_launches

from .launcher import DEVICE, Argument, run_launches, target
from .shapes import generator, normal, padded

STORED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
LIMITS = {"fp8": 448.0, "int8": 127.0}


def quantize(values: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [M, K] -> as it is stored, f32 scales [M]."""
    if dtype == "bf16":
        return values.to(torch.bfloat16), torch.ones(len(values), device=values.device)
    absmax = values.abs().amax(1)
    scaled = values * (LIMITS[dtype] / torch.where(absmax > 0, absmax, 1.0))[:, None]
    return (scaled.round() if dtype == "int8" else scaled).to(STORED[dtype]), absmax / LIMITS[dtype]


def pad(values: torch.Tensor, *shape: int) -> torch.Tensor:
    """With zeros."""
    whole = torch.zeros(shape, dtype=values.dtype, device=values.device)
    whole[tuple(slice(0, length) for length in values.shape)] = values
    return whole


@dataclass
class Product:
    """`linear` for some number of rows: its operands by name, and the values that a and weight stand for."""

    linear: Linear
    rows: int
    seed: int = 0
    operands: dict[str, torch.Tensor] = field(init=False)
    a: torch.Tensor = field(init=False)
    weight: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        linear, random = self.linear, generator(self.seed)
        x = (3 * normal(random, self.rows, linear.k)).to(torch.bfloat16)
        norm_weight = 1 + normal(random, linear.k) / 4 if linear.prologue == "norm" else None
        a, a_scale = self._prepare(x.float(), norm_weight)
        outputs, rows = 2 * linear.n if linear.gated else linear.n, linear.weight_rows
        values = normal(random, outputs, linear.k) / math.sqrt(linear.k)
        weight, weight_scale = quantize(values, linear.dtype)
        self.a, self.weight = a.float() * a_scale[:, None], weight.float() * weight_scale[:, None]
        stride = padded(linear.n)
        out_type = torch.bfloat16 if linear.out_dtype == "bf16" else torch.float32
        self.operands = {
            "x": pad(x, self.rows, padded(linear.k)),
            "a": pad(a, self.rows, padded(linear.k)),
            "a_scale": a_scale,
            "weight": pad(weight, rows, padded(linear.k)),
            "weight_scale": pad(weight_scale, rows),
            "bias": pad(normal(random, outputs), rows),
            "residual": pad(normal(random, self.rows, linear.n).to(torch.bfloat16), self.rows, stride),
            "out": torch.full((self.rows + 1, stride), 7.0, dtype=out_type, device=DEVICE),
        }
        if norm_weight is not None:
            self.operands["norm_weight"] = norm_weight

    def _prepare(self, x: torch.Tensor, norm_weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if norm_weight is None:
            return quantize(x, self.linear.dtype)
        inverse = torch.rsqrt(x.square().mean(1) + self.linear.eps)
        if self.linear.dtype == "bf16":
            return quantize(x * norm_weight * inverse[:, None], "bf16")
        stored, scale = quantize(x * norm_weight, self.linear.dtype)
        return stored, scale * inverse

    def launches(self) -> tuple[Launch, ...]:
        """Of all numbers of rows, on this GPU."""
        return linear_launches(self.linear, target().arch, target().num_sms)

    def arguments(self) -> dict[str, Argument]:
        """Of a launch."""
        return {**self.operands, "count": self.rows}

    def run(self) -> torch.Tensor:
        """f32 [rows, n]; launched twice, as scratch must be left as it was found."""
        run_launches(self.launches(), {self.linear.domain: self.rows}, self.arguments(), times=2)
        out = self.operands["out"].float()
        assert (out[self.rows] == 7).all(), "something is written behind the last row"
        assert not out[: self.rows, self.linear.n :].any(), "padding is not zero"
        return out[: self.rows, : self.linear.n]

    def wanted(self) -> torch.Tensor:
        """f32 [rows, n]."""
        linear = self.linear
        out = self.a @ self.weight.T
        if linear.bias:
            out = out + self.operands["bias"][: len(self.weight)]
        if linear.gated:
            gate, up = out[:, 0::2], out[:, 1::2]
            silu = linear.activation == "silu_gated"
            act = torch.nn.functional.silu(gate) if silu else torch.nn.functional.gelu(gate, approximate="tanh")
            out = act * up
        if linear.softcap:
            out = linear.softcap * torch.tanh(out / linear.softcap)
        return out + self.operands["residual"][:, : linear.n].float() if linear.residual else out


def kernel_of(linear: Linear, rows: int) -> Launch:
    """The launch for this number of rows."""
    launches = linear_launches(linear, target().arch, target().num_sms)
    return next(one for one in launches if all(part.low <= rows <= part.high for part in one.guard))


def grid_of(launch: Launch, sizes: dict[str, int]) -> tuple[int, int, int]:
    """As numbers."""
    return evaluate(launch.grid[0], sizes), evaluate(launch.grid[1], sizes), evaluate(launch.grid[2], sizes)
