"""Writing a rank's weights: rows of the checkpoint are read, packed and written a few megabytes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import CheckpointError
from ..engines.layouts import LAYOUTS, ROW_PADDING, WITH_SUMS, round_up
from ..engines.manifest import FileEntry
from ..engines.weights import WeightsFile, lay_out
from ..plugins.linear.layouts import interleave_gated, interleave_rows
from ..plugins.linear.quantize_int4 import find_feedback
from .calibration.file import Calibration
from .checkpoint.tensors import ELEMENT_BYTES
from .checkpoint.weights import Weight
from .file_writer import FileWriter
from .lower.tensors import Job, TensorJobs
from .pack import PackRows, find_packer
from .pack_gptq import ROWS_AT_A_TIME, gptq_packer

# Source bytes of one step: what a core's cache holds, so that packing finds there what was read.
_CHUNK_BYTES = 1 << 20

Progress = Callable[[int], None]


def weights_layout(jobs: TensorJobs) -> WeightsFile:
    """Where every tensor will stand: the header and the file's size, before anything is read."""
    return lay_out([job.tensor for job in jobs.jobs.values()])


def write_weights(
    path: Path,
    jobs: TensorJobs,
    rank: int,
    num_threads: int,
    progress: Progress,
    calibration: Calibration | None = None,
) -> FileEntry:
    """Writes the weights file of a rank, hashing it on the way; `progress` is told of bytes as they are written.

    calibration: by which weights of four bits are quantized.

    Raises CheckpointError where a value is not finite, OSError where the disk refuses.
    """
    layout = weights_layout(jobs)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with FileWriter(descriptor) as file:
            file.append(memoryview(layout.header), 0)
            packer = _Packer(file, layout, num_threads, progress, calibration)
            for job in jobs.jobs.values():
                packer.write(job)
            whole, chunks = file.finish(layout.size)
    finally:
        os.close(descriptor)
    return FileEntry("weights", "safetensors", layout.size, whole, chunks, rank)


@dataclass(frozen=True)
class Beside:
    """What lies beside a matrix, row by row; groups: how many elements of scales and zeros a row has."""

    groups: int
    scale: NDArray[np.float32] | NDArray[np.uint16] | None = None
    sum: NDArray[np.int32] | None = None
    zero: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, name: str, rows: int, columns: int) -> Beside:
        """Zeros for a matrix of the layout `name`."""
        layout = LAYOUTS[name]
        groups = layout.num_groups(columns)
        scale: NDArray[Any] = np.zeros(rows * groups, np.uint16 if layout.group else np.float32)
        return cls(
            groups,
            scale if layout.scaled else None,
            np.zeros(rows, np.int32) if name in WITH_SUMS else None,
            np.zeros(rows * groups, np.uint8) if layout.zeros else None,
        )

    def from_row(self, row: int) -> tuple[NDArray[Any] | None, NDArray[Any] | None, NDArray[Any] | None]:
        """scale, sum and zero from `row` on, a multiple of 16 where there are panels."""
        at = row * self.groups
        return (
            None if self.scale is None else self.scale[at:],
            None if self.sum is None else self.sum[row:],
            None if self.zero is None else self.zero[at:],
        )

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Those that there are, by what is appended to the matrix's name, in the order of the file."""
        for name, array in (("scale", self.scale), ("zero", self.zero), ("sum", self.sum)):
            if array is not None:
                yield name, array


