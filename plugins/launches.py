"""How plugins say which GPU kernels there are: a Triton function made for one set of constants, and when and how it is
launched. Nothing here needs Triton: a plan can be made without it, and the kernels are compiled afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from ..engines.expressions import Expression
from ..engines.plan import Collective, Range

Constant = int | float | bool | str | tuple[int, ...] | None


@dataclass(frozen=True)
class Kernel:
    """A function of plugins/<plugin>/triton.py and what it is compiled with.

    role        what `enginery inspect` calls it: "gemm", "attention", "norm", "embedding", "rotary", "state", "copy",
                "collective"
    parameters  the ones that a launch gives, in the order of the source: name -> Triton's type ("*bf16", "i32", "fp32")
    constants   all others
    pdl         it waits for its predecessor itself, so that it may be started before that has ended
    registers   that a thread may have at most; 0: ptxas decides, and spills a few to run more programs at a time
    """

    plugin: str
    function: str
    role: str
    parameters: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False
    registers: int = 0

    @cached_property
    def name(self) -> str:
        """Begins with the plugin's name; kernels that differ in anything have different names."""
        told = {name: value for name, value in asdict(self).items() if name != "registers" or value}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return f"{self.plugin}_{self.function}_{digest[:12]}"


@dataclass(frozen=True)
class Scratch:
    """Memory that a launch needs for itself. zeroed: it must be zero before the first launch, and each leaves it so."""

    bytes: Expression
    zeroed: bool = False


@dataclass(frozen=True)
class Launch:
    """One way to do an operator's work: the kernel, its grid, and the guard under which it is the one.

    scratch     of pointer parameters that are neither operands nor step inputs
    values      of scalar parameters that are no variables of the step: numbers
    inputs      the step inputs of parameters that are not called as they are
    collective  what a library may do in its place
    others      other ways to do the same with the same arguments, in the order in which they are wanted: an engine has
                the first of all whose machine code is as it must be (compiler/cuda/choice.py)
    """

    kernel: Kernel
    grid: tuple[Expression, Expression, Expression]
    guard: tuple[Range, ...] = ()
    scratch: dict[str, Scratch] = field(default_factory=dict)
    values: dict[str, int | float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    collective: Collective | None = None
    others: tuple[Launch, ...] = ()


def in_order_of_preference(ways: Sequence[tuple[Launch, ...]]) -> tuple[Launch, ...]:
    """The launches of the first way, each with those that take its place in the others. One kernel has the same others
    wherever it is launched, so launches that share one go on sharing one.
    """
    first, *others = [way for place, way in enumerate(ways) if way not in ways[:place]]
    return tuple(replace(launch, others=tuple(each)) for launch, *each in zip(first, *others, strict=True))
