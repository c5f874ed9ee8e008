"""What an attacker can do to an engine: change any byte, and make the manifest agree with what was changed."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
WEIGHTS, PLAN = "weights.rank0.safetensors", "plan.rank0.msgpack"


@dataclass(frozen=True)
class Attack:
    """Damage to a directory, under the name that a crash is reported by."""

    name: str
    apply: Callable[[Forge], None]


Attacks = Iterator[Attack]


class Forge:
    """A copy of a sound engine at `directory`, damaged and made whole again.

    files: what a sound engine holds, by name; manifest, plan: those of rank 0 as plain data
    """

    def __init__(self, engine: Path, directory: Path) -> None:
        self.directory = directory
        self.files = {path.name: path.read_bytes() for path in sorted(engine.iterdir())}
        self.manifest: dict[str, Any] = json.loads(self.files[MANIFEST])
        self.plan: dict[str, Any] = msgpack.unpackb(self.files[PLAN])

    def restore(self) -> None:
        """Makes the engine sound again."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        for name, data in self.files.items():
            (self.directory / name).write_bytes(data)

    def path(self, name: str) -> Path:
        return self.directory / name

    def write(self, name: str, data: bytes, signed: bool = True) -> None:
        """Replaces a file; with `signed`, the manifest tells the new size and hashes."""
        self.path(name).unlink(missing_ok=True)
        self.path(name).write_bytes(data)
        if signed and name != MANIFEST:
            manifest = json.loads(self.path(MANIFEST).read_bytes())
            entry = manifest["files"].setdefault(name, {"role": _ROLES.get(name, "config"), "format": "json"})
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if "chunks" in entry:
                step = 64 << 20
                entry["chunks"] = [
                    hashlib.sha256(data[start : start + step]).hexdigest() for start in range(0, len(data), step)
                ]
            self.write_json(MANIFEST, manifest)

    def write_json(self, name: str, document: object) -> None:
        self.write(name, json.dumps(document).encode())

    def edit_manifest(self, edit: Callable[[dict[str, Any]], object]) -> None:
        manifest = copy.deepcopy(self.manifest)
        edit(manifest)
        self.write_json(MANIFEST, manifest)

    def edit_plan(self, edit: Callable[[dict[str, Any]], object]) -> None:
        plan = copy.deepcopy(self.plan)
        edit(plan)
        self.write(PLAN, msgpack.packb(plan))

    def edit_json(self, name: str, **changes: object) -> None:
        self.write_json(name, json.loads(self.files.get(name, b"{}")) | changes)


_ROLES = {"chat_template.jinja": "template", "generation_config.json": "generation"}


def calls_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a plan's forward."""
    return list(plan["entry_points"]["forward"]["instructions"])


def set_calls(plan: dict[str, Any], calls: list[dict[str, Any]]) -> None:
    plan["entry_points"]["forward"]["instructions"] = calls


Place = tuple[Any, ...]


def places(value: object, at: Place = ()) -> Iterator[tuple[Place, object]]:
    """Every value within nested maps and lists, with the keys that lead to it; the containers too."""
    if at:
        yield at, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*at, index))


def put(document: Any, at: Place, value: object) -> None:
    """Sets the value at a place."""
    for key in at[:-1]:
        document = document[key]
    document[at[-1]] = value


def remove(document: Any, at: Place) -> None:
    """Takes the value at a place away."""
    for key in at[:-1]:
        document = document[key]
    del document[at[-1]]
