"""Prompts of requests: text tokenized without holding up other requests, or token ids as they are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..detokenizer import make_detokenizer
from ..engine import Engine
from ..requests import short
from ..tokenizer import Tokenizer
from .errors import invalid
from .protocol import require_encodable

MOST_CHOICES = 1024
# Tokenizing a longer text is left to a thread: it would hold up everybody's stream.
_LONG_TEXT = 4096


@dataclass(frozen=True)
class Prompt:
    """One prompt. text: as given, None where it was given as token ids."""

    text: str | None
    token_ids: list[int]


async def encode(engine: Engine, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`. Raises RequestError."""
    if len(text) <= _LONG_TEXT:
        return engine.encode(text, add_special_tokens)
    return await asyncio.to_thread(engine.encode, text, add_special_tokens)


async def read_prompts(given: object, engine: Engine, add_special_tokens: bool) -> list[Prompt]:
    """The prompts of a completion request: text, token ids, or a list of either. Raises ApiError, RequestError."""
    prompts = []
    for item in _as_list(given):
        if isinstance(item, str):
            text = require_encodable(item, "prompt")
            prompts.append(Prompt(text, await encode(engine, text, add_special_tokens)))
        else:
            prompts.append(Prompt(None, _token_ids(item)))
        engine.check_prompt(prompts[-1].token_ids)
    return prompts


def _as_list(given: object) -> list[object]:
    if given is None:
        raise invalid("prompt is missing.", "prompt", "missing_required_parameter")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise invalid(f"prompt must be text, token ids or a list of these, got {short(given)}.", "prompt")
    if isinstance(given[0], int):
        return [given]
    if len(given) > MOST_CHOICES:
        raise invalid(f"prompt must be a list of at most {MOST_CHOICES}, got {len(given)}.", "prompt")
    return given


def _token_ids(given: object) -> list[int]:
    if isinstance(given, list) and all(type(item) is int for item in given):
        return given
    raise invalid(f"prompt must be text, token ids or a list of these, got {short(given)}.", "prompt")


def spell(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[str, list[int]]:
    """(text of a prompt, number of characters before each of its tokens), special tokens left out."""
    detokenizer = make_detokenizer(tokenizer, [], skip_special_tokens=True)
    parts, offsets, length = [], [], 0
    for token_id in token_ids:
        offsets.append(length)
        parts.append(detokenizer.push(token_id))
        length += len(parts[-1])
    return "".join(parts) + detokenizer.finish(), offsets
