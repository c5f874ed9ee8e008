"""A text as sequences of the checkpoint's tokens."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ...engines.errors import CheckpointError, CompileError
from .defaults import DEFAULT_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What is read at first for a token that is wanted; more if that is too little.
_BYTES_PER_TOKEN = 8
_BLOCK_BYTES = 1 << 20


def read_sequences(text: Path, checkpoint: Path, tokens: int, length: int) -> tuple[list[list[int]], str]:
    """`tokens` tokens from the start of the UTF-8 file `text` in sequences of `length` (the last may be shorter), each
    after what the tokenizer puts in front of a text; and the sha256 of the file.

    Raises CompileError where the text is none or too short, CheckpointError where the tokenizer cannot be used.
    """
    tokenizer = _open_tokenizer(checkpoint / "tokenizer.json")
    prefix = _prefix(tokenizer)
    room = length - len(prefix)
    if tokens <= len(prefix):
        raise CompileError(
            f"--tokens {tokens}: wanted {len(prefix) + 1} at least, as every text begins with "
            f"{len(prefix)} of the tokenizer's own. {DEFAULT_TOKENS} are usual."
        )
    # What is left for the text; a last sequence that would have room for nothing of it is left out.
    wanted = tokens // length * room + max(tokens % length - len(prefix), 0)
    ids, sha256 = _read_ids(text, tokenizer, wanted)
    if len(ids) < wanted:
        have = len(ids) + len(prefix) * -(-len(ids) // room)
        remedy = f"Give a longer text, or calibrate with {have} tokens of this one." if ids else "Give a text."
        raise CompileError(f"{text}: too short to calibrate with: wanted {tokens} tokens, got {have}. {remedy}")
    return [prefix + ids[start : start + room] for start in range(0, wanted, room)], sha256


def _open_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # its own, which have no class
        raise CheckpointError(f"{path}: not a tokenizer: {str(error)[:200]}. Download it again.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts in front of every text: BOS, or nothing."""
    plain, whole = (list(tokenizer.encode("a", add_special_tokens=special).ids) for special in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def _read_ids(text: Path, tokenizer: Tokenizer, wanted: int) -> tuple[list[int], str]:
    """The first `wanted` tokens, or as many as there are, without special ones; and the sha256 of the whole file."""
    try:
        with open(text, "rb") as file:
            if not (stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode) or stat.S_ISFIFO(mode)):
                raise CompileError(f"{text}: no file. Wanted a text in UTF-8.")
            data, more = b"", wanted * _BYTES_PER_TOKEN
            while True:
                data += (read := file.read(more))
                part = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(read) < more)
                ids = list(tokenizer.encode_batch([part], add_special_tokens=False)[0].ids)
                # The last tokens of a part might be others if it went on.
                if len(read) < more or len(ids) >= wanted + 64:
                    break
                more = 3 * len(data)
            whole = hashlib.sha256(data)
            while block := file.read(_BLOCK_BYTES):
                whole.update(block)
            return ids[:wanted], whole.hexdigest()
    except UnicodeDecodeError as error:
        raise CompileError(f"{text}: not UTF-8: byte {error.start}. Wanted a text; convert it first.") from None
    except OSError as error:
        raise CompileError(f"{text}: cannot be read: {error}. Wanted a text in UTF-8.") from None
