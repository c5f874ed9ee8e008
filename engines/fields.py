"""Typed reading of maps that came from a file: every value is checked for presence, type and range before use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import EngineFormatError

T = TypeVar("T")

# No count, offset or size in an engine is larger: 256 TiB.
LARGEST = 1 << 48
LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Fields:
    """A map of an engine's file and where it stands in it, for messages."""

    values: dict[str, Any]
    where: str

    @staticmethod
    def of(value: object, where: str) -> Fields:
        """`value` as a map with text keys. Raises EngineFormatError."""
        if not isinstance(value, dict) or not all(isinstance(key, str) and _is_unicode(key) for key in value):
            raise EngineFormatError(f"{where}: wanted a map with text keys, got {describe(value)}.")
        return Fields(value, where)

    def only(self, *known: str) -> Fields:
        """This map, if it has no other keys than `known`. Raises EngineFormatError naming those it has."""
        unknown = [key for key in self.values if key not in known]
        if unknown:
            names = ", ".join(repr(key[:80]) for key in unknown[:5])
            raise EngineFormatError(
                f"{self.where}: unknown field{'s' if len(unknown) > 1 else ''} {names}. A newer release may know "
                f"them: upgrade the runtime, or build the engine with this release."
            )
        return self

    def integer(self, key: str, least: int = 0, most: int = LARGEST) -> int:
        """The integer at `key`, between `least` and `most`."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._refuse(key, f"an integer from {least} to {most}", value)
        return int(value)

    def text(self, key: str, choices: tuple[str, ...] | None = None) -> str:
        """The text at `key`, one of `choices` if those are given."""
        value = self._get(key)
        is_text = isinstance(value, str) and len(value) <= LONGEST_TEXT and _is_unicode(value)
        if not is_text or (choices is not None and value not in choices):
            self._refuse(
                key, f"one of {', '.join(choices)}" if choices else f"text of at most {LONGEST_TEXT} characters", value
            )
        return str(value)

    def boolean(self, key: str) -> bool:
        """The boolean at `key`."""
        value = self._get(key)
        if not isinstance(value, bool):
            self._refuse(key, "true or false", value)
        return bool(value)

    def items(self, key: str, read: Callable[[object, str], T], most: int = 1 << 16) -> list[T]:
        """The list at `key`, each item read by `read(value, where)`."""
        value = self._get(key)
        if not isinstance(value, list) or len(value) > most:
            self._refuse(key, f"a list of at most {most} items", value)
        return [read(item, f"{self.where}.{key}[{index}]") for index, item in enumerate(value)]

    def map(self, key: str) -> Fields:
        """The map at `key`."""
        return Fields.of(self._get(key), f"{self.where}.{key}")

    def get(self, key: str) -> object:
        """The value at `key`, or None; for what the caller checks itself."""
        return self.values.get(key)

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise EngineFormatError(f"{self.where}: field {key!r} is missing. Build the engine again.")
        return self.values[key]

    def _refuse(self, key: str, wanted: str, value: object) -> None:
        raise EngineFormatError(f"{self.where}.{key}: wanted {wanted}, got {describe(value)}.")


def _is_unicode(text: str) -> bool:
    """False for what JSON can spell and nobody can print: halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe(value: object) -> str:
    """`value` for a message: short, whatever it is."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'map'} of {len(value)}"
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "a huge integer"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
