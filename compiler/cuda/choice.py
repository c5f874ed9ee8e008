"""Which of several ways to do the same an engine has: the first whose machine code is as it must be.

A plan is made before its kernels are compiled. So plugins name, for what may turn out badly, other launches behind the
one that they want: of smaller tiles, of more registers. What each compiles to depends on nothing but itself and is kept
in the user's cache, so every build chooses alike, and one after the first compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...engines.errors import CompileError
from ...engines.plan import KernelImage, Launch, Plan
from ...engines.targets import Target
from ...plugins.launches import Kernel
from .kernels import CompiledKernel, Progress, compile_kernels

# What kernels do that must keep what they compute with in registers.
_UNSPILLED = ("gemm", "attention")


@dataclass(frozen=True)
class Choice:
    """What the plan of a rank leaves open until its kernels are compiled.

    ways    of each of its kernels: itself, and those that may take its place, in the order in which they are wanted
    others  by a launch's region: the launches of those that may take its kernel's place
    """

    ways: tuple[tuple[Kernel, ...], ...] = ()
    others: Mapping[int, tuple[Launch, ...]] = field(default_factory=dict)

    def settle(self, plan: Plan, compiled: Mapping[str, CompiledKernel]) -> Plan:
        """The plan with the kernels that `compile_chosen` found."""

        def chosen(launch: Launch) -> Launch:
            name = compiled[launch.kernel].image.name
            return next(each for each in (launch, *self.others[launch.region]) if each.kernel == name)

        images = {image.name: image for image in (compiled[first.name].image for first, *_ in self.ways)}
        forward = tuple(chosen(each) if isinstance(each, Launch) else each for each in plan.forward)
        return replace(plan, forward=forward, sample=tuple(map(chosen, plan.sample)), kernels=tuple(images.values()))


def compile_chosen(
    ways: Sequence[tuple[Kernel, ...]],
    target: Target,
    num_processes: int,
    progress: Progress = lambda done, total: None,
) -> dict[str, CompiledKernel]:
    """By the name of each way's first kernel, the machine code of the first that has no fault.

    Raises CompileError as compile_kernels does, and where all have one: it names them, with what is wrong.
    """
    found: dict[str, CompiledKernel] = {}
    faults: dict[str, list[str]] = {}
    left = {way[0].name: way for way in ways}
    while left:
        compiled = compile_kernels([way[0] for way in left.values()], target, num_processes, progress)
        later = {}
        for name, (kernel, *others) in left.items():
            found[name] = compiled[kernel.name]
            if wrong := fault(found[name].image, target):
                faults.setdefault(name, []).append(wrong)
                later[name] = tuple(others)
        if hopeless := [name for name, others in later.items() if not others]:
            raise CompileError(_refusal({name: faults[name] for name in hopeless}, target))
        left = later
    return found


def fault(image: KernelImage, target: Target) -> str:
    """What no engine may have of a kernel's machine code; empty where there is nothing."""
    if image.spill_bytes and image.role in _UNSPILLED:
        return f"spills {image.spill_bytes} bytes"
    if image.shared_bytes > target.shared_bytes:
        return f"takes {image.shared_bytes} bytes of shared memory of {target.shared_bytes}"
    return ""


def _refusal(faults: Mapping[str, list[str]], target: Target) -> str:
    kernels = "\n".join(f"kernel {name} {', or '.join(dict.fromkeys(each))}" for name, each in faults.items())
    return (
        f"{target.name} has too few registers or too little shared memory for this model, in whatever tiles:\n"
        f"{kernels}\nBuild it for another target, or with another --precision or --kv-cache-dtype."
    )
