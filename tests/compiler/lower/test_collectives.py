"""How ranks meet, with the buffers and halves of flags of real plans, whatever order their programs run in.

What triton_meeting.py does is told here action by action, and a random choice decides who acts next: no flag is set
that is set already, no part is read that is not this collective's, nobody waits for ever, and all flags end cleared.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from enginery.compiler.build import BuildRequest, prepare
from enginery.engines.plan import Launch

from ...tiny import make_checkpoint


@dataclass(frozen=True)
class Collective:
    """domain: tokens or rows; buffer: which parts are read."""

    domain: str
    buffer: str
    half: int
    meetings: int


def collectives_of(case: str, directory: Path, world_size: int) -> list[Collective]:
    """Of the first rank's plan, in order."""
    make_checkpoint(case, directory)
    with prepare(BuildRequest(str(directory), None, target="h100", tensor_parallel_size=world_size)) as prepared:
        rank = prepared.ranks[0]
    kernels = {kernel.name: dict(kernel.constants) for kernel in rank.kernels}
    found: dict[tuple[Any, ...], Collective] = {}
    for launch in rank.plan.forward:
        assert isinstance(launch, Launch)
        if (meetings := kernels[launch.kernel].get("MEETINGS")) is not None:
            assert isinstance(meetings, int)
            arguments: dict[str, Any] = dict(launch.arguments)
            out, count = arguments["out"].name, arguments["count"].value
            # Variants for fewer and for more rows are one collective; that of most rows leaves the residual to another.
            each = Collective(count, arguments["parts"].name, arguments["half"].value, meetings)
            assert found.setdefault((out.removesuffix(".sum"), count), each) == each
    return list(found.values())


class Ranks:
    """Steps of collectives on some ranks, each with some programs. library: the chance of one to be a library's."""

    def __init__(self, steps: list[list[Collective]], world_size: int, seed: int, library: float = 0.0) -> None:
        self.steps, self.world_size, self.chance = steps, world_size, random.Random(seed)
        self.flags: Counter[tuple[int, int, int, int]] = Counter()  # rank, half, program, rank that sets it
        self.parts: dict[tuple[int, str], int] = {}
        self.programs = [[self.chance.randint(1, 3) for _ in step] for step in steps]
        self.by_library = [[self.chance.random() < library for _ in step] for step in steps]
        self.handed_over: Counter[int] = Counter()

    def run(self) -> None:
        """To the end. Raises AssertionError."""
        ranks = {rank: self.launches(rank) for rank in range(self.world_size)}
        idle = 0
        while ranks:
            rank = self.chance.choice(list(ranks))
            try:
                idle = 0 if next(ranks[rank]) else idle + 1
            except StopIteration:
                del ranks[rank]
                idle = 0
            assert idle < 1000, "all wait"
        assert not +self.flags, "flags are left"

    def launches(self, rank: int) -> Iterator[bool]:
        """What a rank does, one after the other; False where it could do nothing."""
        number = 0
        for step, counts, libraries in zip(self.steps, self.programs, self.by_library, strict=True):
            for collective, count, by_library in zip(step, counts, libraries, strict=True):
                number += 1
                self.parts[rank, collective.buffer] = number
                yield True
                if by_library:
                    yield from self.library(number)
                    continue
                programs = [self.program(rank, index, collective, number) for index in range(count)]
                while programs:
                    program = self.chance.choice(programs)
                    try:
                        yield next(program)
                    except StopIteration:
                        programs.remove(program)

    def library(self, number: int) -> Iterator[bool]:
        """When it has ended on a rank, all have come to it and this one's part is needed no more."""
        self.handed_over[number] += 1
        while self.handed_over[number] < self.world_size:
            yield False
        yield True

    def program(self, rank: int, index: int, collective: Collective, number: int) -> Iterator[bool]:
        yield from self.meet(rank, index, collective.half)
        for peer in range(self.world_size):
            found = self.parts[peer, collective.buffer]
            assert found == number, f"rank {rank} reads part {found} of rank {peer}, wanted {number}"
            yield True
        if collective.meetings == 2:
            yield from self.meet(rank, index, 1 - collective.half)

    def meet(self, rank: int, index: int, half: int) -> Iterator[bool]:
        for peer in range(self.world_size):
            assert not self.flags[peer, half, index, rank], f"rank {rank} sets a flag of rank {peer} that is set"
            self.flags[peer, half, index, rank] = 1
            yield True
        for peer in range(self.world_size):
            while not self.flags[rank, half, index, peer]:
                yield False
            self.flags[rank, half, index, peer] = 0
            yield True


def run_often(collectives: list[Collective], world_size: int) -> None:
    """A few steps, some of which have no rows, in many orders, some by a library in part or whole."""
    of_tokens = [each for each in collectives if each.domain == "tokens"]
    for seed in range(40):
        steps = random.Random(seed).choices([collectives, of_tokens], k=4)
        Ranks(steps, world_size, seed).run()
        Ranks(steps, world_size, seed, library=0.3).run()


@pytest.mark.parametrize(("case", "world_size"), [("llama", 2), ("gemma3_text", 2), ("phi3", 2)])
def test_no_order_loses_a_signal_or_a_part(case: str, world_size: int, tmp_path: Path) -> None:
    collectives = collectives_of(case, tmp_path, world_size)
    assert {each.domain for each in collectives} == {"tokens", "rows"}
    run_often(collectives, world_size)


@pytest.mark.parametrize(
    "domains", [["rows"] * 3, ["tokens"], ["tokens"] * 2, ["tokens", "rows"], ["tokens"] * 2 + ["rows"]]
)
def test_no_number_of_collectives_is_too_odd(domains: list[str]) -> None:
    """As compiler/lower/collectives.py counts them."""
    collectives = []
    for domain in ("tokens", "rows"):
        count = domains.count(domain)
        for index in range(count):
            twice = index == count - 1 and count % 2 == 1
            collectives.append(Collective(domain, str(index % 2), index % 2, 1 + twice))
    run_often(collectives, 3)


DAMAGED: dict[str, Callable[[Collective], Collective]] = {
    "nobody waits for readers": lambda each: replace(each, meetings=1),
    "one half": lambda each: replace(each, half=0, meetings=1),
    "one buffer": lambda each: replace(each, buffer="one"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_needed_for_it(damage: str, tmp_path: Path) -> None:
    collectives = list(map(DAMAGED[damage], collectives_of("llama", tmp_path, 2)))
    with pytest.raises(AssertionError, match=r"rank|flags|wait"):
        run_often(collectives, 2)
