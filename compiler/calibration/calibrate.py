"""Making a calibration file: checkpoint and text to statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError, CompileError
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.source import find_checkpoint
from ..checkpoint.tensors import open_checkpoint
from ..documents import check_documents
from ..models import read_config
from .defaults import DEFAULT_TOKENS, SEQUENCE_LENGTH
from .file import Origin, is_calibration, write_calibration
from .gather import gather_statistics
from .text import read_sequences


@dataclass(frozen=True)
class CalibrationRequest:
    """What `enginery calibrate` was asked for. tokens: of the text, from its start."""

    model: str
    text: Path
    output: Path
    tokens: int = DEFAULT_TOKENS
    force: bool = False


def calibrate(request: CalibrationRequest, progress: Callable[[int], None] = lambda count: None) -> Path:
    """Writes the calibration file and returns its path; `progress` is told of tokens.

    Raises CheckpointError or CompileError.
    """
    output = request.output
    _require_place(output, request.force)
    source = find_checkpoint(request.model)
    config = read_config(source.directory)
    check_documents(source)
    partial = output.parent / f".{output.name}.partial"
    with _told_of(output):  # now, as the text takes its time
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"")
    try:
        length = min(SEQUENCE_LENGTH, config.max_model_len)
        sequences, text = read_sequences(request.text, source.directory, request.tokens, length)
        if (largest := max(map(max, sequences))) >= config.vocab_size:
            raise CheckpointError(
                f"{source.directory}: tokenizer.json has token {largest}, config.json a vocab_size of "
                f"{config.vocab_size}. They are not of one model: download both again."
            )
        tokens = sum(map(len, sequences))
        with open_checkpoint(source.directory) as checkpoint:
            statistics = gather_statistics(checkpoint, config, sequences, progress)
            origin = Origin(fingerprint(checkpoint), text, tokens, length)
        with _told_of(output):
            write_calibration(partial, statistics, origin)
            _require_place(output, request.force)  # again: what came meanwhile is not ours to replace
            os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def _require_place(output: Path, force: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if output.is_dir():
        raise CompileError(f"{output}: is a directory. Choose another place for the file.")
    if not force:
        raise CompileError(f"{output}: exists. Choose another file, or replace it with --force.")
    if not is_calibration(output):
        raise CompileError(
            f"{output}: is no calibration file, so --force does not replace it. Remove it, or choose another place."
        )


@contextmanager
def _told_of(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompileError(
            f"{output}: cannot be written: {error}. Choose another place, or free some space. Nothing was left behind."
        ) from None
