"""A tokenizer as large as the model's vocabulary: who loads one at start pays what it costs.

Byte-level BPE with random merges, in the layout that Qwen2.5 and Llama 3 have: what it makes of a text has no meaning.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONGEST = 12


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Replaces the directory's tokenizer by one of `vocab_size` tokens, the first of them the end of a text."""
    vocab, merges = random_merges(vocab_size)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [" ".join(merge) for merge in merges],
        },
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "bos_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "added_tokens_decoder": {"0": {key: value for key, value in _added_token().items() if key != "id"}},
    }
    _write(directory / "tokenizer.json", tokenizer)
    _write(directory / "tokenizer_config.json", config)
    _write(directory / "vocab.json", vocab)
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))


def random_merges(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and the merges in their order. Always the same ones."""
    draw = random.Random(0)
    tokens = [END, *byte_characters()]
    known, merges = set(tokens), []
    while len(tokens) < vocab_size:
        left, right = draw.choice(tokens[1:300]), tokens[draw.randrange(1, len(tokens))]
        if len(left + right) <= _LONGEST and left + right not in known:
            merges.append((left, right))
            tokens.append(left + right)
            known.add(left + right)
    return {token: number for number, token in enumerate(tokens)}, merges


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    written = {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [written[byte] for byte in range(256)]


def _added_token() -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 0, "content": END} | flags | {"special": True}


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
