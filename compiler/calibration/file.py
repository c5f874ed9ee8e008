"""The calibration file: safetensors of statistics, which do not depend on the precision that is built with them.

Of each activation NAME (Statistics): `NAME.absmax` F32 [K], `NAME.moments` F32 [ceil(K / 128), 128, 128] and
`NAME.samples` F32 [1 … 64, K]. Metadata: format, version, checkpoint (fingerprint), text (sha256), tokens,
sequence_length, data (sha256 of all that follows the header), and `inputs`, JSON: the tensors that each activation is
multiplied by.
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
from .statistics import MOST_SAMPLES, Statistics

FORMAT = "enginery-calibration"
VERSION = 1
_REMEDY = "Make one: enginery calibrate MODEL --text TEXT -o FILE"
_ALIGNMENT = 64
# So many tokens make half of what two channels have to do with each other believable.
_CHANCE_TOKENS = 4 * BLOCK


@dataclass(frozen=True)
class Origin:
    """Where statistics come from. checkpoint: its fingerprint; text: its sha256."""

    checkpoint: str
    text: str
    tokens: int
    sequence_length: int


def write_calibration(path: Path, statistics: Sequence[Statistics], origin: Origin) -> None:
    """Writes the file. Raises OSError."""
    arrays = {}
    for entry in statistics:
        for kind in ("absmax", "moments", "samples"):
            arrays[f"{entry.tensors[0]}.{kind}"] = np.ascontiguousarray(getattr(entry, kind), "<f4")
    with open(path, "wb") as file:
        file.write(_header(arrays, statistics, origin))
        for array in arrays.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _header(arrays: dict[str, NDArray[np.float32]], statistics: Sequence[Statistics], origin: Origin) -> bytes:
    metadata = {"format": FORMAT, "version": str(VERSION), **{k: str(v) for k, v in asdict(origin).items()}}
    data = hashlib.sha256()
    for array in arrays.values():
        data.update(array.data)
    metadata["data"] = data.hexdigest()
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

    def __init__(
        self, path: Path, stored: dict[str, StoredTensor], inputs: dict[str, str], tokens: int, sha256: str
    ) -> None:
        self.path, self.sha256 = path, sha256
        self._stored, self._inputs, self._tokens = stored, inputs, tokens

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

    def samples(self, weight: Weight) -> NDArray[np.float32]:
        """[1 … 64, K]: some inputs of `weight`, before its factors."""
        start, stop = weight.parts[0].columns
        return self._read(weight, "samples")[:, start:stop]

    def moments(self, weight: Weight) -> NDArray[np.float32]:
        """[ceil(K / 128), 128, 128]: the blocks of E[x xᵀ] of the inputs of `weight`, divided by its factors."""
        start, stop = weight.parts[0].columns
        blocks = _cut(self._read(weight, "moments"), start, stop)
        if weight.column_factors is None:
            return blocks
        factors = np.ones(blocks.shape[:2], np.float32)
        factors.reshape(-1)[: stop - start] = weight.column_factors.values
        return blocks / factors[:, :, None] / factors[:, None]

    def likely_moments(self, weight: Weight) -> NDArray[np.float32]:
        """Those of other texts: beside the diagonals less, the fewer tokens were seen, as chance makes much of it."""
        shares = np.full((BLOCK, BLOCK), self._tokens / (self._tokens + _CHANCE_TOKENS), np.float32)
        np.fill_diagonal(shares, 1)
        return self.moments(weight) * shares

    def _read(self, weight: Weight, kind: str) -> NDArray[np.float32]:
        tensor = self._stored[f"{self._inputs[weight.parts[0].tensor]}.{kind}"]
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


def is_calibration(path: Path) -> bool:
    """True for a file of this format, of any version; one that is truncated is none."""
    try:
        return path.is_file() and not path.is_symlink() and read_header(path)[0].get("format") == FORMAT
    except (OSError, CheckpointError):
        return False


def read_calibration(path: Path, checkpoint: Checkpoint) -> Calibration:
    """Opens the file at `path`, which must be of `checkpoint`. Raises CompileError with what is wrong."""
    try:
        if not path.is_file():
            got = "not a file" if path.exists() else "no such file"
            raise CompileError(f"--calibration {path}: {got}. {_REMEDY}")
        metadata, stored = read_header(path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            data = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CompileError(f"--calibration {path}: cannot be read: {error}. {_REMEDY}") from None
    except CheckpointError as error:
        reason = str(error).removesuffix(" Download it again.")
        raise CompileError(f"--calibration {path}: no calibration file, or damaged: {reason} {_REMEDY}") from None
    if metadata.get("format") != FORMAT:
        raise CompileError(
            f"--calibration {path}: wanted a calibration file, got safetensors of the format "
            f"{metadata.get('format')!r:.40}. {_REMEDY}"
        )
    if (version := str(metadata.get("version"))) != str(VERSION):
        raise CompileError(
            f"--calibration {path}: version {version:.20}; this release reads version {VERSION}. "
            f"Make it again with this release: enginery calibrate MODEL --text TEXT -o FILE"
        )
    if data != metadata.get("data"):
        raise CompileError(
            f"--calibration {path}: damaged: wanted data of sha256 {metadata.get('data')!s:.16}…, got {data:.16}…. "
            f"{_REMEDY}"
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
    if not 0 < len(tokens := str(metadata.get("tokens"))) < 16 or not tokens.isdecimal():
        raise CompileError(f"--calibration {path}: its field 'tokens' is damaged: wanted a number. {_REMEDY}")
    return Calibration(path, tensors, inputs, int(tokens), sha256)


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
            samples = tensors.get(f"{name}.samples")
            shapes["samples"] = (min(max(1, *samples.shape[:1]), MOST_SAMPLES) if samples else 1, columns)
            for kind, shape in shapes.items():
                tensor = tensors.get(f"{name}.{kind}")
                if tensor is None or tensor.shape != shape or tensor.dtype != "F32":
                    got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                    reasons.append(f"{name}.{kind}: wanted F32 {list(shape)}, got {got}")
    if reasons:
        reasons[-1] += f". {_REMEDY}"
        raise faults(CompileError, f"--calibration {path}: does not fit the checkpoint", reasons)
    return {tensor: name for name, many in named.items() for tensor in many}
