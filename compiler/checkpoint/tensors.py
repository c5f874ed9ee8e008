"""The tensors of a checkpoint: safetensors headers read at once, data read by rows with pread when asked for.

Nothing is memory-mapped, so reading a model larger than memory leaves no pages behind in the process.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import CheckpointError, faults

ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_LARGEST_HEADER = 256 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint. dtype: "F32", "BF16", "F16" (others are refused when used); offset: in its file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The safetensors files of a directory, by tensor name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = {tensor.name: tensor for path in _weight_files(directory) for tensor in read_header(path)[1]}
        self._descriptors: dict[Path, int] = {}

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int], out: NDArray[np.uint8]) -> None:
        """Raw bytes of a 2-D tensor (a vector is one column) into `out` [rows, columns · element]."""
        tensor = self.tensors[name]
        width = tensor.shape[1] if len(tensor.shape) > 1 else 1
        element = ELEMENT_BYTES[tensor.dtype]
        start = tensor.offset + rows[0] * width * element
        if columns == (0, width):
            self._read_into(tensor, out.data.cast("B"), start)
            return
        whole = np.empty((rows[1] - rows[0], width * element), np.uint8)
        self._read_into(tensor, whole.data.cast("B"), start)
        out[:] = whole[:, columns[0] * element : columns[1] * element]

    def _read_into(self, tensor: StoredTensor, view: memoryview, offset: int) -> None:
        if tensor.path not in self._descriptors:
            self._descriptors[tensor.path] = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptors[tensor.path], [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{tensor.path}: tensor {tensor.name} ends early. It is truncated: download it again."
                )
            done += count

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoint at `directory`, closed at the end. Raises CheckpointError."""
    checkpoint = Checkpoint(directory)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(map(Path, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{index}: wanted a JSON object with a weight_map. Download it again.") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise faults(
                CheckpointError, f"{directory}: shards are missing", [f"{name}: download it again" for name in missing]
            )
        return [directory / name for name in names]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if files := sorted(path for path in directory.glob("*.safetensors") if path.is_file()):
        return files
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        raise CheckpointError(
            f"{directory}: its weights are pickles ({', '.join(pickles[:3])}), which can run code when read. Convert "
            f'them to safetensors first: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\" "
            f"(and copy the tokenizer's files beside them)"
        )
    raise CheckpointError(f"{directory}: no *.safetensors file. Wanted model.safetensors, or shards with their index.")


def read_header(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The metadata and the tensors of a safetensors file, which lie within it. Raises CheckpointError."""
    size = path.stat().st_size
    damaged = f"{path}: truncated or damaged: {{}}. Download it again."
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(damaged.format(f"its header should have {length} bytes, the file has {size}"))
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop("__metadata__", None) or {})
        placed = [_read_entry(name, path, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(damaged.format("its header is no safetensors header")) from None
    for tensor, end in placed:
        wanted = math.prod(tensor.shape) * ELEMENT_BYTES.get(tensor.dtype, 0)
        if end > size:
            raise CheckpointError(damaged.format(f"{tensor.name} should end at byte {end}, the file has {size}"))
        if wanted and end - tensor.offset != wanted:
            raise CheckpointError(
                damaged.format(f"{tensor.name} {list(tensor.shape)} {tensor.dtype} does not fit its bytes")
            )
    return metadata, [tensor for tensor, _ in placed]


def _read_entry(name: str, path: Path, entry: dict[str, Any], data: int) -> tuple[StoredTensor, int]:
    """A tensor, and where it ends in the file. Raises ValueError and what else an entry that is none raises."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(name)
    return StoredTensor(name, path, dtype, shape, data + begin), data + end


def widen(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Raw bytes [rows, columns · element] as float32 [rows, columns], exactly."""
    assert sys.byteorder == "little"
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
