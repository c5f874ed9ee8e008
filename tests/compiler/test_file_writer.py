"""The writer of large files: what was appended lies where it belongs, and is hashed as it lies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import pytest
from enginery.compiler import file_writer
from enginery.compiler.file_writer import FileWriter
from enginery.engines import manifest
from hypothesis import given
from hypothesis import strategies as st

SLAB, CHUNK = 64, 100


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_writer, "_SLAB_BYTES", SLAB)
        patch.setattr(file_writer, "CHUNK_BYTES", CHUNK)
        patch.setattr(manifest, "_ZEROS", bytes(16))
        yield


@given(pieces=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 300)), max_size=8), rest=st.integers(0, 200))
def test_pieces_and_gaps(pieces: list[tuple[int, int]], rest: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pieces of every size behind gaps of every size, over the borders of slabs and chunks."""
    path, wanted = tmp_path_factory.mktemp("file") / "file", bytearray()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with FileWriter(descriptor) as file:
        for index, (gap, size) in enumerate(pieces):
            data = np.full(size, index + 1, np.uint8)
            wanted += bytes(gap) + data.tobytes()
            file.append(data.data, len(wanted) - size)
            data[:] = 0xEE  # what was appended is the writer's own
        wanted += bytes(rest)
        whole, chunks = file.finish(len(wanted))
    os.close(descriptor)
    assert path.read_bytes() == wanted
    assert whole == hashlib.sha256(wanted).hexdigest()
    parts = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)] or [b""]
    assert chunks == tuple(hashlib.sha256(part).hexdigest() for part in parts)


def test_what_writing_raises_is_raised() -> None:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    with FileWriter(descriptor) as file, pytest.raises(OSError, match="Bad file descriptor"):
        file.finish(10 * SLAB)
    os.close(descriptor)
