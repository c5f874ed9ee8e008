"""Tokenizers that would make a short text long are refused before they see one."""

from __future__ import annotations

import pytest
from enginery.engines.errors import EngineFormatError
from enginery.runtime.text_growth import check_growth
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .conftest import make_byte_level, make_sentencepiece


def tokenizer(**parts: object) -> Tokenizer:
    made = Tokenizer(models.BPE({"a": 0, "<s>": 1}, []))
    made.add_special_tokens(["<s>"])
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def replace(pattern: object, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(pattern, content)


def template(single: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=single.strip(), special_tokens=[("<s>", 1)])


@pytest.mark.parametrize(
    "made",
    [
        tokenizer(),
        make_byte_level(),
        make_sentencepiece(),
        tokenizer(normalizer=normalizers.NFKC(), decoder=decoders.WordPiece()),
        tokenizer(normalizer=replace(" ", "x" * 1000)),
        tokenizer(normalizer=replace(Regex(" "), "x" * 999)),
        tokenizer(normalizer=replace("x" * 10, "y" * 10_000)),
        tokenizer(normalizer=normalizers.Sequence([replace(" ", "x" * 10)] * 3)),
        tokenizer(normalizer=normalizers.Prepend("x" * 4096)),
        tokenizer(post_processor=template("<s> $A <s>" + " $A" * 999)),
        tokenizer(post_processor=template("<s> " * 4096 + "$A")),
    ],
)
def test_what_languages_need_is_let_through(made: Tokenizer) -> None:
    check_growth(made)


@pytest.mark.parametrize(
    ("part", "made"),
    [
        ("normalizer", tokenizer(normalizer=replace(" ", "x" * 1001))),
        ("normalizer", tokenizer(normalizer=replace(" ", "é" * 501))),
        ("normalizer", tokenizer(normalizer=replace(Regex(" "), "x" * 1000))),
        ("normalizer", tokenizer(normalizer=normalizers.Sequence([replace(" ", "x" * 11)] * 3))),
        (
            "normalizer",
            tokenizer(
                normalizer=normalizers.Sequence(
                    [normalizers.Sequence([replace("a", "aa")] * 5), normalizers.Sequence([replace("a", "aa")] * 5)]
                )
            ),
        ),
        ("normalizer", tokenizer(normalizer=normalizers.Prepend("x" * 4097))),
        ("normalizer", tokenizer(normalizer=normalizers.Sequence([normalizers.Prepend("x" * 2049)] * 2))),
        (
            "pre_tokenizer",
            tokenizer(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 10)),
        ),
        ("decoder", tokenizer(decoder=decoders.Sequence([decoders.Replace("a", "a" * 101)] * 2))),
        ("post_processor", tokenizer(post_processor=template("$A " * 1001))),
        ("post_processor", tokenizer(post_processor=template("<s> " * 4097 + "$A"))),
        (
            "post_processor",
            tokenizer(post_processor=processors.Sequence([template("<s> " * 2049 + "$A")] * 2)),
        ),
    ],
)
def test_what_multiplies_texts_is_refused(part: str, made: Tokenizer) -> None:
    with pytest.raises(EngineFormatError, match=f"its {part} makes texts over 1000 times longer"):
        check_growth(made)
