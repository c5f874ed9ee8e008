"""What clients may ask for: each field of the two endpoints is honoured, known to be harmless, or refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ..model import Model
from ..requests import SamplingParams, short
from .errors import invalid

LARGEST_LOGPROBS = 20
LARGEST_COUNT = (1 << 63) - 1
SMALLEST_TOP_P = 1e-9  # OpenAI allows top_p 0, which means the likeliest token alone

_SAMPLING = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
)


@dataclass(frozen=True)
class Common:
    """What both endpoints share. max_tokens: None where the request leaves it to us."""

    model: str
    params: SamplingParams
    max_tokens: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool


class Body:
    """A request's JSON object. Null means left out."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def get(self, name: str) -> Any:
        """The value called `name`, or None."""
        return self.values.get(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        """A boolean. Raises ApiError."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            refuse(name, "true or false", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer, or None. Raises ApiError."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            refuse(
                name, f"an integer from {low} to {high}" if high < 1 << 31 else f"an integer of at least {low}", value
            )
        return int(value)

    def text(self, name: str) -> str | None:
        """Text, or None. Raises ApiError."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            refuse(name, "text", value)
        return value


def refuse(name: str, wanted: str, value: object) -> NoReturn:
    """Raises the ApiError for a field that is not what it must be."""
    raise invalid(f"{name} must be {wanted}, got {short(value)}.", name, "invalid_value")


def parse_body(data: bytes) -> Body:
    """The JSON object that a request carries. Raises ApiError."""
    try:
        # From bytes, json would also take UTF-16, a byte order mark and halves of surrogate pairs.
        values = json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise invalid("The body is not valid JSON: nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise invalid(f"The body is not UTF-8, at byte {error.start}.", code="invalid_json") from None
    except ValueError as error:
        # Python refuses numbers of thousands of digits with a remedy that is none of the client's.
        reason = "a number has too many digits" if "set_int_max_str_digits" in str(error) else str(error)[:200]
        raise invalid(f"The body is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise invalid(f"The body must be a JSON object, got {short(values)}.", code="invalid_json")
    return Body(values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        # Whichever was taken, others on the way may have read the other one.
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{short(twice)} is there twice in one object")
    return values


def _is_text_format(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


_Harmless = Callable[[Any], bool]
_LATER = "is not implemented yet"

# Fields that exist, with the values that ask for nothing, and why the others are refused.
_UNSUPPORTED: dict[str, tuple[_Harmless, str]] = {
    "tools": (lambda value: value == [], _LATER),
    "tool_choice": (lambda value: value == "none", "needs tools, which are not implemented yet"),
    "functions": (lambda value: value == [], _LATER),
    "function_call": (lambda value: value == "none", _LATER),
    "response_format": (_is_text_format, "of another type than text " + _LATER),
    "modalities": (lambda value: value == ["text"], "other than ['text'] cannot be served by a text model"),
    "audio": (lambda value: False, "cannot be served by a text model"),
    "prediction": (lambda value: False, _LATER),
    "web_search_options": (lambda value: False, "cannot be served: this server searches nothing"),
    "verbosity": (lambda value: value == "medium", "other than 'medium' " + _LATER),
    "suffix": (lambda value: value == "", "is not supported: no model here fills in the middle"),
    "structured_outputs": (lambda value: value == {}, _LATER),
    "guided_json": (lambda value: False, _LATER),
    "guided_regex": (lambda value: False, _LATER),
    "guided_choice": (lambda value: False, _LATER),
    "guided_grammar": (lambda value: False, _LATER),
    "grammar": (lambda value: value == "", _LATER),
    "json_schema": (lambda value: False, _LATER),
    "regex": (lambda value: value == "", _LATER),
    "ebnf": (lambda value: value == "", _LATER),
    "use_beam_search": (lambda value: value is False, _LATER),
    "length_penalty": (lambda value: value == 1, "is of beam search, which is not implemented"),
    "early_stopping": (lambda value: value is False, "is of beam search, which is not implemented"),
    "truncate_prompt_tokens": (lambda value: False, _LATER),
    "prompt_embeds": (lambda value: False, _LATER),
    "logits_processors": (lambda value: value == [], "cannot be served: the server runs no code of clients"),
    "priority": (lambda value: value == 0, _LATER),
    "typical_p": (lambda value: value == 1, "other than 1 " + _LATER),
    "mirostat": (lambda value: value == 0, "other than 0 " + _LATER),
    "spaces_between_special_tokens": (lambda value: value is True, "false " + _LATER),
}


def refuse_unsupported(body: Body) -> None:
    """Raises ApiError for the first field that would have to change the answer and cannot."""
    for name, (is_harmless, reason) in _UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and not is_harmless(value):
            raise invalid(f"{name} {reason}.", name, "unsupported_parameter")


def parse_common(body: Body, model: Model, logprobs: int | None, max_tokens: int | None) -> Common:
    """The fields that both endpoints have. Raises ApiError, InvalidField."""
    refuse_unsupported(body)
    stream = body.boolean("stream")
    include_usage, continuous_usage = _parse_stream_options(body, stream)
    return Common(
        model=body.text("model") or "",
        params=_sampling_params(body, model, logprobs, max_tokens),
        max_tokens=max_tokens,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=body.boolean("return_token_ids"),
        tokens_as_ids=body.boolean("return_tokens_as_token_ids"),
    )


def _sampling_params(body: Body, model: Model, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
    values: dict[str, Any] = dict(model.suggested)
    values |= {name: value for name in _SAMPLING if (value := body.get(name)) is not None}
    temperature, top_p = values.get("temperature"), values.get("top_p")
    if temperature is not None and not (type(temperature) in (int, float) and 0 <= temperature <= 2):
        refuse("temperature", "a number from 0 to 2", temperature)
    if isinstance(top_p, (int, float)) and not isinstance(top_p, bool) and top_p == 0:
        values["top_p"] = SMALLEST_TOP_P
    for name in ("stop", "cache_salt"):
        for text in texts if isinstance(texts := values.get(name), list) else [texts]:
            if isinstance(text, str):
                require_encodable(text, name)
    if body.get("logit_bias") is not None:
        values["logit_bias"] = _logit_bias(body.get("logit_bias"))
    for name, count in (("logprobs", logprobs), ("prompt_logprobs", values.get("prompt_logprobs"))):
        if isinstance(count, int) and count > LARGEST_LOGPROBS:
            refuse(name, f"at most {LARGEST_LOGPROBS}", count)
    # A prompt that is only scored still takes one step, whose token is then left out.
    return SamplingParams(**values, logprobs=logprobs, max_tokens=None if max_tokens is None else max(max_tokens, 1))


def _logit_bias(given: object) -> dict[int, Any]:
    if not isinstance(given, dict):
        refuse("logit_bias", "an object from token ids to numbers", given)
    bias = {}
    for key, value in given.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            refuse("logit_bias", "an object whose keys are token ids", key)
        bias[int(key)] = value
    return bias


def _parse_stream_options(body: Body, stream: bool) -> tuple[bool, bool]:
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not isinstance(options, dict):
        refuse("stream_options", "an object", options)
    if not stream:
        raise invalid("stream_options is only allowed when stream is true.", "stream_options", "invalid_value")
    values = Body(options)
    include_usage = values.boolean("include_usage")
    return include_usage, include_usage and values.boolean("continuous_usage_stats")


def require_room(num_prompt_tokens: int, max_tokens: int | None, model: Model, param: str) -> None:
    """Raises ApiError where prompt and wished-for answer are longer than the context together."""
    if max_tokens is not None and num_prompt_tokens + max_tokens > model.max_model_len:
        raise invalid(
            f"This model's maximum context length is {model.max_model_len} tokens, but {num_prompt_tokens} in the "
            f"prompt and {max_tokens} of {param} make {num_prompt_tokens + max_tokens}. Ask for less, or leave it out.",
            param,
            "context_length_exceeded",
        )


def require_encodable(text: str, param: str) -> str:
    """`text`, if it is Unicode. Raises ApiError for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(f"{param} holds half a surrogate pair, which is no text.", param, "invalid_value") from None
    return text
