"""Chat messages: checked, and brought into the form that templates expect."""

from __future__ import annotations

import json
from typing import Any

from ..chat_template import ChatTemplate, Message
from ..requests import short
from .errors import invalid
from .protocol import require_encodable

MOST_MESSAGES = 10_000
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def parse_messages(given: object, template: ChatTemplate) -> list[Message]:
    """The messages of a request for `template`. Raises ApiError."""
    if given is None:
        raise invalid("messages is missing.", "messages", "missing_required_parameter")
    if not isinstance(given, list) or not given:
        raise invalid(f"messages must be a list of at least one message, got {short(given)}.", "messages")
    if len(given) > MOST_MESSAGES:
        raise invalid(f"messages must be at most {MOST_MESSAGES}, got {len(given)}.", "messages")
    # A template that does not know developers would drop what they say.
    knows_developer = "developer" in template.source
    return [_parse_message(message, f"messages[{index}]", knows_developer) for index, message in enumerate(given)]


def _parse_message(given: object, where: str, knows_developer: bool) -> Message:
    if not isinstance(given, dict):
        raise invalid(f"{where} must be an object, got {short(given)}.", where)
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}.role must be text, got {short(role)}.", f"{where}.role")
    message: Message = {key: value for key, value in given.items() if isinstance(key, str)}
    message["role"] = "system" if role == "developer" and not knows_developer else role
    calls = given.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _parse_tool_calls(calls, f"{where}.tool_calls")
    if given.get("content") is None:
        if role != "assistant":
            raise invalid(f"{where}.content is missing.", f"{where}.content", "missing_required_parameter")
        message["content"] = None if calls else ""
    else:
        message["content"] = _parse_content(given["content"], f"{where}.content")
    return message


def _parse_content(content: object, where: str) -> str:
    if isinstance(content, str):
        return require_encodable(content, where)
    if not isinstance(content, list):
        raise invalid(f"{where} must be text or a list of parts, got {short(content)}.", where)
    return "\n".join(_parse_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _parse_part(part: object, where: str) -> str:
    if isinstance(part, str):
        return require_encodable(part, where)
    if not isinstance(part, dict):
        raise invalid(f"{where} must be an object, got {short(part)}.", where)
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        raise invalid(f"{where} is of type {short(kind)}; this model reads text alone.", where, "unsupported_content")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid(f"{where}.text must be text, got {short(text)}.", f"{where}.text")
    return require_encodable(text, where)


def _parse_tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls of an earlier answer, their arguments as objects, which is what templates print."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    ):
        raise invalid(f"{where} must be a list of objects with a function, got {short(calls)}.", where)
    return [{**call, "function": {**call["function"], "arguments": _arguments(call["function"])}} for call in calls]


def _arguments(function: dict[str, Any]) -> Any:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
