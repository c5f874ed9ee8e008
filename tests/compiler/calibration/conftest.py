"""A tiny checkpoint, a text, and what it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from enginery.compiler.calibration.calibrate import CalibrationRequest, calibrate

from ...tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("llama-biases", directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters in no order: 2,000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 2000))))
    return path


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration file of `checkpoint`."""
    return calibrate(CalibrationRequest(str(checkpoint), text, tmp_path_factory.mktemp("file") / "c", 1000))
