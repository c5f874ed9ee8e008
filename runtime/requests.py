"""What a caller asks for and gets: SamplingParams and RequestOutput, in vLLM's names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

from ..engines.errors import RequestError

LARGEST_N = 128
LARGEST_STOPS = 64
LARGEST_STOP_CHARACTERS = 4096
_INT64 = 1 << 63


class InvalidField(RequestError):
    """A request with a field that cannot be. param: the first such field."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """A request that does not fit the context."""


class RequestOutputKind(Enum):
    """What each RequestOutput of a stream holds: all so far, what is new, or everything once at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Raises InvalidField with all that is wrong.

    n                   outputs for each prompt; output i of a seeded request has the seed `seed + i`
    top_k               0 or -1: off
    seed                64 bits with sign; None: another one for each request
    stop                strings that end the output; they are not in its text
    stop_token_ids      token ids that end it, beside the model's own end tokens
    max_tokens          None: up to the context's end
    min_tokens          no stop token and no stop string before
    logprobs            k: of each token its own and the k likeliest, of the distribution that the model gave
    prompt_logprobs     the same for the prompt; the first token has none
    logit_bias          token id -> what is added to its logit
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        faults = [fault for name, check in _CHECKS.items() if (fault := check(name, getattr(self, name)))]
        faults += self._contradictions()
        if faults:
            raise InvalidField("; ".join(message for _, message in faults) + ".", faults[0][0])

    def _contradictions(self) -> list[Fault]:
        faults = []
        if _is_integer(self.max_tokens) and _is_integer(self.min_tokens) and self.min_tokens > (self.max_tokens or 0):
            faults.append(
                ("min_tokens", f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
            )
        if self.best_of is not None and self.best_of != self.n:
            faults.append(
                ("best_of", f"best_of is not implemented: leave it out or set it to n ({self.n}), got {self.best_of!r}")
            )
        for name in ("allowed_token_ids", "bad_words"):
            if getattr(self, name):
                faults.append((name, f"{name} is not implemented; logit_bias can exclude tokens"))
        if self.stop and not self.detokenize:
            faults.append(("stop", "stop strings need text: they cannot be used with detokenize=False"))
        return faults

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def clone(self, **changes: Any) -> SamplingParams:
        """These with some fields changed."""
        return replace(self, **changes)


Fault: TypeAlias = tuple[str, str]
_Check: TypeAlias = Callable[[str, Any], Fault | None]


def short(value: object) -> str:
    """`value` for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fault(name: str, wanted: str, value: object) -> Fault:
    return name, f"{name} must be {wanted}, got {short(value)}"


def _integer(low: int, high: int, optional: bool = False) -> _Check:
    wanted = f"at least {low}" if high >= _INT64 - 1 and low > -_INT64 else f"from {low} to {high}"

    def check(name: str, value: Any) -> Fault | None:
        if (optional and value is None) or (_is_integer(value) and low <= value <= high):
            return None
        return _fault(name, f"an integer {wanted}", value)

    return check


def _number(low: float, high: float, above: bool = False) -> _Check:
    wanted = f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"

    def check(name: str, value: Any) -> Fault | None:
        # NaN fails every comparison, and no bound is infinite.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and (low < value <= high if above else low <= value <= high):
            return None
        return _fault(name, wanted, value)

    return check


def _boolean(name: str, value: Any) -> Fault | None:
    return None if isinstance(value, bool) else _fault(name, "true or false", value)


def _stops(name: str, value: Any) -> Fault | None:
    strings = [value] if isinstance(value, str) else value
    if value is None or (isinstance(strings, (list, tuple)) and all(isinstance(item, str) for item in strings)):
        if len(strings or ()) > LARGEST_STOPS:
            return name, f"{name} must be at most {LARGEST_STOPS} strings, got {len(strings)}"
        if all(0 < len(item) <= LARGEST_STOP_CHARACTERS for item in strings or ()):
            return None
        return name, f"{name} must have strings of 1 to {LARGEST_STOP_CHARACTERS} characters, got {short(value)}"
    return _fault(name, "a string or a list of strings", value)


def _token_ids(name: str, value: Any) -> Fault | None:
    if value is None or (
        isinstance(value, (list, tuple)) and all(_is_integer(item) and 0 <= item < 1 << 31 for item in value)
    ):
        return None
    return _fault(name, "a list of token ids", value)


def _logit_bias(name: str, value: Any) -> Fault | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        return _fault(name, "a map from token ids to numbers", value)
    for token, bias in value.items():
        if not _is_integer(token) or not 0 <= token < 1 << 31:
            return _fault(name, "a map whose keys are token ids", token)
        if fault := _number(-100, 100)(f"{name}[{token}]", bias):
            return name, fault[1]
    return None


def _kind(name: str, value: Any) -> Fault | None:
    return None if isinstance(value, RequestOutputKind) else _fault(name, "a RequestOutputKind", value)


def _text(name: str, value: Any) -> Fault | None:
    return None if isinstance(value, str) and len(value) <= 4096 else _fault(name, "a short text", value)


def _anything(name: str, value: Any) -> Fault | None:
    return None


_CHECKS: dict[str, _Check] = {
    "n": _integer(1, LARGEST_N),
    "best_of": _anything,
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "temperature": _number(0, 1e6),
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(-1, (1 << 31) - 1),
    "min_p": _number(0, 1),
    "seed": _integer(-_INT64, _INT64 - 1, optional=True),
    "stop": _stops,
    "stop_token_ids": _token_ids,
    "ignore_eos": _boolean,
    "max_tokens": _integer(1, _INT64 - 1, optional=True),
    "min_tokens": _integer(0, _INT64 - 1),
    "logprobs": _integer(0, (1 << 31) - 1, optional=True),
    "prompt_logprobs": _integer(0, (1 << 31) - 1, optional=True),
    "detokenize": _boolean,
    "skip_special_tokens": _boolean,
    "include_stop_str_in_output": _boolean,
    "output_kind": _kind,
    "logit_bias": _logit_bias,
    "allowed_token_ids": _anything,
    "bad_words": _anything,
    "cache_salt": _text,
}


@dataclass(frozen=True)
class Logprob:
    """Of one token at one place. rank: from 1, the likeliest."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Of one position: the token itself first, then the likeliest.
PositionLogprobs: TypeAlias = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One output of a prompt. The stop token ends token_ids and is not in text.

    finish_reason   None while it runs; "stop", "length" or "abort"
    stop_reason     the stop string or stop token id that ended it; None for the model's own end token
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What came of one prompt. prompt: its text, None if it was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
