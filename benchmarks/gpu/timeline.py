"""What the GPU did when: the kernels of the whole process as CUPTI records them, through torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# The first kernel of every step of a plan: see the lowering.
FIRST_KERNEL = "rotary_table"
_NO_KERNELS = ("Memcpy", "Memset", "memcpy", "memset")


@dataclass(frozen=True)
class Span:
    """A kernel. begin, end: seconds on the recorder's clock."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Steps one after the other, each the kernels that were launched for it, in the order of their beginnings."""

    steps: tuple[tuple[Span, ...], ...]

    @staticmethod
    def of(spans: Sequence[Span], first: str = FIRST_KERNEL) -> Timeline:
        """Cut where a kernel called `first` begins; what came before the first one is left out."""
        steps: list[list[Span]] = []
        for span in sorted(spans, key=lambda span: span.begin):
            if span.name == first:
                steps.append([])
            if steps:
                steps[-1].append(span)
        return Timeline(tuple(map(tuple, steps)))

    def last_steps(self, count: int) -> Timeline:
        """The last ones. Raises ValueError where there are fewer."""
        if len(self.steps) < count:
            raise ValueError(f"{len(self.steps)} steps were recorded, wanted {count}: is CUPTI available?")
        return Timeline(self.steps[-count:])

    @property
    def num_steps(self) -> int:
        """Of which the last one's end is the end of all."""
        return len(self.steps)

    @property
    def num_kernels(self) -> int:
        """Of all steps."""
        return sum(map(len, self.steps))

    @property
    def busy_seconds(self) -> float:
        """In which at least one kernel ran; those that overlap count once."""
        return sum(_covered(step) for step in self.steps)

    @property
    def between_share(self) -> float:
        """Of all time the part between the end of a step's last kernel and the beginning of the next step's first."""
        ends = [max(span.end for span in step) for step in self.steps]
        begins = [step[0].begin for step in self.steps]
        idle = sum(max(0.0, begin - end) for end, begin in zip(ends, begins[1:], strict=False))
        return idle / self._all_seconds

    @property
    def inside_share(self) -> float:
        """Of all time the part inside of steps in which no kernel ran."""
        idle = sum(max(span.end for span in step) - step[0].begin - _covered(step) for step in self.steps)
        return idle / self._all_seconds

    @property
    def _all_seconds(self) -> float:
        return max(span.end for span in self.steps[-1]) - self.steps[0][0].begin

    def seconds_by_kernel(self) -> dict[str, float]:
        """The sum of each kernel's times, the largest first."""
        sums: Counter[str] = Counter()
        for step in self.steps:
            for span in step:
                sums[span.name] += span.end - span.begin  # type: ignore[assignment]
        return dict(sums.most_common())


def record(run: Callable[[], Any]) -> Timeline:
    """The kernels that ran meanwhile, whichever library launched them."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorder:
        run()
        torch.cuda.synchronize()
    found = recorder.profiler.kineto_results.events()
    return Timeline.of(
        [
            Span(event.name(), event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9)
            for event in found
            if event.device_type() == DeviceType.CUDA and not event.name().startswith(_NO_KERNELS)
        ]
    )


def _covered(step: Sequence[Span]) -> float:
    covered, until = 0.0, float("-inf")
    for span in step:
        covered += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return covered
