"""enginery beside every CPU rival, on this machine, in turn: value, ratio to the best rival, fraction of the roof.

    make bench-cpu [ARGS="…"]        the same as: python -m benchmarks.cpu …

By default one model, 8-bit, prefill, decode, peak RSS and start-up, three rounds. A rival that cannot be set up is told
in the table. What has been measured is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..checkpoints import SHAPES
from ..machine import ROOT, describe
from .drive import Task
from .engines import CLASSES, ENGINES, Engine
from .models import MODELS, converted
from .picture import draw
from .results import Results
from .scenarios import DEFAULT_GROUPS, GROUPS
from .setup import WORK, Unavailable, say, set_up
from .table import rows_of, write_table
from .turns import Rules, play, turns

_DEADLINE = 1800.0


def main() -> None:
    """Sets up, measures, and writes the table and the picture of each model and class."""
    arguments = _parser().parse_args()
    everything = arguments.all
    models = list(MODELS) if everything else arguments.models
    classes = list(CLASSES) if everything else arguments.classes
    groups = list(GROUPS) if everything else arguments.scenarios
    engines = [engine for engine in ENGINES if not arguments.engines or engine.folder in arguments.engines]
    left = 0
    for name in models:
        for precision_class in classes:
            results = Results(arguments.out / f"cpu.{name}.{precision_class}.json")
            if not arguments.table:
                command = " ".join(["python -m benchmarks.cpu", *sys.argv[1:]])
                commands = dict.fromkeys([*results.header.get("commands", []), command])
                results.header = {"machine": describe(), "threads": arguments.threads, "commands": list(commands)}
                tasks = _tasks(engines, name, precision_class, arguments.threads, results)
                if arguments.setup:
                    continue
                rules = Rules(arguments.threads, arguments.patience, arguments.retries)
                order = list(turns(tasks, groups, arguments.rounds))
                left += play(order, results, rules, arguments.turns)
            _write(results, name, precision_class)
    if left:
        say(f"{left} turns are missing: the same command goes on")


def _tasks(engines: list[Engine], name: str, precision_class: str, threads: int, results: Results) -> list[Task]:
    """Of those that can take part; why others cannot goes into the results."""
    tasks = []
    for engine in engines:
        results.missing.pop(engine.name, None)
        try:
            if precision_class not in engine.precisions:
                raise Unavailable(engine.lacks)
            set_up(engine)
            precision = engine.precisions[precision_class]
            model = converted(engine, name, precision)
            tasks.append(Task(engine, model, precision, SHAPES[name]["vocab_size"], threads, _DEADLINE))
        except Unavailable as error:
            results.missing[engine.name] = str(error)
            say(f"{engine.name}: {error}")
    return tasks


def _write(results: Results, name: str, precision_class: str) -> None:
    """The table and the picture, beside the runs."""
    results.write()
    groups, shape = list(GROUPS), SHAPES[name]
    table = write_table(results, groups, shape, name, precision_class)
    results.path.with_suffix(".md").write_text(table)
    rows = rows_of(results, groups, shape, CLASSES[precision_class])
    results.path.with_suffix(".svg").write_text(draw(rows, f"{name}, {precision_class}"))
    print(f"\n{table}\n{results.path.with_suffix('.md')}, .svg, .json", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=[MODELS[0]], metavar="SHAPE", help=", ".join(MODELS))
    add("--classes", nargs="+", choices=CLASSES, default=["8-bit"], metavar="CLASS", help=", ".join(CLASSES))
    add("--scenarios", nargs="+", choices=GROUPS, default=list(DEFAULT_GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    folders = [engine.folder for engine in ENGINES]
    add("--engines", nargs="+", choices=folders, metavar="ENGINE", help=f"only these: {', '.join(folders)}")
    add("--all", action="store_true", help="all models, classes and scenarios (many hours)")
    add("--rounds", type=int, default=3)
    add("--turns", type=int, help="stop after so many turns; the same command goes on")
    add("--threads", type=int, default=2)
    add("--patience", type=float, default=60, help="seconds to wait for a quiet machine before a turn")
    add("--retries", type=int, default=1, help="of turns in which the machine was not quiet")
    add("--out", type=Path, default=WORK / "results", help=f"default: {(WORK / 'results').relative_to(ROOT)}")
    add("--setup", action="store_true", help="set up and convert, measure nothing")
    add("--table", action="store_true", help="write the tables of what has been measured, measure nothing")
    return parser


if __name__ == "__main__":
    main()
