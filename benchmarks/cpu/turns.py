"""All engines in turn, A B C A B C, each between two probes of the machine; what is measured already is not again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..machine import probe
from .drive import Task, measure
from .quiet import Clock, wait_until_quiet
from .results import Results, Run
from .setup import say, version
from .table import DRIFT, QUIET, number


@dataclass(frozen=True)
class Turn:
    """An engine's, in a round of a group."""

    group: str
    round: int
    task: Task


@dataclass(frozen=True)
class Rules:
    """threads: of the probes; patience: seconds to wait for a quiet machine; retries: of runs that were not quiet."""

    threads: int
    patience: float
    retries: int


def turns(tasks: list[Task], groups: list[str], rounds: int) -> Iterator[Turn]:
    """Every engine once before any has its second turn."""
    for group in groups:
        for number_of_round in range(rounds):
            for task in tasks:
                yield Turn(group, number_of_round, task)


def play(order: list[Turn], results: Results, rules: Rules, most: int | None) -> int:
    """Plays the turns that are missing, at most `most`; how many are missing still."""
    versions = {turn.task.engine.name: version(turn.task.engine) for turn in order}

    def missing() -> list[Turn]:
        return [
            t for t in order if not results.find(t.task.engine.name, versions[t.task.engine.name], t.group, t.round)
        ]

    todo = missing()
    for place, turn in enumerate(todo if most is None else todo[:most]):
        name = turn.task.engine.name
        say(f"{place + 1} of {len(todo)}: {name}, {turn.group}, round {turn.round + 1}")
        results.add(best_of(functools.partial(_run, turn, versions[name], rules), rules.retries))
    return len(missing())


def best_of(run: Callable[[], Run], retries: int) -> Run:
    """The first quiet run, or of those that are not the one with the least of others in it."""
    runs: list[Run] = []
    for _ in range(retries + 1):
        runs.append(run())
        if not (why := runs[-1].unquiet(QUIET, DRIFT)):
            return runs[-1]
        say(f"not quiet: {why}")
    return min(runs, key=lambda run: run.others)


def _run(turn: Turn, version_measured: str, rules: Rules) -> Run:
    wait_until_quiet(QUIET, rules.patience)
    before = probe(rules.threads)
    started = Clock.read()
    values, failures = measure(turn.task, turn.group)
    others = Clock.read().others_since(started)
    after = probe(rules.threads)
    told = ", ".join(f"{name} {number(value)}" for name, value in values.items())
    say(f"  {told or 'nothing'}" + "".join(f"; {name}: {why}" for name, why in failures.items()))
    return Run(
        engine=turn.task.engine.name,
        version=version_measured,
        group=turn.group,
        round=turn.round,
        values=values,
        before=before,
        after=after,
        others=round(others, 4),
        failures=failures,
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
