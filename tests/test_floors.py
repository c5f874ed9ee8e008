"""Who may import whom (DESIGN.md, section 1), read from the sources without importing anything."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Room -> the rooms it may import beside itself.
FLOORS = {
    "engines": set(),
    "plugins": {"engines"},
    "compiler": {"engines", "plugins"},
    "runtime": {"engines"},
}
OTHER_ROOMS = ["benchmarks", "ci", "examples", "tests"]

FILES = [
    path.relative_to(ROOT)
    for room in FLOORS
    for path in sorted((ROOT / room).rglob("*.py*"))
    if path.suffix in {".py", ".pyi"}
]


def imported_names(source: str) -> list[ast.Import | ast.ImportFrom]:
    """Every import of a file, those inside of functions too."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def rooms_imported(path: Path, source: str) -> set[str]:
    """The first names below the package that the relative imports of `path` lead to: rooms, or modules of the root."""
    rooms = set()
    for node in imported_names(source):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        package = path.parent.parts
        assert node.level <= len(package) + 1, f"{path}:{node.lineno}: leads out of the package"
        target = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
        rooms |= {target[0]} if target else {alias.name for alias in node.names}
    return rooms


def absolute_imports(source: str) -> set[str]:
    """The first names of the absolute imports."""
    names = [
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for node in imported_names(source)
        for alias in node.names
        if isinstance(node, ast.Import) or node.level == 0
    ]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_keep_to_the_floors(path: Path) -> None:
    room = path.parts[0]
    allowed = {room, "__version__"} | FLOORS[room]
    assert rooms_imported(path, (ROOT / path).read_text()) <= allowed


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_inside_of_the_package_are_relative(path: Path) -> None:
    assert not absolute_imports((ROOT / path).read_text()) & {"enginery", *FLOORS}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_lie_at_most_two_folders_deep(path: Path) -> None:
    assert len(path.parents) - 1 <= 2


@pytest.mark.parametrize("room", [*FLOORS, *OTHER_ROOMS])
def test_every_room_has_a_readme(room: str) -> None:
    assert (ROOT / room / "README.md").is_file()


def test_runtime_and_compiler_share_no_extension() -> None:
    """What is compiled into `_pack` includes nothing of the runtime, and no kernel includes the packer."""
    packers = [*ROOT.glob("plugins/*/pack*.*"), ROOT / "plugins/pack_module.cpp"]
    others = [path for ending in ("cpp", "h") for path in ROOT.glob(f"plugins/**/*.{ending}") if path not in packers]
    assert len(packers) > 1
    assert not [path for path in packers if re.search(r'#include "runtime/', path.read_text())]
    assert not [path for path in others if re.search(r'#include ".*/pack\w*\.h"', path.read_text())]


@pytest.mark.parametrize(
    ("path", "source", "rooms"),
    [
        ("engines/plan.py", "from .errors import X", {"engines"}),
        ("engines/plan.py", "from ..runtime.engine import X", {"runtime"}),
        ("compiler/models/llama.py", "def f():\n    from ...runtime import X", {"runtime"}),
        ("compiler/models/__init__.py", "from . import llama", {"compiler"}),
        ("plugins/operators.py", "from .. import compiler, engines", {"compiler", "engines"}),
        ("plugins/operators.py", "import runtime, json", set()),
    ],
)
def test_relative_imports_are_resolved(path: str, source: str, rooms: set[str]) -> None:
    assert rooms_imported(Path(path), source) == rooms
