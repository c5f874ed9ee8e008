"""Making a calibration file: checkpoint and text to statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError, CompileError
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.source import find_checkpoint
from ..checkpoint.tensors import open_checkpoint
from ..documents import check_documents
from ..models import read_config
from .defaults import DEFAULT_TOKENS, SEQUENCE_LENGTH
from .file import Origin, write_calibration
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
    if output.is_dir() or (output.exists() and not request.force):
        if output.is_dir():
            raise CompileError(f"{output}: is a directory. Choose another place for the file.")
        raise CompileError(f"{output}: exists. Choose another file, or replace it with --force.")
    source = find_checkpoint(request.model)
    config = read_config(source.directory)
    check_documents(source)
    length = min(SEQUENCE_LENGTH, config.max_model_len)
    sequences, text = read_sequences(request.text, source.directory, request.tokens, length)
    if (largest := max(map(max, sequences))) >= config.vocab_size:
        raise CheckpointError(
            f"{source.directory}: tokenizer.json has token {largest}, config.json a vocab_size of {config.vocab_size}. "
            f"They are not of one model: download both again."
        )
    with open_checkpoint(source.directory) as checkpoint:
        statistics = gather_statistics(checkpoint, config, sequences, progress)
        origin = Origin(fingerprint(checkpoint), text, request.tokens, length)
    write_calibration(output, statistics, origin)
    return output