class _Packer:
    """Packs one tensor after the other into a file."""

    def __init__(
        self,
        file: FileWriter,
        layout: WeightsFile,
        num_threads: int,
        progress: Progress,
        calibration: Calibration | None,
    ) -> None:
        self._file, self._layout, self._num_threads, self._progress = file, layout, num_threads, progress
        self._nearest, self._calibration = find_packer(), calibration
        self._source, self._packed = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def write(self, job: Job) -> None:
        name = job.tensor.name
        if job.source is None:
            return  # a scale or a sum: written with its matrix
        if isinstance(job.source, np.ndarray):
            self._put(name, np.ascontiguousarray(job.source, np.float32))
        elif job.source.vector:
            self._put(name, _vector(job, job.source))
        else:
            self._matrix(job, job.source)

    def _matrix(self, job: Job, weight: Weight) -> None:
        tensor, layout = job.tensor, LAYOUTS[job.tensor.layout]
        halves = _halves(weight) if job.gated else [weight]
        count, columns = halves[0].num_rows, weight.num_columns
        source_row = columns * ELEMENT_BYTES[weight.dtype]
        row_bytes = layout.row_bytes(columns)
        total = round_up(tensor.rows, layout.row_padding)
        step = max(round_up(_CHUNK_BYTES // max(source_row, 1), ROW_PADDING), ROW_PADDING)
        pack_rows = self._nearest
        if self._calibration is not None and layout.group:
            pack_rows = gptq_packer(find_feedback(self._calibration.likely_moments(weight)))
            step = max(step, ROWS_AT_A_TIME * self._num_threads)
        if len(self._source) < step * source_row:
            self._source = np.empty(step * source_row, np.uint8)
        beside = Beside.of(tensor.layout, total, columns)
        offset = self._layout.placed[tensor.name].offset
        for start in range(0, count, step):
            stop = min(start + step, count)
            first, last = start * len(halves), total if stop == count else stop * len(halves)
            out = self._buffer((last - first) * row_bytes)
            if stop == count and not layout.panels:
                out[(stop - start) * len(halves) * row_bytes :] = 0
            for index, half in enumerate(halves):
                self._pack(pack_rows, half, (start, stop), job, out, first, index, beside)
            self._append(out.data, offset + first * row_bytes)
        for name, array in beside.arrays():
            self._put(f"{tensor.name}.{name}", array)

    def _pack(
        self,
        pack_rows: PackRows,
        weight: Weight,
        rows: tuple[int, int],
        job: Job,
        out: NDArray[np.uint8],
        first: int,
        half: int,
        beside: Beside,
    ) -> None:
        """Rows [start, stop) of `weight` into `out`, whose first row is the tensor's row `first`."""
        tensor, layout = job.tensor, LAYOUTS[job.tensor.layout]
        start, stop = rows
        skipped = half * (ROW_PADDING if layout.panels else 1)
        row_bytes = layout.row_bytes(tensor.columns)
        if weight.stored_as_is:
            source, dtype, add = weight.read(start, stop, self._source), weight.dtype.lower(), weight.add
        else:
            source, dtype, add = weight.values(start, stop).view(np.uint8), "f32", 0.0
        bad = pack_rows(
            source,
            dtype,
            stop - start,
            tensor.columns,
            tensor.layout,
            out[skipped * row_bytes :],
            *beside.from_row(first + skipped),
            add=add,
            stride=2 if job.gated else 1,
            num_threads=self._num_threads,
        )
        if bad >= 0:
            raise _non_finite(weight, start + bad // tensor.columns, bad % tensor.columns, tensor.layout)

    def _put(self, name: str, array: NDArray[Any]) -> None:
        self._append(array.view(np.uint8).data, self._layout.placed[name].offset)

    def _append(self, data: memoryview, offset: int) -> None:
        """Tensors come in the order of the file."""
        self._file.append(data, offset)
        self._progress(data.nbytes)

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        if len(self._packed) < size:
            self._packed = np.empty(size, np.uint8)
        return self._packed[:size]


def _halves(weight: Weight) -> list[Weight]:
    """Gate and up of a gated weight."""
    middle = weight.num_rows // 2
    return [weight.take_rows(0, middle), weight.take_rows(middle, weight.num_rows)]


def _vector(job: Job, weight: Weight) -> NDArray[np.float32]:
    values, layout = weight.numpy(), LAYOUTS[job.tensor.layout]
    if not np.isfinite(values).all():
        raise _non_finite(weight, int(np.argmin(np.isfinite(values))), 0, job.tensor.layout)
    if job.gated:
        middle = len(values) // 2
        interleave = interleave_gated if layout.panels else interleave_rows
        values = interleave(values[:middle], values[middle:])
    return np.pad(values, (0, round_up(len(values), layout.row_padding) - len(values)))


def _non_finite(weight: Weight, row: int, column: int, layout: str) -> CheckpointError:
    part = weight.take_rows(row, row + 1).parts[0]
    place = f"[{part.rows[0]}]" if weight.vector else f"[{part.rows[0]}, {part.columns[0] + column}]"
    return CheckpointError(
        f"{weight.checkpoint.directory}: {part.tensor}{place} is not a finite number (or not one in {layout}). "
        f"The checkpoint is damaged: download it again, or export it again."
    )
