"""The tokenizer: special tokens, and bytes of tokens."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from enginery import EngineryError
from enginery.engines.errors import EngineFormatError, RequestError
from enginery.runtime.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"


def test_bos_comes_from_the_post_processor(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.encode("the cat")[0] == 1
    assert sentencepiece.encode("the cat", add_special_tokens=False)[0] != 1


def test_padding_and_truncation_of_training_are_dropped() -> None:
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.enable_truncation(2)
    rust.enable_padding(length=8)
    assert Tokenizer(rust).encode("a b a b") == [0, 1, 0, 1]


@given(st.text())
def test_bytes_of_tokens_spell_the_text(byte_level: Tokenizer, text: str) -> None:
    token_ids = byte_level.encode(text)
    assert b"".join(map(byte_level.token_bytes, token_ids)) == text.encode()


def test_bytes_of_sentencepiece_tokens(sentencepiece: Tokenizer) -> None:
    token_ids = sentencepiece.encode("the 🦙", add_special_tokens=False)
    assert b"".join(map(sentencepiece.token_bytes, token_ids)) == " the 🦙".encode()


def test_part_of_a_character_shows_as_such(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("🦙")
    assert len(token_ids) == 4
    assert {byte_level.token_text(token_id) for token_id in token_ids} == {"\ufffd"}


def test_refuses_half_a_surrogate_pair(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError):
        byte_level.encode("\ud83e")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff", b"[" * 100_000])
def test_refuses_what_is_no_tokenizer(data: bytes) -> None:
    with pytest.raises(EngineFormatError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_bytes(data, "tokenizer.json")


@pytest.mark.parametrize("name", ["gpt2", "phi-3-mini", "mistral-7b-v0.3-spm", "minimind-6400"])
def test_decodings_of_real_tokenizers_are_known(name: str) -> None:
    path = SHARED / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    tokenizer = Tokenizer.from_bytes(path.read_bytes(), name)
    assert tokenizer.decoding.kind in ("byte_level", "pieces")
    text = "The llama 🦙 ate 3 naïve “quotes”, 東京 and\n\ttabs.  Two spaces."
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, token_ids)).decode().strip() == text


def test_too_many_texts_are_refused_unread() -> None:
    with pytest.raises(EngineFormatError, match="more than 4000000 texts"):
        Tokenizer.from_bytes(b'"",' * 4_000_001, "tokenizer.json")


def test_a_panic_of_the_library_is_one_error() -> None:
    rust = RustTokenizer(models.BPE({"a": 0}, []))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(RequestError, match="cannot be tokenized"):
        Tokenizer(rust).encode("a" * 40 + "!")


def test_errors_are_of_one_family() -> None:
    assert issubclass(EngineFormatError, EngineryError)


@given(st.text())
def test_no_text_has_fewer_tokens_than_fewest(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        assert tokenizer.fewest_tokens(text * 20) <= len(tokenizer.encode(text * 20))


def test_nothing_is_known_of_texts_whose_unknown_parts_fuse() -> None:
    rust = RustTokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    tokenizer = Tokenizer(rust)
    assert tokenizer.encode("b" * 1000) == [0]
    assert tokenizer.fewest_tokens("b" * 1000) == 0


def test_one_that_nobody_uses_is_freed(byte_level: Tokenizer) -> None:
    """Only what lives at the end of the process is left to the system."""
    tokenizer = Tokenizer(byte_level._rust)
    alive = weakref.ref(tokenizer)
    del tokenizer
    assert alive() is None
