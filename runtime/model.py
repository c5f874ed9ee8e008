"""What an engine says of its model beyond the numbers: how it ends, how it likes to be sampled, how it chats."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from ..engines.errors import EngineFormatError
from .chat_template import ChatTemplate, read_chat_template
from .files import EngineFiles
from .tokenizer import Tokenizer

# What generation_config.json may suggest, and the range in which a suggestion is one.
_SUGGESTIONS = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True)
class Model:
    """A served model.

    stop_token_ids     the model's end tokens
    suggested          sampling parameters for requests over HTTP that leave them out
    """

    name: str
    vocab_size: int
    max_model_len: int
    stop_token_ids: tuple[int, ...] = ()
    suggested: dict[str, float] = field(default_factory=dict)
    chat_template: ChatTemplate | None = None


def read_model(files: EngineFiles, max_model_len: int) -> Model:
    """Everything but the tokenizer. Raises EngineFormatError."""
    generation, config = files.read_json("generation_config.json"), files.read_json("config.json")
    tokenizer_config = files.read_json("tokenizer_config.json")
    ends = generation if generation.get("eos_token_id") is not None else config
    where = "generation_config.json" if ends is generation else "config.json"
    return Model(
        name=files.directory.resolve().name,
        vocab_size=files.manifest.model.vocab_size,
        max_model_len=max_model_len,
        stop_token_ids=_token_ids(ends.get("eos_token_id"), f"{files.path(where)}: eos_token_id"),
        suggested=_suggested(generation),
        chat_template=read_chat_template(files.read_text("chat_template.jinja"), tokenizer_config),
    )


def load_tokenizer(files: EngineFiles) -> Tokenizer:
    """The engine's tokenizer. Raises EngineFormatError."""
    data = files.read("tokenizer.json")
    if data is None:
        raise EngineFormatError(f"{files.directory}: no tokenizer.json. Build the engine again.")
    return Tokenizer.from_bytes(data, str(files.path("tokenizer.json")))


def start_loading_tokenizer(files: EngineFiles) -> Future[Tokenizer]:
    """The tokenizer as it will be: large ones take longer to read than weights to map."""
    future: Future[Tokenizer] = Future()

    def load() -> None:
        try:
            future.set_result(load_tokenizer(files))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=load, name="enginery-tokenizer", daemon=True).start()
    return future


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if len(values) > 4096 or not all(isinstance(item, int) and 0 <= item < 1 << 31 for item in values):
        raise EngineFormatError(f"{where}: wanted a token id or a list of them. Build the engine again.")
    return tuple(values)


def _suggested(generation: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, (low, high) in _SUGGESTIONS.items():
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            found[name] = int(value) if name == "top_k" else float(value)
    return found
