"""Manifests that lie, or are no manifests. Nothing hashes the manifest itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .forge import MANIFEST, PLAN, TOKENIZER, WEIGHTS, Attack, Attacks, Forge, places, put, remove

_NUMBERS = (0, 1, -1, 2, 1024, 1025, 1 << 24, 1 << 31, 1 << 48, 1 << 60, 1 << 64, 10**400, 1.5, float("inf"))
_OTHERS: tuple[object, ...] = (None, True, 0, "", "\ud800", "..", [], {}, "x" * 5000)
_NAMES = (
    "..", ".", "", "../manifest.json", "/etc/passwd", "a/b", "a\\b", "a\0b", ".hidden", "\ud800", "x" * 300,
    "manifest.json",
    "ü", "\u202e", "a\nb", "Manifest.json", "con", "~",
)  # fmt: skip


def _edit(name: str, change: Callable[[dict[str, Any]], object]) -> Attack:
    return Attack(name, lambda forge: forge.edit_manifest(change))


def attacks(forge: Forge) -> Attacks:
    """Every field missing, and as something else; names, roles, ranks, and very many of them."""
    for at, value in places(forge.manifest):
        shown = ".".join(map(str, at))
        yield _edit(f"without {shown}", lambda manifest, at=at: remove(manifest, at))
        is_number = isinstance(value, int) and not isinstance(value, bool)
        for other in (*_NUMBERS, *_OTHERS[:4]) if is_number else _OTHERS:
            yield _edit(f"{shown} = {other!r:.40}", lambda manifest, at=at, other=other: put(manifest, at, other))
    for old in (PLAN, TOKENIZER):
        for name in _NAMES:

            def rename(manifest: dict[str, Any], old: str = old, name: str = name) -> None:
                manifest["files"][name] = manifest["files"].pop(old)

            yield _edit(f"{old} called {name!r:.40}", rename)
    for role in ("plan", "weights", "kernels", "config", "tokenizer", "template", "generation", "system"):
        for name in (PLAN, WEIGHTS, TOKENIZER):
            yield _edit(f"{name} as {role}", lambda manifest, n=name, r=role: manifest["files"][n].update(role=r))
    yield _edit(
        "plan and weights exchanged",
        lambda manifest: manifest["files"].update({PLAN: manifest["files"][WEIGHTS], WEIGHTS: manifest["files"][PLAN]}),
    )
    for target in ("cpu-avx512", "cpu-avx2-vnni", "cpu-avx512-vnni", "cpu-neon", "cuda-sm90", "cpu"):
        yield _edit(f"for {target}", lambda manifest, target=target: manifest.update(target=target))
    for section in ("manifest", "plan", "weights", "kernels"):
        yield _edit(f"newer {section}", lambda manifest, s=section: manifest["versions"].update({s: 1}))
    for count in (2, 3, 64, 1024):
        yield _edit(f"{count} ranks announced", lambda manifest, n=count: _announce(manifest, n))
        yield _edit(f"{count} ranks in one file", lambda manifest, n=count: _announce(manifest, n, same=True))
    lengths = {"model": {"max_model_len": (1 << 31) - 1}, "max_model_len": (1 << 31) - 1}
    yield _edit(
        "an endless context",
        lambda manifest: (manifest["model"].update(lengths["model"]), manifest.update(max_model_len=(1 << 31) - 1)),
    )
    yield _edit("very many files", lambda manifest: _announce_files(manifest, 100_000))
    yield _edit("very many files of very many ranks", lambda manifest: _announce_files(manifest, 90_000, ranks=1024))
    yield _edit("very many chunks", lambda manifest: manifest["files"][WEIGHTS].update(chunks=["0" * 64] * 200_000))
    yield _edit("a huge memory plan", lambda manifest: manifest.update(memory={f"m{i}": 1 for i in range(500_000)}))
    for name, data in {
        "deep": b"[" * (1 << 20),
        "deep maps": b'{"a":' * (1 << 20),
        "empty lists": b"[" + b"[0]," * (4 << 20 - 1) + b"0]",
        "the largest": b'{"format":"enginery-engine","x":[' + b"[0]," * ((4 << 20) - 100) + b"0]}",
        "too large": b" " * (17 << 20),
        "UTF-16": json.dumps(forge.manifest).encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + forge.files[MANIFEST],
        "no UTF-8": b'{"format": "\xff"}',
        "a long number": b'{"format": ' + b"1" * 100_000 + b"}",
        "a list": b"[]",
        "nothing": b"",
        "zeros": b"\0" * 4096,
    }.items():
        yield Attack(f"{name} for a manifest", lambda forge, data=data: forge.write(MANIFEST, data))
    twice = forge.files[MANIFEST].rstrip()[:-1] + b', "files": {}}'
    yield Attack("a key twice", lambda forge: forge.write(MANIFEST, twice))


def _announce(manifest: dict[str, Any], count: int, same: bool = False) -> None:
    manifest["mesh"] = {"tensor_parallel_size": count, "ranks": [{"rank": rank, "tp": rank} for rank in range(count)]}
    if same:
        for rank in range(1, count):
            for name in (PLAN, WEIGHTS):
                manifest["files"][f"{rank}.{name}"] = manifest["files"][name] | {"rank": rank}


def _announce_files(manifest: dict[str, Any], count: int, ranks: int = 1) -> None:
    entry = {"role": "plan", "format": "", "rank": 0, "size": 0, "sha256": "0" * 64}
    if ranks > 1:
        _announce(manifest, ranks)
        manifest["files"] = {}
    for index in range(count):
        manifest["files"][f"{index}"] = entry | {"rank": index * ranks // count}
