"""manifest.json: what an engine is, and the size and sha256 of every other file in it. Written last."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import EngineFormatError
from .fields import LARGEST, Fields, describe
from .files import is_plain_name, read_bounded

FORMAT = "enginery-engine"
MANIFEST = "manifest.json"
VERSIONS = {"manifest": 0, "plan": 0, "weights": 0, "kernels": 0}
CHUNK_BYTES = 64 << 20
_BLOCK_BYTES = 2 << 20
_ZEROS = bytes(64 << 10)
# The chunks of 3 TB of weights, and the files of a thousand ranks.
LARGEST_MANIFEST_BYTES = 4 << 20
MOST_FILES = 4096
MOST_LAYER_PRECISIONS, LONGEST_LAYER_PRECISION = 1024, 256
ROLES = ("plan", "weights", "kernels", "config", "tokenizer", "template", "generation")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of an engine. sha256: of the whole file; chunks: of each 64 MiB, weights only; rank: -1 for none."""

    role: str
    format: str
    size: int
    sha256: str
    chunks: tuple[str, ...] = ()
    rank: int = -1


@dataclass(frozen=True)
class Model:
    """What was compiled. source: as the user named it; revision: of a hub checkpoint, else empty."""

    architecture: str
    source: str
    revision: str
    vocab_size: int
    max_model_len: int
    num_parameters: int


