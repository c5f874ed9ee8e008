"""The files of an engine that is about to be used: every one there, of its size, and the small ones of their hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.documents import LARGEST_BYTES, parse_object, parse_text
from ..engines.errors import EngineFormatError, faults
from ..engines.files import read_bounded, require_regular
from ..engines.manifest import Manifest, read_manifest
from ..engines.plan_format import LARGEST_PLAN_BYTES

_REPAIR = "Copy or build the engine again"


@dataclass(frozen=True)
class EngineFiles:
    """An engine's directory whose manifest is sound and whose files all have the sizes it says."""

    directory: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where the file called `name` is."""
        return self.directory / name

    def read(self, name: str) -> bytes | None:
        """A file other than weights, hashed; None where the engine has none. Raises EngineFormatError."""
        entry = self.manifest.files.get(name)
        if entry is None:
            return None
        limit = LARGEST_PLAN_BYTES if entry.role in ("plan", "kernels") else LARGEST_BYTES.get(name, 1 << 20)
        data = read_bounded(self.path(name), f"the file {name}", limit)
        if len(data) != entry.size or (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            found = found if len(data) == entry.size else f"{len(data)} bytes"
            raise EngineFormatError(
                f"{self.path(name)}: damaged: the manifest says sha256 {entry.sha256}, found {found}. {_REPAIR}."
            )
        return data

    def read_text(self, name: str) -> str | None:
        """A text file, hashed; None where the engine has none. Raises EngineFormatError."""
        data = self.read(name)
        try:
            return None if data is None else parse_text(data)
        except ValueError as error:
            raise EngineFormatError(f"{self.path(name)}: {error}. {_REPAIR}.") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object, hashed; empty where the engine has none. Raises EngineFormatError."""
        data = self.read(name)
        try:
            return {} if data is None else parse_object(data)
        except ValueError as error:
            raise EngineFormatError(f"{self.path(name)}: {error}. {_REPAIR}.") from None

    def of_rank(self, role: str, rank: int) -> str:
        """Name of a rank's file; the manifest has one for every rank."""
        name = self.manifest.of_role(role, rank)
        assert name is not None
        return name


def open_engine(directory: Path) -> EngineFiles:
    """The files of the engine at `directory`, none but the manifest opened. Raises EngineFormatError."""
    files = EngineFiles(directory, read_manifest(directory))
    reasons = []
    for name, entry in files.manifest.files.items():
        try:
            size = require_regular(files.path(name), f"the {entry.role} file")
        except EngineFormatError as error:
            reasons.append(str(error))
            continue
        if size != entry.size:
            reasons.append(f"{files.path(name)}: the manifest says {entry.size} bytes, found {size}. {_REPAIR}.")
    if len(reasons) == 1:
        raise EngineFormatError(reasons[0])
    if reasons:
        raise faults(EngineFormatError, f"{directory}: files that are not what the manifest says", reasons[:20])
    return files
