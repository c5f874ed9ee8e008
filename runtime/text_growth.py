"""How much longer a tokenizer.json can make a text. Its steps are data from anywhere: thirty that double a text make a
gigabyte of a letter, in a library that cannot be interrupted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..engines.errors import EngineFormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

# Those that exist triple a text (a space becomes ▁) and add a few tokens.
_MOST_GROWTH = 1000.0
_MOST_ADDED = 4096
# A compiled table says what each character becomes; one may be trusted that far, two may not.
_GROWTH = {"ByteLevel": 2.0, "Precompiled": 500.0}
_PARTS = ("normalizers", "pretokenizers", "decoders", "processors")


def check_growth(rust: RustTokenizer) -> None:
    """Raises EngineFormatError for a tokenizer whose steps multiply or lengthen texts as no language needs."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(rust, name)
        if part is None:
            continue
        growth, added = 1.0, 0
        for step in _steps(json.loads(part.__getstate__())):
            growth, added = growth * _growth_of(step), added + _added_by(step)
            if growth > _MOST_GROWTH or added > _MOST_ADDED:
                raise EngineFormatError(
                    f"its {name} makes texts over {_MOST_GROWTH:.0f} times longer, or adds over {_MOST_ADDED} bytes or "
                    f"tokens to each"
                )


def _steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part's steps, whatever sequences they are nested in."""
    inner = [steps for key in _PARTS if isinstance(steps := part.get(key), list)]
    return [step for steps in inner for item in steps for step in _steps(item)] if inner else [part]


def _growth_of(step: dict[str, Any]) -> float:
    if step.get("type") == "Replace":
        content = len(step["content"].encode())
        pattern = step["pattern"].get("String")
        # A regular expression may match between any two characters.
        return max(1.0, content / len(pattern.encode()) if pattern else content + 1.0)
    if step.get("type") == "TemplateProcessing":
        return float(max(1, sum("Sequence" in piece for piece in step["single"])))
    return _GROWTH.get(str(step.get("type")), 1.0)


def _added_by(step: dict[str, Any]) -> int:
    if step.get("type") == "Prepend":
        return len(step["prepend"].encode())
    if step.get("type") == "TemplateProcessing":
        tokens = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        return sum(tokens.get(piece["SpecialToken"]["id"], 0) for piece in step["single"] if "SpecialToken" in piece)
    return 0
