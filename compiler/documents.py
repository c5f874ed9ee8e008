"""What an engine takes from its checkpoint as it is: read as the server will, which would find faults too late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.documents import LARGEST_BYTES, choose_template, parse_object, parse_text
from ..engines.errors import CheckpointError, faults
from .checkpoint.source import Source

if TYPE_CHECKING:
    from jinja2.nodes import Node

# Name -> its role in the engine.
DOCUMENTS = {
    "config.json": "config",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "chat_template.jinja": "template",
    "generation_config.json": "generation",
}


def check_documents(source: Source) -> None:
    """Raises CheckpointError with all that is wrong with them. (What is in tokenizer.json is too large to be read.)"""
    _require_tokenizer(source)
    reasons: list[str] = []
    read: dict[str, bytes] = {}
    for name in DOCUMENTS:
        path = source.directory / name
        if path.is_file() and (size := path.stat().st_size) > LARGEST_BYTES[name]:
            reasons.append(f"{path}: {size} bytes; at most {LARGEST_BYTES[name]} are allowed. Download it again.")
        elif path.is_file() and name != "tokenizer.json":
            read[name] = path.read_bytes()
    objects: dict[str, dict[str, Any]] = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        try:
            objects[name] = parse_object(read[name]) if name in read else {}
        except ValueError as error:
            reasons.append(f"{source.directory / name}: {error}. Download it again.")
    reasons += _template_faults(source.directory, read.get("chat_template.jinja"), objects)
    if len(reasons) == 1:
        raise CheckpointError(reasons[0])
    if reasons:
        raise faults(CheckpointError, f"{source.name}: files that no engine can take over", reasons)


def _template_faults(directory: Path, jinja: bytes | None, objects: dict[str, dict[str, Any]]) -> list[str]:
    where = directory / ("chat_template.jinja" if jinja is not None else "tokenizer_config.json")
    remedy = "Mend it, or remove it: an engine without a chat template completes text."
    try:
        text = None if jinja is None else parse_text(jinja)
    except ValueError as error:
        return [f"{where}: {error}. {remedy}"]
    source = choose_template(text, objects.get("tokenizer_config.json", {}))
    fault = None if source is None else syntax_fault(source)
    return [] if fault is None else [f"{where}: the chat template is no valid Jinja: {fault}. {remedy}"]


def syntax_fault(template: str) -> str | None:
    """Why Jinja cannot parse a chat template, with the tags that transformers gives it; None if it can."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Node | list[Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    try:
        environment.parse(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {str(error.message).rstrip('.')[:200]}"
    except RecursionError:
        return "it is nested too deeply"
    return None


def _require_tokenizer(source: Source) -> None:
    if (source.directory / "tokenizer.json").is_file():
        return
    convert = (
        f"python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{source.directory}')"
        f".save_pretrained('{source.directory}')\""
    )
    raise CheckpointError(
        f"{source.name}: no tokenizer.json. If it has another kind of tokenizer, convert it: {convert}"
    )
