"""Tokens to text while they arrive: each one's text at once, but for an incomplete character, which waits for its rest.

What comes out token by token is, put together, the text of the whole.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from .tokenizer import Tokenizer

# Tokens that an unusual decoder is shown for context, and how many may wait for a character to be completed.
_CONTEXT_TOKENS = 6
_MOST_WAITING = 8


class Detokenizer(Protocol):
    """The text of one output."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often its own, "" where a character is still incomplete."""

    def finish(self) -> str:
        """What was waiting, incomplete as it is."""


def make_detokenizer(tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> Detokenizer:
    """A detokenizer for what follows the prompt: after its visible tokens a leading space is kept."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    decoding = tokenizer.decoding
    if decoding.kind == "byte_level":
        return _ByteLevelDetokenizer(tokenizer, skipped)
    visible = [token for token in prompt_token_ids[-64:] if token not in skipped]
    if decoding.kind == "pieces":
        begins = not visible and all(token in skipped for token in prompt_token_ids)
        return _PieceDetokenizer(tokenizer, skipped, begins)
    return _WholeDetokenizer(tokenizer, skipped, visible[-_CONTEXT_TOKENS:])


class _ByteLevelDetokenizer:
    """Tokens spell bytes of UTF-8. What is no UTF-8 becomes U+FFFD, as when the whole is decoded."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._piece, self._skipped = tokenizer.piece, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._incomplete = False

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if isinstance(piece, str):
            if not self._incomplete:
                return piece
            piece = piece.encode()
        text = self._decoder.decode(piece)
        self._incomplete = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        self._incomplete = False
        return self._decoder.decode(b"", final=True)


class _PieceDetokenizer:
    """Tokens are text, or single bytes that make up a character; each byte that does not becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], begins: bool) -> None:
        self._piece, self._skipped = tokenizer.piece, skipped
        self._strip = tokenizer.decoding.strip if begins else 0
        self._bytes = b""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if self._strip < 0:
            self._strip = 0
            piece = piece.replace(" ", "") if isinstance(piece, str) else piece
        if isinstance(piece, bytes):
            return self._strip_leading(self._push_byte(piece))
        text = self._flush() + piece if self._bytes else piece
        return self._strip_leading(text) if self._strip else text

    def finish(self) -> str:
        return self._strip_leading(self._flush())

    def _push_byte(self, byte: bytes) -> str:
        self._bytes += byte
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode()
                self._bytes = b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                wrong = max(error.end - error.start, 1)
                text += self._bytes[: error.start].decode() + "\ufffd" * wrong
                self._bytes = self._bytes[error.start + wrong :]
        return text

    def _flush(self) -> str:
        text = "\ufffd" * len(self._bytes)
        self._bytes = b""
        return text

    def _strip_leading(self, text: str) -> str:
        """Takes from the text's beginning the spaces that sentencepiece put there."""
        if not self._strip or not text:
            return text
        kept = text.lstrip(" ")
        removed = min(len(text) - len(kept), self._strip)
        self._strip = self._strip - removed if not kept else 0
        return text[removed:]


class _WholeDetokenizer:
    """For decoders that change a token by its neighbours: compares the text with and without what is new."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], context: list[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._context, self._waiting = context, list[int]()

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._waiting.append(token_id)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._waiting) < _MOST_WAITING:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._new_text())

    def _advance(self, text: str) -> str:
        self._context = (self._context + self._waiting)[-_CONTEXT_TOKENS:]
        self._waiting = []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        return self._tokenizer.decode(self._context + self._waiting, skip_special_tokens=False)[len(before) :]


class StopStrings:
    """Finds stop strings in text that arrives in parts, and holds back only what could be the beginning of one."""

    def __init__(self, strings: tuple[str, ...], include: bool) -> None:
        self._strings, self._include = strings, include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that can be told now. After a stop string nothing more comes out."""
        text = self._held + text
        # The one that is complete first, so that it does not matter how the text was cut.
        first = min(((at + len(s), at, s) for s in self._strings if (at := text.find(s)) >= 0), default=None)
        if first is not None:
            _, at, self.found = first
            self._held = ""
            return text[: at + len(self.found)] if self._include else text[:at]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no stop string has come."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
