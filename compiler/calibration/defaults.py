"""What calibration looks at, unless it is told otherwise: sequences from the start of the text."""

from __future__ import annotations

SEQUENCE_LENGTH = 512
DEFAULT_TOKENS = 64 * SEQUENCE_LENGTH
FEW_TOKENS = 1024
