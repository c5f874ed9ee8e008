"""The calibration file: safetensors of statistics, which do not depend on the precision that is built with them.

Of each activation NAME (Statistics): `NAME.absmax` F32 [K] and `NAME.moments` F32 [ceil(K / 128), 128, 128]. Metadata:
format, version, checkpoint (fingerprint), text (sha256), tokens, sequence_length, and `inputs`, JSON: the tensors that
each activation is multiplied by.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import CheckpointError, CompileError, faults
from ...engines.layouts import round_up
from ...plugins.linear.quantize_int4 import BLOCK
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.tensors import Checkpoint, StoredTensor, read_header
from ..checkpoint.weights import Weight
from .statistics import Statistics

FORMAT = "enginery-calibration"
VERSION = 0
_REMEDY = "Make one: enginery calibrate MODEL --text TEXT -o FILE"
_ALIGNMENT = 64


@dataclass(frozen=True)
class Origin:
    """Where statistics come from. checkpoint: its fingerprint; text: its sha256."""

    checkpoint: str
    text: str
    tokens: int
    sequence_length: int


def write_calibration(path: Path, statistics: Sequence[Statistics], origin: Origin) -> None:
    """Writes the file beside itself, then renames it. Raises CompileError where it cannot be written."""
    arrays = {}
    for entry in statistics:
        arrays[f"{entry.tensors[0]}.absmax"] = entry.absmax
        arrays[f"{entry.tensors[0]}.moments"] = entry.moments
    partial = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(_header(arrays, statistics, origin))
                for array in arrays.values():
                    file.write(np.ascontiguousarray(array, "<f4").data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CompileError(
            f"{path}: cannot be written: {error}. Choose another place, or free some space. Nothing was left behind."
        ) from None


def _header(arrays: dict[str, NDArray[np.float32]], statistics: Sequence[Statistics], origin: Origin) -> bytes:
    metadata = {"format": FORMAT, "version": str(VERSION), **{k: str(v) for k, v in asdict(origin).items()}}
    metadata["inputs"] = json.dumps({entry.tensors[0]: entry.tensors for entry in statistics})
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in arrays.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (round_up(8 + len(text), _ALIGNMENT) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


class Calibration:
    """A calibration file of the checkpoint that is built, asked by weight. sha256: of the file."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], inputs: dict[str, str], sha256: str) -> None:
        self.path, self.sha256 = path, sha256
        self._tensors, self._inputs = tensors, inputs

    def require(self, weights: Sequence[Weight]) -> None:
        """Raises CompileError unless the file knows the inputs of all `weights`."""
        tensors = [weight.parts[0].tensor for weight in weights]
        reasons = [f"nothing of the input of {tensor}" for tensor in tensors if tensor not in self._inputs]
        if reasons:
            reasons[-1] += f". {_REMEDY}"
            raise faults(CompileError, f"--calibration {self.path}: does not fit the checkpoint", reasons)

    def absmax(self, weight: Weight) -> NDArray[np.float32]:
        """[K]: the greatest magnitude of each input of `weight`, before its factors."""
        start, stop = weight.parts[0].columns
        return self._read(weight, "absmax")[start:stop]

    def mean_squares(self, weight: Weight) -> NDArray[np.float32]:
        """[K]: the mean square of each input of `weight`, before its factors."""
        diagonal: NDArray[np.float32] = np.einsum("bii->bi", self._read(weight, "moments")).reshape(-1)
        start, stop = weight.parts[0].columns
        return diagonal[start:stop]

    def moments(self, weight: Weight) -> NDArray[np.float32]:
        """[ceil(K / 128), 128, 128]: the blocks of E[x xᵀ] of the inputs of `weight`, divided by its factors."""
        start, stop = weight.parts[0].columns
        blocks = _cut(self._read(weight, "moments"), start, stop)
        if weight.column_factors is None:
            return blocks
        factors = np.ones(blocks.shape[:2], np.float32)
        factors.reshape(-1)[: stop - start] = weight.column_factors.values
        return blocks / factors[:, :, None] / factors[:, None]

    def _read(self, weight: Weight, kind: str) -> NDArray[np.float32]:
        tensor = self._tensors[f"{self._inputs[weight.parts[0].tensor]}.{kind}"]
        values = np.fromfile(tensor.path, "<f4", int(np.prod(tensor.shape)), offset=tensor.offset)
        if not np.isfinite(values).all():
            raise CompileError(f"{self.path}: {tensor.name} holds what is no finite number: it is damaged. {_REMEDY}")
        return values.astype(np.float32).reshape(tensor.shape)


