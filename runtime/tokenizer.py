"""Text to token ids and back, as the checkpoint's own tokenizer.json says."""

from __future__ import annotations

import atexit
import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..engines.errors import EngineFormatError, EngineryError, RequestError
from .text_growth import check_growth

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

# Texts in a tokenizer.json: the largest known, of 262,144 tokens, has 1.3 million. More would cost gigabytes to read.
_MOST_TEXTS = 4_000_000
_SPACE_MARK = "▁"
# Characters that a normalizer may make one of (Unicode's canonical composition).
_MOST_COMPOSED = 4


@dataclass(frozen=True)
class Decoding:
    """How tokens become text where that can be said token by token.

    kind    "byte_level": tokens spell bytes; "pieces": tokens are text with ▁ for spaces and <0xNN> for bytes;
            "whole": neither, so only decoding many tokens at once tells
    strip   leading spaces that the first visible token of a text loses (all of them: -1)
    """

    kind: str
    space: str = ""
    byte_fallback: bool = False
    strip: int = 0


_living: WeakSet[Tokenizer] = WeakSet()


@atexit.register
def _leave_to_the_system() -> None:
    """At a process's end nobody needs a vocabulary's strings freed one by one: a tenth of the time of reading it."""
    for tokenizer in _living:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(tokenizer._rust))


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with the bytes of each token at hand."""

    def __init__(self, rust: RustTokenizer) -> None:
        # A tokenizer may come with padding and truncation from its training; prompts want neither.
        rust.no_padding()
        rust.no_truncation()
        self._rust = rust
        _living.add(self)
        self._pieces: dict[int, bytes | str] = {}
        self._longest: int | None = None
        self.special_ids = frozenset(
            token_id for token_id, token in rust.get_added_tokens_decoder().items() if token.special
        )
        self.decoding = _read_decoder(rust)

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Tokenizer:
        """Reads a tokenizer.json. Raises EngineFormatError."""
        from tokenizers import Tokenizer as RustTokenizer

        if data.count(b'"') > 2 * _MOST_TEXTS:
            raise EngineFormatError(f"{where}: more than {_MOST_TEXTS} texts, which no tokenizer has. Build it again.")
        with _failing_as(EngineFormatError, f"{where}: not a tokenizer that this runtime reads"):
            rust = RustTokenizer.from_buffer(data)
            check_growth(rust)
            return Tokenizer(rust)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer puts around it (BOS). Raises RequestError."""
        with _failing_as(RequestError, "The prompt cannot be tokenized"):
            # The batch form lets go of the GIL, so that a long prompt holds up nobody's stream.
            return list(self._rust.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def fewest_tokens(self, text: str) -> int:
        """No encoding of `text` has fewer tokens than this, which is far below what it has; 0 where nothing is known.

        Spaces are not counted: added tokens may swallow any number of them.
        """
        if self.decoding.kind != "byte_level" and not self.decoding.byte_fallback:
            return 0  # one token for unknown characters may stand for any number of them
        if self._longest is None:
            self._longest = max(map(len, self._rust.get_vocab()))
        return len("".join(text.split())) // (self._longest * _MOST_COMPOSED)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, all at once."""
        with _failing_as(EngineryError, "Tokens cannot be made text"):
            return self._rust.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty where there is none."""
        return self._rust.id_to_token(token_id) or ""

    def piece(self, token_id: int) -> bytes | str:
        """What a token adds to a text: text, or bytes that may be a part of a character."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text, with U+FFFD for bytes that are only a part of a character."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode()

    def _make_piece(self, token_id: int) -> bytes | str:
        token = self.token(token_id)
        decoding = self.decoding
        if decoding.kind == "whole":
            return self.decode([token_id], skip_special_tokens=False)
        if decoding.kind == "byte_level":
            spelled = [_BYTES.get(character) for character in token]
            data = token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
            try:
                return data.decode()
            except UnicodeDecodeError:
                return data
        if decoding.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token
        return token.replace(decoding.space, " ") if decoding.space else token


@contextmanager
def _failing_as(kind: type[EngineryError], what: str) -> Iterator[None]:
    """Makes one error of whatever the library throws; its panics are no Exceptions."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise kind(f"{what}: {str(error)[:200]}.") from None


def _byte_alphabet() -> dict[str, int]:
    """Characters that byte-level tokenizers spell bytes with (Radford et al., GPT-2, 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _read_decoder(rust: RustTokenizer) -> Decoding:
    if rust.decoder is None:
        return Decoding("whole")
    described = json.loads(rust.decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return Decoding("byte_level")
    return _read_pieces(steps) or Decoding("whole")


def _read_pieces(steps: list[dict[str, Any]]) -> Decoding | None:
    """The decoding of a sentencepiece tokenizer, or None where a step is unknown or in an unusual place."""
    space, byte_fallback, strip = "", False, 0
    order = ["Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"]
    places = [order.index(step["type"]) if step["type"] in order else -1 for step in steps]
    if -1 in places or places != sorted(set(places)):
        return None
    for step in steps:
        match step["type"]:
            case "Replace":
                if step["pattern"] != {"String": _SPACE_MARK} or step["content"] != " ":
                    return None
                space = _SPACE_MARK
            case "Metaspace":
                if space:
                    return None
                space = step["replacement"]
                strip = 0 if step["prepend_scheme"] == "never" else -1
            case "ByteFallback":
                byte_fallback = True
            case "Strip":
                if step["content"] != " " or step["stop"] != 0 or strip or "Fuse" not in [s["type"] for s in steps]:
                    return None
                strip = step["start"]
    return Decoding("pieces", space, byte_fallback, strip)
