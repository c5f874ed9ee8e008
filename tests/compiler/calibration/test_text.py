"""A text becomes sequences of just the tokens that were asked for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Thread

import pytest
from enginery.compiler.calibration import text as text_module
from enginery.compiler.calibration.text import read_sequences
from enginery.engines.errors import CheckpointError, CompileError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ...tiny import write_tokenizer


def plain_ids(directory: Path, words: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return list(tokenizer.encode(words, add_special_tokens=False).ids)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def add_specials(directory: Path) -> None:
    """A tokenizer that puts <s> in front of a text, and </s> behind it."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(directory / "tokenizer.json"))


def test_sequences_follow_each_other(directory: Path) -> None:
    (directory / "t").write_text("abcdefghijklmnopqrstuvwxyz")
    sequences, sha256 = read_sequences(directory / "t", directory, 20, 8)
    assert sequences == [plain_ids(directory, part) for part in ("abcdefgh", "ijklmnop", "qrst")]
    assert sha256 == hashlib.sha256(b"abcdefghijklmnopqrstuvwxyz").hexdigest()


def test_each_sequence_begins_as_a_prompt_does(directory: Path) -> None:
    (directory / "t").write_text("abcdefghijklmnopqrstuvwxyz")
    add_specials(directory)
    sequences, _ = read_sequences(directory / "t", directory, 20, 8)
    assert sequences == [[1, *plain_ids(directory, part)] for part in ("abcdefg", "hijklmn", "opq")]


def test_a_long_text_is_read_as_far_as_it_is_wanted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "t").write_text("é" * 5000)
    monkeypatch.setattr(text_module, "_BYTES_PER_TOKEN", 1)
    sequences, _ = read_sequences(directory / "t", directory, 600, 256)
    assert [len(sequence) for sequence in sequences] == [256, 256, 88]
    assert [token for sequence in sequences for token in sequence] == plain_ids(directory, "é" * 300)


@pytest.mark.parametrize("special", [False, True])
def test_a_short_text_is_refused_with_what_it_has(special: bool, directory: Path) -> None:
    (directory / "t").write_text("a" * 100)
    if special:
        add_specials(directory)
    have = 100 + 4 * special
    with pytest.raises(CompileError, match=f"wanted 200 tokens, got {have}. .*with {have} tokens of this"):
        read_sequences(directory / "t", directory, 200, 32)
    assert sum(map(len, read_sequences(directory / "t", directory, have, 32)[0])) == have


def test_a_last_sequence_has_more_than_the_tokenizers_own(directory: Path) -> None:
    (directory / "t").write_text("a" * 100)
    add_specials(directory)
    found = {tokens: read_sequences(directory / "t", directory, tokens, 8)[0] for tokens in (2, 8, 9, 10, 16, 17)}
    sizes = {tokens: sum(map(len, sequences)) for tokens, sequences in found.items()}
    assert sizes == {2: 2, 8: 8, 9: 8, 10: 10, 16: 16, 17: 16}
    with pytest.raises(CompileError, match="--tokens 1: wanted 2 at least"):
        read_sequences(directory / "t", directory, 1, 8)


def test_a_pipe_is_read_once(directory: Path) -> None:
    words = "abcdefghij" * 20_000
    os.mkfifo(directory / "pipe")
    writer = Thread(target=lambda: (directory / "pipe").write_text(words))
    writer.start()
    sequences, sha256 = read_sequences(directory / "pipe", directory, 20, 8)
    writer.join()
    assert [token for sequence in sequences for token in sequence] == plain_ids(directory, words[:20])
    assert sha256 == hashlib.sha256(words.encode()).hexdigest()


def test_what_is_no_text_is_refused(directory: Path) -> None:
    (directory / "empty").touch()
    (directory / "binary").write_bytes(b"abc\xff\xfe")
    reasons = {"empty": "got 0. Give a text", "binary": "not UTF-8: byte 3", "missing": "cannot be read"}
    reasons["/dev/zero"] = "no file. Wanted a text"
    for name, reason in reasons.items():
        with pytest.raises(CompileError, match=reason):
            read_sequences(directory / name, directory, 10, 8)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        read_sequences(directory / "empty", directory, 10, 8)
