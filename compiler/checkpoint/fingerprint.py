"""Telling checkpoints apart without reading all of them."""

from __future__ import annotations

import hashlib

import numpy as np

from .tensors import ELEMENT_BYTES, Checkpoint

_SAMPLE_BYTES = 64 << 10


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 in hex of config.json, and of each tensor's name, type, shape and first 64 KiB.

    Training changes every tensor that it changes at all nearly everywhere, so that a sample tells.
    """
    digest = hashlib.sha256((checkpoint.directory / "config.json").read_bytes())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        if tensor.dtype not in ELEMENT_BYTES or not 1 <= len(tensor.shape) <= 2 or 0 in tensor.shape:
            continue  # no product reads it
        columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
        row_bytes = columns * ELEMENT_BYTES[tensor.dtype]
        rows = min(tensor.shape[0], max(_SAMPLE_BYTES // row_bytes, 1))
        sample = np.empty((rows, row_bytes), np.uint8)
        checkpoint.read(name, (0, rows), (0, columns), sample)
        digest.update(sample.data)
    return digest.hexdigest()
