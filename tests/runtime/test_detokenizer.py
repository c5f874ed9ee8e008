"""Text token by token is the text of the whole, and stop strings never leak."""

from __future__ import annotations

import pytest
from enginery.runtime.detokenizer import StopStrings, make_detokenizer
from enginery.runtime.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers


def stream(tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or [], skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@given(st.lists(st.integers(0, 264), max_size=40), st.booleans())
def test_byte_level_is_the_whole(byte_level: Tokenizer, token_ids: list[int], skip: bool) -> None:
    assert "".join(stream(byte_level, token_ids, skip=skip)) == byte_level.decode(token_ids, skip)


@given(st.text(st.sampled_from("the cats! é🦙東\n"), max_size=20))
def test_sentencepiece_is_the_whole(sentencepiece: Tokenizer, text: str) -> None:
    token_ids = sentencepiece.encode(text)
    assert "".join(stream(sentencepiece, token_ids)) == sentencepiece.decode(token_ids)


@given(st.lists(st.sampled_from([1, 2, 3 + 0xE2, 3 + 0xFF, 3 + 0x80, 259, 260, 261, 264, 265]), max_size=12))
def test_sentencepiece_with_wrong_bytes_is_the_whole(sentencepiece: Tokenizer, token_ids: list[int]) -> None:
    # None of these bytes follows another to a character.
    assert "".join(stream(sentencepiece, token_ids)) == sentencepiece.decode(token_ids)


def test_every_token_shows_at_once(byte_level: Tokenizer) -> None:
    text = "the cat\n"
    token_ids = byte_level.encode(text)
    parts = stream(byte_level, token_ids)
    assert parts[:-1] == [byte_level.token_text(token_id) for token_id in token_ids]


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_only_an_incomplete_character_waits(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    token_ids = tokenizer.encode("🦙🦙!", add_special_tokens=False)
    parts = [part for part in stream(tokenizer, token_ids, prompt=tokenizer.encode("a")) if part.strip()]
    assert parts == ["🦙", "🦙", "!"]
    assert "\ufffd" not in "".join(parts)


def test_an_incomplete_end_shows_at_the_end(byte_level: Tokenizer) -> None:
    assert stream(byte_level, byte_level.encode("é🦙")[:-1])[-1] == "\ufffd"


def test_leading_space_stays_after_a_prompt(sentencepiece: Tokenizer) -> None:
    cat = sentencepiece.encode("cat", add_special_tokens=False)
    prompt = sentencepiece.encode("the")
    assert "".join(stream(sentencepiece, cat, prompt)) == " cat"
    assert "".join(stream(sentencepiece, cat, prompt[:1])) == "cat"


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_unknown_decoders_go_on_from_the_prompt(token_ids: list[int], prompt: list[int]) -> None:
    rust = RustTokenizer(models.WordPiece({"un": 0, "##able": 1, "!": 2, "it": 3}, unk_token="un"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(rust)
    assert tokenizer.decoding.kind == "whole"
    text = tokenizer.decode(prompt) + "".join(stream(tokenizer, token_ids, prompt))
    assert text == tokenizer.decode(prompt + token_ids)


def first_stop(text: str, stops: list[str]) -> int:
    """Where the stop string begins that is complete first."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else -1


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_before_the_first_stop_string_is_complete(parts: list[str], stops: list[str]) -> None:
    finder, told = StopStrings(tuple(stops), include=False), ""
    for part in parts:
        told += finder.push(part)
        if finder.found is not None:
            break
    told += finder.finish()
    text = "".join(parts)
    at = first_stop(text, stops)
    assert told == (text if at < 0 else text[:at])
    assert (finder.found is None) == (at < 0)


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_holds_back_no_more_than_a_beginning(text: str, stops: list[str]) -> None:
    finder = StopStrings(tuple(stops), include=False)
    told = finder.push(text)
    if finder.found is None:
        held = text[len(told) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_stop_string_is_kept_if_asked_for() -> None:
    finder = StopStrings(("END",), include=True)
    assert finder.push("a E") + finder.push("ND of it") == "a END"