@dataclass(frozen=True)
class Manifest:
    """An engine at a glance.

    default_max_model_len  what `build-engine --max-model-len` chose
    batch_invariant        a token's result does not depend, bit for bit, on what else is in its step
    calibration            sha256 of the calibration file, empty without
    layer_precisions       what `build-engine --layer-precision` said, in its order
    """

    model: Model
    target: str
    precision: str
    kv_cache_dtype: str
    default_max_model_len: int
    tensor_parallel_size: int
    memory: dict[str, int]
    files: dict[str, FileEntry]
    batch_invariant: bool
    calibration: str = ""
    layer_precisions: tuple[str, ...] = ()

    def of_role(self, role: str, rank: int = -1) -> str | None:
        """Name of the file with this role (and rank), or None."""
        return next((name for name, file in self.files.items() if file.role == role and file.rank == rank), None)

    def total_bytes(self) -> int:
        """Size of the engine without its manifest."""
        return sum(file.size for file in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, stable byte for byte."""
    document = {
        "format": FORMAT,
        "versions": VERSIONS,
        "model": asdict(manifest.model),
        "target": manifest.target,
        "precision": manifest.precision,
        "kv_cache_dtype": manifest.kv_cache_dtype,
        "max_model_len": manifest.default_max_model_len,
        "batch_invariant": manifest.batch_invariant,
        "calibration": manifest.calibration,
        **({"layer_precisions": list(manifest.layer_precisions)} if manifest.layer_precisions else {}),
        "mesh": {
            "tensor_parallel_size": manifest.tensor_parallel_size,
            "ranks": [{"rank": rank, "tp": rank} for rank in range(manifest.tensor_parallel_size)],
        },
        "memory": manifest.memory,
        "files": {name: _encode_file(file) for name, file in sorted(manifest.files.items())},
    }
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _encode_file(file: FileEntry) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": file.role, "format": file.format}
    if file.rank >= 0:
        entry["rank"] = file.rank
    entry |= {"size": file.size, "sha256": file.sha256}
    if file.chunks:
        entry["chunks"] = list(file.chunks)
    return entry


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the engine at `directory`. Raises EngineFormatError."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise EngineFormatError(f"{directory}: {what}. Wanted an engine: a directory that build-engine has written.")
    path = directory / MANIFEST
    if not path.exists() and not path.is_symlink():
        raise EngineFormatError(
            f"{directory}: no {MANIFEST}, so this is no engine (or an interrupted build). "
            f"Make one: build-engine MODEL -o {directory}"
        )
    data = read_bounded(path, "the manifest", LARGEST_MANIFEST_BYTES)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EngineFormatError(f"{path}: not JSON: {str(error)[:200]}. Copy or build the engine again.") from None
    return _decode(Fields.of(document, MANIFEST))


def _decode(top: Fields) -> Manifest:
    if top.get("format") != FORMAT:
        raise EngineFormatError(f"{MANIFEST}: field 'format' must be {FORMAT!r}, got {describe(top.get('format'))}.")
    _check_versions(top.map("versions"))
    top.only(
        "format",
        "versions",
        "model",
        "target",
        "precision",
        "kv_cache_dtype",
        "max_model_len",
        "batch_invariant",
        "calibration",
        "layer_precisions",
        "mesh",
        "memory",
        "files",
    )
    model = top.map("model").only(*Model.__dataclass_fields__)
    mesh = top.map("mesh").only("tensor_parallel_size", "ranks")
    size = mesh.integer("tensor_parallel_size", 1, 1024)
    ranks = mesh.items("ranks", lambda value, where: Fields.of(value, where).only("rank", "tp").integer("rank"))
    if ranks != list(range(size)):
        raise EngineFormatError(f"{MANIFEST}.mesh: {size} ranks are announced, but {describe(ranks)} listed.")
    memory = top.map("memory")
    files = top.map("files")
    if len(files.values) > MOST_FILES:
        raise EngineFormatError(f"{MANIFEST}.files: {len(files.values)} files; at most {MOST_FILES} are allowed.")
    manifest = Manifest(
        model=Model(
            architecture=model.text("architecture"),
            source=model.text("source"),
            revision=model.text("revision"),
            vocab_size=model.integer("vocab_size", 1, 1 << 24),
            max_model_len=model.integer("max_model_len", 1, 1 << 31),
            num_parameters=model.integer("num_parameters"),
        ),
        target=top.text("target"),
        precision=top.text("precision"),
        kv_cache_dtype=top.text("kv_cache_dtype"),
        default_max_model_len=top.integer("max_model_len", 1, 1 << 31),
        tensor_parallel_size=size,
        memory={key: memory.integer(key) for key in memory.values},
        files={name: _decode_file(files, name) for name in files.values},
        batch_invariant=top.boolean("batch_invariant"),
        calibration=_read_calibration(top.text("calibration")),
        layer_precisions=_read_layers(top),
    )
    present = {(file.role, file.rank) for file in manifest.files.values()}
    wanted = [(role, rank) for rank in range(size) for role in ("plan", "weights")]
    missing = [f"{role} of rank {rank}" for role, rank in wanted if (role, rank) not in present]
    missing += [role for role in ("config", "tokenizer") if (role, -1) not in present]
    if missing:
        names = ", ".join(missing[:10])
        raise EngineFormatError(f"{MANIFEST}.files: nothing has the role {names}. Build the engine again.")
    return manifest


def _check_versions(versions: Fields) -> None:
    for section, newest in VERSIONS.items():
        if (version := versions.integer(section)) > newest:
            raise EngineFormatError(
                f"{MANIFEST}: {section} version {version} is newer than {newest}, the newest that this runtime reads. "
                f"Upgrade enginery, or build the engine with this release."
            )
    versions.only(*VERSIONS)


def _decode_file(files: Fields, name: str) -> FileEntry:
    if not is_plain_name(name) or name == MANIFEST:
        raise EngineFormatError(
            f"{MANIFEST}.files: {describe(name)} is no plain file name. This engine must not be trusted."
        )
    entry = files.map(name).only("role", "format", "rank", "size", "sha256", "chunks")
    size = entry.integer("size")
    chunks = entry.items("chunks", _read_sha256, most=1 << 22) if "chunks" in entry.values else []
    if chunks and len(chunks) != -(-size // CHUNK_BYTES):
        raise EngineFormatError(
            f"{entry.where}.chunks: wanted one sha256 for each 64 MiB of {size} bytes, got {len(chunks)}."
        )
    return FileEntry(
        role=entry.text("role", ROLES),
        format=entry.text("format"),
        size=size,
        sha256=_read_sha256(entry.get("sha256"), f"{entry.where}.sha256"),
        chunks=tuple(chunks),
        rank=entry.integer("rank", 0, 1023) if "rank" in entry.values else -1,
    )


def _read_layers(top: Fields) -> tuple[str, ...]:
    """Left out where there are none."""
    present = "layer_precisions" in top.values
    return tuple(top.items("layer_precisions", _read_text, most=MOST_LAYER_PRECISIONS)) if present else ()


def _read_text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_LAYER_PRECISION:
        raise EngineFormatError(f"{where}: wanted at most {LONGEST_LAYER_PRECISION} characters, got {describe(value)}.")
    return value


def _read_calibration(text: str) -> str:
    return text and _read_sha256(text, f"{MANIFEST}.calibration")


def _read_sha256(value: object, where: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise EngineFormatError(f"{where}: wanted a sha256 in hex, got {describe(value)}.")
    return value


def hash_file(path: Path, role: str, format: str, rank: int = -1) -> FileEntry:
    """The entry of a file as it is on disk now; chunks are hashed for weights."""
    whole, chunks, position = RunningHash(), RunningHash(CHUNK_BYTES), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            whole.update(block, position)
            if role == "weights":
                chunks.update(block, position)
            position += len(block)
    return FileEntry(role, format, position, whole.digests()[0], chunks.digests() if role == "weights" else (), rank)


class RunningHash:
    """sha256 of each `chunk_bytes` of a file that is written from front to back; what is left out is zeros."""

    def __init__(self, chunk_bytes: int = LARGEST) -> None:
        self._chunk_bytes, self._done, self._hashes = chunk_bytes, 0, [hashlib.sha256()]

    def update(self, data: bytes | memoryview, offset: int) -> None:
        """`data` is what the file holds from `offset` on, which must not lie before the end of what came last."""
        assert offset >= self._done
        while self._done < offset:
            self._append(memoryview(_ZEROS)[: offset - self._done])
        self._append(memoryview(data).cast("B"))

    def digests(self) -> tuple[str, ...]:
        """In hex, one for each chunk that has begun."""
        return tuple(each.hexdigest() for each in self._hashes)

    def _append(self, view: memoryview) -> None:
        while view:
            room = len(self._hashes) * self._chunk_bytes - self._done
            if room == 0:
                self._hashes.append(hashlib.sha256())
                continue
            self._hashes[-1].update(view[:room])
            self._done += min(room, len(view))
            view = view[room:]
