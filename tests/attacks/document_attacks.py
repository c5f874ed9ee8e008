"""Tokenizers, configurations and chat templates that mean harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .forge import TOKENIZER, Attack, Attacks, Forge, places, put, remove

_OTHERS: tuple[object, ...] = (
    None, True, False, 0, -1, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 1.5, 1e400, "", "\ud800", "x", [], {}, [[]], {"type": "x"},  # noqa: E501
)  # fmt: skip


def _nested(kind: str, key: str, depth: int, leaf: object) -> object:
    value = leaf
    for _ in range(depth):
        value = {"type": kind, key: [value]}
    return value


def tokenizers(forge: Forge) -> Attacks:
    """tokenizer.json damaged field by field, and made to cost time and memory."""
    sound = json.loads(forge.files[TOKENIZER])

    def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Attack:
        def apply(forge: Forge) -> None:
            document = json.loads(forge.files[TOKENIZER])
            change(document)
            forge.write_json(TOKENIZER, document)

        return Attack(name, apply)

    for at, _ in places(sound):
        if at[:2] == ("model", "vocab") and len(at) > 2 and at[2] not in ("a", "</s>"):
            continue
        yield edit(f"without {at}", lambda document, at=at: remove(document, at))
        for other in _OTHERS:
            yield edit(f"{at} = {other!r:.30}", lambda document, at=at, other=other: put(document, at, other))
    yield edit(
        "ids above the vocabulary", lambda document: document["model"]["vocab"].update({"O": 1 << 20, "n": 4000})
    )
    yield edit(
        "all ids the same", lambda document: document["model"].update(vocab=dict.fromkeys(sound["model"]["vocab"], 5))
    )
    grow = {"type": "Replace", "pattern": {"String": "n"}, "content": "n" * 1000}
    yield edit("a prompt that grows", lambda document: document.update(normalizer=_sequence([grow] * 4)))
    anywhere = {"type": "Replace", "pattern": {"Regex": "(?:)"}, "content": "n" * 1000}
    yield edit("a prompt that grows anywhere", lambda document: document.update(normalizer=_sequence([anywhere] * 4)))
    doubling = {"type": "Replace", "pattern": {"String": "n"}, "content": "nn"}
    yield edit("a prompt that doubles", lambda document: document.update(normalizer=_sequence([doubling] * 36)))
    prepend = {"type": "Prepend", "prepend": "n" * 1000}
    yield edit("a prompt with a long beginning", lambda document: document.update(normalizer=_sequence([prepend] * 40)))
    letters = {"type": "Replace", "pattern": {"String": "c"}, "content": "c" * 1000}
    yield edit("a text that grows", lambda document: document.update(decoder=_decoders([letters] * 5)))
    for regex in (
        "(x+x+)+y",
        "(.*)*y",
        "(a|b|ab)*c",
        "((((.*)*)*)*)*y",
        "(?=(.*)*y)",
        "x{1000}{1000}{1000}",
        "\\",
        "(" * 5000,
    ):
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        yield edit(f"regex {regex[:20]}", lambda document, split=split: document.update(pre_tokenizer=split))
    for depth in (20, 60, 110, 5000):
        for field, key, leaf in (
            ("normalizer", "normalizers", {"type": "NFC"}),
            ("pre_tokenizer", "pretokenizers", {"type": "Whitespace"}),
            ("decoder", "decoders", {"type": "Fuse"}),
            ("post_processor", "processors", {"type": "ByteLevel"}),
        ):
            if depth < 900:
                nested = _nested("Sequence", key, depth, leaf)
                yield edit(
                    f"{field} {depth} deep", lambda document, f=field, nested=nested: document.update({f: nested})
                )
                broken = _nested("Sequence", key, depth, {"type": "Nothing"})
                yield edit(f"broken {field} {depth} deep", lambda document, f=field, b=broken: document.update({f: b}))
    pad = {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    yield edit("endless padding", lambda document: document.update(padding=pad | {"pad_to_multiple_of": None}))
    special = {
        "content": "",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": True,
    }
    for content in ("", "n", " ", "\u0000", "x" * 100_000):
        for token_id in (0, 7, 1 << 30, (1 << 32) - 1):
            added = [special | {"id": token_id, "content": content}]
            yield edit(
                f"added {content[:5]!r} {token_id}", lambda document, added=added: document.update(added_tokens=added)
            )
    many = [special | {"id": 300 + i, "content": f"token {i}"} for i in range(20_000)]
    yield edit("very many added tokens", lambda document: document.update(added_tokens=many))
    for name, data in {
        "deep": b"[" * (1 << 20),
        "deep maps": b'{"model":' * (1 << 20),
        "zeros": b"\0" * 100,
        "nothing": b"",
        "a number": b"1" * 100_000,
        "lists": b'{"version":"1.0","model":[' + b"0," * (4 << 20) + b"0]}",
        "largest": b'{"version":"1.0","model":{"type":"BPE","x":[' + b"0," * ((48 << 20) - 100) + b"0]}}",
        "too large": b" " * (97 << 20),
    }.items():
        yield Attack(f"{name} for a tokenizer", lambda forge, data=data: forge.write(TOKENIZER, data))


def _sequence(normalizers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": normalizers}


def _decoders(decoders: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": decoders}


_TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",  # noqa: E501
    "a constant of gigabytes": "{{ 'a' * 10000000000 }}",
    "a constant of many digits": "{{ 9 ** 9 ** 9 }}",
    "a filtered constant": "{{ 'a'|center(10000000000) }}",
    "a formatted constant": "{{ '%10000000000d'|format(1) }}",
    "a tested constant": "{% if 9 ** 9 ** 9 %}{% endif %}",
    "a constant of a loop": "{% for x in [9 ** 9 ** 9] %}{% endfor %}",
    "no Jinja": "{% for",
    "deep": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "deep sums": "{{ " + "1+" * 50_000 + "1 }}",
    "deep minus": "{{ " + "-" * 100_000 + "1 }}",
    "deep lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "deep ifs": "{% if a %}" * 1000 + "{% endif %}" * 1000,
    "recursive": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "itself": "{% include 'x' %}{% extends 'y' %}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "long": "{{ a }}" * 100_000,
    "longest": "x" * (1 << 20),
    "too long": "x" * ((1 << 20) + 1),
}


def documents(forge: Forge) -> Attacks:
    """config.json, generation_config.json, tokenizer_config.json and templates."""
    for name in ("config.json", "generation_config.json"):
        if name == "config.json":
            # Otherwise the other file's end tokens count.
            prepare = [("generation_config.json", b"{}")]
        else:
            prepare = []
        for value in (
            *_OTHERS,
            10**30,
            [1, True],
            [1 << 31],
            [-1],
            [301],
            301,
            [2] * 5000,
            ["</s>"],
            [1.0],
            [None],
            "</s>",
        ):

            def apply(forge: Forge, name: str = name, value: object = value, prepare: Any = prepare) -> None:
                for other, data in prepare:
                    forge.write(other, data)
                forge.edit_json(name, eos_token_id=value)

            yield Attack(f"{name} eos {value!r:.30}", apply)
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        for value in (*_OTHERS, 10**300, float("nan"), -1e300):
            yield Attack(
                f"{key} {value!r:.30}",
                lambda forge, key=key, value=value: forge.edit_json("generation_config.json", **{key: value}),
            )
    shapes: tuple[object, ...] = (
        *_OTHERS, {"default": 1}, {"a": "x"}, [{"name": "default", "template": 1}], [{"name": [1], "template": "x"}],
        [{"name": {}, "template": "x"}], [1, 2], [{}], {"default": None},
    )  # fmt: skip
    for key in ("chat_template", "bos_token", "eos_token", "added_tokens_decoder"):
        for value in shapes:
            yield Attack(
                f"tokenizer_config {key} {value!r:.40}",
                lambda forge, key=key, value=value: forge.edit_json("tokenizer_config.json", **{key: value}),
            )
    for name, template in _TEMPLATES.items():
        yield Attack(f"template {name}", lambda forge, text=template: forge.write("chat_template.jinja", text.encode()))
    yield Attack("template of bytes", lambda forge: forge.write("chat_template.jinja", b"\xff\xfe"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        for what, data in {
            "deep": b"[" * 500_000,
            "deep maps": b'{"a":' * 150_000 + b"1" + b"}" * 150_000,
            "a list": b"[]",
            "a long number": b'{"eos_token_id":' + b"1" * 5000 + b"}",
            "nothing": b"",
            "no UTF-8": b"\xff",
            "NaN": b'{"eos_token_id": NaN, "temperature": NaN}',
        }.items():
            yield Attack(f"{what} for {name}", lambda forge, name=name, data=data: forge.write(name, data))
