"""These tests run in a process of their own (`make test`): one process cannot both interpret and compile kernels."""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason='the GPU kernels need Triton: pip install "enginery[cuda]"')

from .interpreter import follow, repair

repair()
follow()
