"""The weights file of one rank: safetensors whose tensors are bytes in named layouts (FORMAT.md).

The writer knows every tensor's size beforehand, writes the header first and then streams the data. The reader checks
the header against the file and never touches the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import EngineFormatError
from .fields import LARGEST, Fields
from .files import require_regular
from .layouts import LAYOUTS, round_up

PAGE = 4096
LARGE_TENSOR = 64 << 10
SMALL_ALIGNMENT = 64
# A thousand layers take two; parsed, JSON takes twenty times its size.
LARGEST_HEADER = 16 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor. rows, columns: its logical shape (a vector has one column); sources: where it came from."""

    name: str
    layout: str
    rows: int
    columns: int
    sources: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return LAYOUTS[self.layout].num_bytes(self.rows, self.columns)


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and where its data begins: bytes from the start of the file."""

    tensor: Tensor
    offset: int


@dataclass(frozen=True)
class WeightsFile:
    """The header of a weights file. placed: name -> tensor and place; size: bytes of the whole file."""

    header: bytes
    placed: dict[str, PlacedTensor]
    size: int


def lay_out(tensors: list[Tensor]) -> WeightsFile:
    """Decides where each tensor goes, large ones on 64 KiB and small ones on 64 bytes, and makes the header."""
    entries: dict[str, dict[str, object]] = {}
    relative: dict[str, int] = {}
    position = 0

    def append(name: str, size: int) -> None:
        nonlocal position
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size

    for tensor in tensors:
        alignment = LARGE_TENSOR if tensor.num_bytes >= LARGE_TENSOR else SMALL_ALIGNMENT
        if gap := round_up(position, alignment) - position:
            append(f".pad.{len(entries)}", gap)
        relative[tensor.name] = position
        append(tensor.name, tensor.num_bytes)
    if gap := round_up(position, PAGE) - position:
        append(f".pad.{len(entries)}", gap)

    meanings = {t.name: {"layout": t.layout, "shape": [t.rows, t.columns], "sources": list(t.sources)} for t in tensors}
    document = {
        "__metadata__": {"format": "enginery", "tensors": json.dumps(meanings, separators=(",", ":"))},
        **entries,
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    # Data begins on 64 KiB of the file, so that what is aligned in the data is aligned in a mapping.
    start = round_up(8 + len(text), LARGE_TENSOR if position >= LARGE_TENSOR else PAGE)
    text += b" " * (start - 8 - len(text))
    placed = {t.name: PlacedTensor(t, start + relative[t.name]) for t in tensors}
    return WeightsFile(len(text).to_bytes(8, "little") + text, placed, start + position)


def read_weights_header(path: Path) -> WeightsFile:
    """The header of the weights file at `path`, every offset checked. Raises EngineFormatError."""
    size = require_regular(path, "the weights file")
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(LARGEST_HEADER, size - 8):
            raise EngineFormatError(
                f"{path}: header of {length} bytes in a file of {size}. The file is truncated or damaged: "
                f"copy or build it again."
            )
        header = file.read(length)
    try:
        document = json.loads(header)
        meanings = json.loads(document["__metadata__"]["tensors"])
    except (ValueError, RecursionError, KeyError, TypeError):
        raise EngineFormatError(
            f"{path}: its header is not that of an enginery weights file. Copy or build it again."
        ) from None
    entries, described = Fields.of(document, path.name), Fields.of(meanings, f"{path.name}.__metadata__.tensors")
    placed, spans = {}, []
    for name in entries.values:
        if name == "__metadata__":
            continue
        begin, end = _read_span(entries.map(name), 8 + length, size)
        spans.append((begin, end))
        if not name.startswith(".pad."):
            placed[name] = PlacedTensor(_read_tensor(name, described, end - begin), begin)
    _require_tiling(spans, 8 + length, size, path)
    return WeightsFile(prefix + header, placed, size)


def _read_span(entry: Fields, start: int, size: int) -> tuple[int, int]:
    offsets = entry.only("dtype", "shape", "data_offsets").items("data_offsets", _read_offset, most=2)
    if entry.get("dtype") != "U8" or len(offsets) != 2 or offsets[0] > offsets[1] or start + offsets[1] > size:
        raise EngineFormatError(
            f"{entry.where}: bytes {offsets} lie outside the file of {size} bytes, or are no U8 tensor."
        )
    return start + offsets[0], start + offsets[1]


def _read_offset(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise EngineFormatError(f"{where}: wanted an offset.")
    return value


def _read_tensor(name: str, described: Fields, num_bytes: int) -> Tensor:
    meaning = described.map(name).only("layout", "shape", "sources")
    shape = meaning.items("shape", _read_offset, most=2)
    layout = meaning.text("layout")
    if layout not in LAYOUTS:
        raise EngineFormatError(f"{meaning.where}: layout {layout!r} is not known to this runtime. Upgrade enginery.")
    if len(shape) != 2 or LAYOUTS[layout].num_bytes(*shape) != num_bytes:
        raise EngineFormatError(f"{meaning.where}: shape {shape} in layout {layout} does not make {num_bytes} bytes.")
    sources = meaning.items("sources", lambda value, where: str(value)[:512])
    return Tensor(name, layout, shape[0], shape[1], tuple(sources))


def _require_tiling(spans: list[tuple[int, int]], start: int, size: int, path: Path) -> None:
    position = start
    for begin, end in sorted(spans):
        if begin != position:
            raise EngineFormatError(f"{path}: tensors overlap or leave a hole at byte {begin}. Copy or build it again.")
        position = end
    if position != size:
        raise EngineFormatError(
            f"{path}: {size} bytes, but its tensors end at byte {position}. Copy or build it again."
        )