def _cut(blocks: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    """The blocks of columns [start, stop), which begin at `start`; what no old block holds is 0."""
    count = -(-(stop - start) // BLOCK)
    new = np.zeros((count, BLOCK, BLOCK), np.float32)
    for index in range(count):
        first, last = start + index * BLOCK, min(start + (index + 1) * BLOCK, stop)
        for block in range(first // BLOCK, -(-last // BLOCK)):
            low, high = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
            here, there = slice(low - first, high - first), slice(low - block * BLOCK, high - block * BLOCK)
            new[index, here, here] = blocks[block, there, there]
    return new


def read_calibration(path: Path, checkpoint: Checkpoint) -> Calibration:
    """Opens the file at `path`, which must be of `checkpoint`. Raises CompileError with what is wrong."""
    try:
        if not path.is_file():
            raise CompileError(f"--calibration {path}: no such file. {_REMEDY}")
        metadata, stored = read_header(path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CompileError(f"--calibration {path}: cannot be read: {error}. {_REMEDY}") from None
    except CheckpointError as error:
        raise CompileError(f"--calibration {path}: no calibration file, or damaged: {error} {_REMEDY}") from None
    if metadata.get("format") != FORMAT:
        raise CompileError(
            f"--calibration {path}: wanted a calibration file, got safetensors of the format "
            f"{metadata.get('format')!r:.40}. {_REMEDY}"
        )
    if not (version := str(metadata.get("version"))).isdecimal() or int(version) > VERSION:
        raise CompileError(
            f"--calibration {path}: version {version:.20}; this release reads versions up to {VERSION}. "
            f"Make it again with this release, or upgrade enginery."
        )
    wanted, got = fingerprint(checkpoint), str(metadata.get("checkpoint"))
    if got != wanted:
        raise CompileError(
            f"--calibration {path}: made from another checkpoint: wanted fingerprint {wanted[:16]}… "
            f"({checkpoint.directory}), got {got[:16]}…. Make one from this: enginery calibrate "
            f"{checkpoint.directory} --text TEXT -o FILE"
        )
    tensors = {tensor.name: tensor for tensor in stored}
    inputs = _read_inputs(path, metadata, tensors, checkpoint)
    return Calibration(path, tensors, inputs, sha256)


def _read_inputs(
    path: Path, metadata: dict[str, Any], tensors: dict[str, StoredTensor], checkpoint: Checkpoint
) -> dict[str, str]:
    """Tensor of the checkpoint -> the activation that it is multiplied by. Raises CompileError with all faults."""
    try:
        named = {str(name): [str(tensor) for tensor in many] for name, many in json.loads(metadata["inputs"]).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CompileError(f"--calibration {path}: its field 'inputs' is damaged. {_REMEDY}") from None
    reasons = []
    for name, many in named.items():
        for columns in sorted({checkpoint.tensors[each].shape[-1] for each in many if each in checkpoint.tensors}):
            shapes = {"absmax": (columns,), "moments": (-(-columns // BLOCK), BLOCK, BLOCK)}
            for kind, shape in shapes.items():
                tensor = tensors.get(f"{name}.{kind}")
                if tensor is None or tensor.shape != shape or tensor.dtype != "F32":
                    got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                    reasons.append(f"{name}.{kind}: wanted F32 {list(shape)}, got {got}")
    if reasons:
        reasons[-1] += f". {_REMEDY}"
        raise faults(CompileError, f"--calibration {path}: does not fit the checkpoint", reasons)
    return {tensor: name for name, many in named.items() for tensor in many}
