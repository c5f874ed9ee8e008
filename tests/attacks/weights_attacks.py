"""Weights files whose hash is right and whose header is not."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from .forge import WEIGHTS, Attack, Attacks, Forge, places, put, remove

_NUMBERS = (0, 1, -1, 63, 1 << 31, 1 << 40, 1 << 47, 1 << 48, 1 << 62, 1 << 64, 10**400, 1.5, float("nan"))
_OTHERS: tuple[object, ...] = (None, True, "", "\ud800", [], {}, "x" * (1 << 20))

Header = dict[str, Any]


def _take_apart(data: bytes) -> tuple[Header, dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["tensors"]), data[8 + length :]


def _put_together(header: object, body: bytes, pad: int = 4096) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % pad)
    return len(text).to_bytes(8, "little") + text + body


def attacks(forge: Forge) -> Attacks:
    """Overlaps, offsets, shapes, layouts and bombs."""
    header, tensors, body = _take_apart(forge.files[WEIGHTS])
    chance = random.Random(3)

    def edit(name: str, change: Callable[[Header, dict[str, Any]], object], tail: bytes = body) -> Attack:
        def apply(forge: Forge) -> None:
            changed, meanings = copy.deepcopy(header), copy.deepcopy(tensors)
            change(changed, meanings)
            if meanings != tensors:
                changed["__metadata__"]["tensors"] = json.dumps(meanings)
            forge.write(WEIGHTS, _put_together(changed, tail))

        return Attack(name, apply)

    names = [name for name in header if not name.startswith((".", "_"))]
    sample = chance.sample(names, 8)
    for at, value in places(header):
        if at[0] in sample or at[0] == "__metadata__":
            yield edit(f"without {at}", lambda header, _, at=at: remove(header, at))
            for other in _NUMBERS if isinstance(value, int) else _OTHERS:
                yield edit(f"{at} = {other!r:.40}", lambda header, _, at=at, other=other: put(header, at, other))
    for at, value in places(tensors):
        if at[0] in sample:
            yield edit(f"meaning without {at}", lambda _, tensors, at=at: remove(tensors, at))
            for other in _NUMBERS if isinstance(value, int) else _OTHERS:
                yield edit(
                    f"meaning {at} = {other!r:.40}", lambda _, tensors, at=at, other=other: put(tensors, at, other)
                )
    layouts = sorted({tensor["layout"] for tensor in tensors.values()})
    for name in sample:
        for layout in (*layouts, "rows_f32.v0", "int8_k4n16.v0", "rows_f32.v1"):
            yield edit(
                f"{name} as {layout}", lambda _, tensors, n=name, layout=layout: tensors[n].update(layout=layout)
            )
        rows, columns = tensors[name]["shape"]
        for shape in ([columns, rows], [1, rows * columns], [rows * columns, 1], [1 << 47, 1 << 47], [0, 1 << 48]):
            yield edit(f"{name} {shape}", lambda _, tensors, n=name, s=shape: tensors[n].update(shape=s))
        other = chance.choice(names)
        yield edit(f"{name} over {other}", lambda header, _, n=name, o=other: header.update({n: header[o]}))
        yield edit(f"{name} and {other} swapped", lambda header, tensors, n=name, o=other: _swap(header, tensors, n, o))

        def empty(header: Header, tensors: dict[str, Any], name: str = name) -> None:
            begin, end = header[name]["data_offsets"]
            header[name] |= {"shape": [0], "data_offsets": [begin, begin]}
            header[".pad.more"] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            tensors[name]["shape"] = [0, 0]

        yield edit(f"{name} empty", empty)
    yield edit("turned round", lambda header, _: _reverse(header))
    yield edit("data cut", lambda *_: None, body[:-4096])
    yield edit("data doubled", lambda *_: None, body * 2)
    yield edit("no data", lambda *_: None, b"")
    yield edit("a surrogate's name", lambda header, tensors: _rename(header, tensors, names[0], "\ud800"))
    yield edit("a long name", lambda header, tensors: _rename(header, tensors, names[0], "x" * (1 << 20)))
    yield edit("ten thousand empty tensors", lambda header, tensors: _add_empty(header, tensors, 10000))

    def raw(name: str, data: bytes) -> Attack:
        return Attack(name, lambda forge: forge.write(WEIGHTS, data))

    for length in (0, 1, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1):
        yield raw(f"header of {length}", length.to_bytes(8, "little") + forge.files[WEIGHTS][8:])
    yield raw("deep header", _put_together(b"[" * 1_000_000, body))
    yield raw("header of empty lists", _put_together(b'{"__metadata__":[' + b"[0]," * 4_000_000 + b"0]}", body))
    bomb = json.dumps({"__metadata__": {"tensors": "[" + "[0]," * 4_000_000 + "0]"}}).encode()
    yield raw("metadata of empty lists", _put_together(bomb, body))
    yield raw("largest header", _put_together(b"[" + b"[0]," * 16_000_000 + b"0]", body))
    unaligned = json.dumps(header).encode()
    for shift in range(1, 4):
        data = unaligned + b" " * (-(8 + len(unaligned)) % 4096 + shift)
        yield raw(f"data {shift} bytes further", len(data).to_bytes(8, "little") + data + body)


def _swap(header: Header, tensors: dict[str, Any], left: str, right: str) -> None:
    header[left], header[right] = header[right], header[left]
    tensors[left], tensors[right] = tensors[right], tensors[left]


def _reverse(header: Header) -> None:
    items = list(header.items())
    header.clear()
    header.update(reversed(items))


def _rename(header: Header, tensors: dict[str, Any], name: str, new: str) -> None:
    header[new], tensors[new] = header.pop(name), tensors.pop(name)


def _add_empty(header: Header, tensors: dict[str, Any], count: int) -> None:
    for index in range(count):
        header[f"e{index}"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        tensors[f"e{index}"] = {"layout": "rows_f32.v0", "shape": [0, 0], "sources": []}
