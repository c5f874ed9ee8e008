"""The documents that an engine has from its checkpoint, byte for byte: how large they may be and how they are read.

The build and the runtime must agree on that, or what was built could not be served.
"""

from __future__ import annotations

import json
from typing import Any

LARGEST_BYTES = {
    "tokenizer.json": 48 << 20,
    "tokenizer_config.json": 16 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
    "config.json": 1 << 20,
}


def parse_text(data: bytes) -> str:
    """The text of a document. Raises ValueError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object of a document. Raises ValueError."""
    text = parse_text(data)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise ValueError("wanted a JSON object")
    return document


def choose_template(jinja: str | None, tokenizer_config: dict[str, Any]) -> str | None:
    """The template of chat_template.jinja, or else of tokenizer_config.json (the "default" one of several)."""
    source: object = jinja if jinja is not None else tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {str(item.get("name")): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default", next(iter(named.values()), None))
    elif isinstance(source, dict):
        source = source.get("default", next(iter(source.values()), None))
    return source if isinstance(source, str) and source else None
