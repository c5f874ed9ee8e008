"""The Python API: an engine that is loaded, generates and is closed. Names and shapes are vLLM's."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import weakref
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..engines.errors import EngineFormatError, EngineryError, RequestError
from .assembly import Assembly
from .config import EngineConfig
from .files import EngineFiles, open_engine
from .histograms import Observations
from .integrity import BackgroundWork, verify_weights
from .loader import CoreSettings, check_target, read_ranks
from .model import Model, read_model, start_loading_tokenizer
from .prepare import prepare_core
from .pump import DeltaStream, Gathering, Pump, Sink
from .requests import InvalidField, PromptTooLong, RequestOutput, RequestOutputKind, SamplingParams, short
from .sequence import Sequence
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ._core import Core
    from .gpus import Gpu

# A text, token ids, or a dict with "prompt" or "prompt_token_ids".
Prompt: TypeAlias = str | list[int] | Mapping[str, Any]
_INT64 = 1 << 64


class Engine:
    """An engine in memory, with its serving loop running. All methods may be called from any thread.

    model       what it is; config: how it is run
    """

    def __init__(
        self,
        core: Core,
        model: Model,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        files: EngineFiles | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self.files = files
        self.tokenizer = tokenizer
        self._core = core
        self._damage: str | None = None
        self._background: BackgroundWork | None = None
        if files is not None:
            # Not of this object, which could then never be collected.
            owner = weakref.ref(self)
            self._background = BackgroundWork(
                None if self.config.verify else files,
                lambda damage: _on_damage(owner, damage),
                core.settle_weights,
                core.stop_settling,
            )
        self._pump = Pump(core, self._background.begin if self._background else lambda: None)
        self._request_numbers = itertools.count()
        self._process = os.getpid()
        # Also at interpreter exit: the loop's thread must be gone before Python is.
        self._close = weakref.finalize(self, _close, self._pump, self._background, core, self._process)

    @staticmethod
    def load(directory: str | os.PathLike[str], **knobs: Any) -> Engine:
        """Loads the engine at `directory`. knobs: the fields of EngineConfig. Raises EngineryError."""
        return load_engine(Path(directory), EngineConfig.of(knobs))

    def generate(
        self,
        prompts: Prompt | AbstractSequence[Prompt],
        sampling_params: SamplingParams | AbstractSequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput for each prompt, in their order.

        prompts          a text, token ids, a dict, or a list of these; token ids are used as they are, without a BOS
        sampling_params  one for all, or one for each

        Raises RequestError, before anything runs, for a request that cannot be; EngineryError where one fails.
        """
        several = _as_list(prompts)
        params = _params_of_each(sampling_params, len(several))
        prepared = [self.prepare(prompt, each) for prompt, each in zip(several, params, strict=True)]
        requests: list[Request] = []
        try:
            for text, token_ids, each in prepared:
                assembly = Assembly(str(next(self._request_numbers)), text, token_ids, each)
                requests.append(self.start(token_ids, each, Gathering(each.n, assembly.add), assembly))
            for request in requests:
                assert isinstance(request.sink, Gathering)
                request.sink.done.wait()
        except BaseException:
            for request in requests:
                request.abort()
            raise
        assemblies = [request.assembly for request in requests if request.assembly is not None]
        for assembly in assemblies:
            assembly.require_success()
        return [assembly.output(RequestOutputKind.FINAL_ONLY) for assembly in assemblies]

    async def generate_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """RequestOutputs as tokens are made, of the kind that sampling_params.output_kind says.

        The request is aborted when the iterator is closed or its task cancelled. Raises RequestError, EngineryError.
        """
        text, token_ids, params = self.prepare(prompt, sampling_params or SamplingParams())
        assembly = Assembly(str(next(self._request_numbers)), text, token_ids, params)
        stream = DeltaStream(params.n)
        request = self.start(token_ids, params, stream)
        try:
            while deltas := await stream.get():
                for delta in deltas:
                    assembly.add(delta)
                assembly.require_success()
                if params.output_kind is not RequestOutputKind.FINAL_ONLY or assembly.finished:
                    yield assembly.output(params.output_kind)
        finally:
            request.abort()

    def prepare(self, prompt: object, params: SamplingParams) -> tuple[str | None, list[int], SamplingParams]:
        """(text, token ids, params) of a prompt, checked as far as Python knows. Raises RequestError."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, got {short(params)}.")
        if isinstance(prompt, Mapping):
            unknown = [str(key) for key in prompt if key not in ("prompt", "prompt_token_ids", "cache_salt")]
            if unknown:
                raise RequestError(f"A prompt has no {', '.join(unknown)}; known are prompt and prompt_token_ids.")
            if salt := prompt.get("cache_salt"):
                params = params.clone(cache_salt=salt)
            text, given = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            text, given = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if given is None and isinstance(text, str):
            token_ids = self.encode(text)
        else:
            token_ids = _token_ids(given)
        self.check_prompt(token_ids)
        return text if isinstance(text, str) else None, token_ids, params

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError, for a text that is far too long at once."""
        longest = self.model.max_model_len
        # A text of many times the context would be tokenized for seconds, only to be refused.
        if len(text) > longest and (least := self.tokenizer.fewest_tokens(text)) >= longest:
            raise _too_long(longest, f"at least {least} tokens")
        return self.tokenizer.encode(text, add_special_tokens)

    def check_prompt(self, token_ids: list[int]) -> None:
        """Raises InvalidField or PromptTooLong for token ids that cannot be a prompt here."""
        vocab_size, longest = self.model.vocab_size, self.model.max_model_len
        if not token_ids:
            raise InvalidField("The prompt is empty: it has no tokens.", "prompt")
        if len(token_ids) >= longest:
            raise _too_long(longest, str(len(token_ids)))
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidField(f"Token id {short(wrong)} is out of vocabulary: wanted 0 to {vocab_size - 1}.", "prompt")

    def start(
        self,
        token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        assembly: Assembly | None = None,
        first_index: int = 0,
    ) -> Request:
        """Submits the n outputs of a prompt, numbered from `first_index`. Raises RequestError, EngineryError."""
        if self._damage is not None:
            raise EngineFormatError(self._damage)
        if not self._close.alive:
            raise EngineryError("The engine is closed and takes no requests. Load it again.")
        if os.getpid() != self._process:
            raise EngineryError(
                f"The engine was loaded in process {self._process}; a fork has none of its threads. Load it again here."
            )
        self._check_tokens_of(params)
        request = Request(self._pump, sink, assembly)
        values = self._core_request(token_ids, params)
        try:
            for index in range(params.n):
                if params.seed is not None:
                    values["seed"] = _signed(params.seed + index)
                sequence = Sequence(first_index + index, self.tokenizer, token_ids, params, self.model.stop_token_ids)
                request.ids.append(self._pump.submit(values, sequence, sink))
        except BaseException:
            request.abort()
            raise
        return request

    def _check_tokens_of(self, params: SamplingParams) -> None:
        vocab_size = self.model.vocab_size
        for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if wrong := [token for token in tokens or () if token >= vocab_size]:
                raise InvalidField(
                    f"{name} names token {', '.join(map(str, wrong[:10]))}, which is out of vocabulary: wanted 0 to "
                    f"{vocab_size - 1}.",
                    name,
                )
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > vocab_size:
                raise InvalidField(f"{name} must be at most the vocabulary's size, {vocab_size}, got {count}.", name)

    def _core_request(self, token_ids: list[int], params: SamplingParams) -> dict[str, Any]:
        room = self.model.max_model_len - len(token_ids)
        ends = () if params.ignore_eos else self.model.stop_token_ids
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return {
            "prompt_token_ids": token_ids,
            "max_tokens": max_tokens,
            "open_ended": params.max_tokens is None,
            "min_tokens": min(params.min_tokens, max_tokens),
            "stop_token_ids": [*ends, *(params.stop_token_ids or ())],
            "temperature": float(params.temperature),
            "top_k": max(params.top_k, 0),
            "top_p": float(params.top_p),
            "min_p": float(params.min_p),
            "presence_penalty": float(params.presence_penalty),
            "frequency_penalty": float(params.frequency_penalty),
            "repetition_penalty": float(params.repetition_penalty),
            "logit_bias": {token: float(bias) for token, bias in (params.logit_bias or {}).items()},
            "logprobs": -1 if params.logprobs is None else params.logprobs,
            "prompt_logprobs": -1 if params.prompt_logprobs is None else params.prompt_logprobs,
            "cache_salt": params.cache_salt,
        }

    @property
    def failure(self) -> str | None:
        """Why the engine serves no more; None while it does."""
        if self._damage is not None:
            return self._damage
        if not self._close.alive:
            return "the engine is closed"
        internal_error = self._core.stats()["internal_error"]
        return None if internal_error is None else str(internal_error)

    @property
    def observations(self) -> Observations:
        """Latencies and finish reasons so far."""
        return self._pump.observations

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the loop (see Core.stats)."""
        return self._core.stats()

    def warm_up(self) -> None:
        """Does now what the first request would else wait for: the chat template, the tokenizer's threads."""
        self.tokenizer.encode("Once upon a time")
        if self.model.chat_template is not None:
            with contextlib.suppress(RequestError):  # which requests are told, when they need it
                self.model.chat_template.compile()

    def wait_until_verified(self, timeout_s: float | None = None) -> bool:
        """Waits until the weights are hashed; False if that takes longer. Raises EngineFormatError for damage."""
        if self._background is not None:
            self._background.begin()
            if not self._background.verified.wait(timeout_s):
                return False
        if self._damage is not None:
            raise EngineFormatError(self._damage)
        return True

    def wait_until_settled(self, timeout_s: float | None = None) -> str | None:
        """Waits until the weights lie where they stay (EngineConfig.weight_pages); None if that takes longer.

        Says where, or "" if nothing was to be done. It begins when they are hashed.
        """
        if self._background is not None and not self._background.settled.wait(timeout_s):
            return None
        return str(self._core.stats()["weights_in"])

    def close(self) -> None:
        """Aborts what runs and frees everything. A second call does nothing."""
        self._close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fail(self, damage: str) -> None:
        self._damage = damage
        self._core.fail(damage)


class Request:
    """The outputs of one prompt while they run. ids: of the core."""

    def __init__(self, pump: Pump, sink: Sink, assembly: Assembly | None) -> None:
        self.ids: list[int] = []
        self.sink = sink
        self.assembly = assembly
        self._pump = pump

    def abort(self) -> None:
        """Ends those that still run and frees what they hold; nothing more is heard of them."""
        self._pump.abort(self.ids)


def load_engine(directory: Path, config: EngineConfig, gpus: list[Gpu] | None = None) -> Engine:
    """Loads the engine at `directory`. gpus: of each rank; None finds the machine's. Raises EngineryError."""
    files = open_engine(directory)
    tokenizer = start_loading_tokenizer(files)
    from ._core import cpu_features

    target = check_target(files, cpu_features())
    if target.is_cuda and gpus is None:
        from .gpus import find_gpus

        gpus = find_gpus(files, target, config)
    if config.verify:
        verify_weights(files)
    settings = prepare_core(files, read_ranks(files), target, config, gpus)
    model = read_model(files, settings.max_model_len)
    core = make_core(settings)
    try:
        return Engine(core, model, _result(tokenizer), config, files)
    except BaseException:
        core.close()
        raise


def make_core(settings: CoreSettings) -> Core:
    """The core for checked settings. Raises EngineryError."""
    from ._core import Core

    try:
        return Core(settings.spec, settings.config, settings.executor)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        # A number that no field of the core holds: the plan's forms are right, its values are not.
        raise EngineFormatError(
            f"The engine's plan holds what this runtime cannot: {str(error)[:500]}. Build the engine again."
        ) from None
    except MemoryError:
        raise EngineFormatError("The engine's plan wants more memory than there is. Build the engine again.") from None


def _result(tokenizer: Future[Tokenizer]) -> Tokenizer:
    return tokenizer.result()


def _close(pump: Pump, background: BackgroundWork | None, core: Core, process: int) -> None:
    if os.getpid() != process:
        # A fork has none of the threads: to wait for them, as the core does at its end, would be for ever.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))
        return
    if background is not None:
        background.stop()
    pump.close()


def _on_damage(owner: weakref.ref[Engine], damage: str) -> None:
    engine = owner()
    if engine is not None:
        engine._fail(damage)


def _too_long(longest: int, found: str) -> PromptTooLong:
    return PromptTooLong(
        f"This model's maximum context length is {longest} tokens, but the prompt has {found} and leaves no room for "
        f"an answer. Shorten it."
    )


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts, whatever form the caller chose."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(f"prompts must be text, token ids, or a list of these, got {short(prompts)}.")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]
    return list(prompts)


def _params_of_each(
    params: SamplingParams | AbstractSequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)):
        raise RequestError(f"sampling_params must be SamplingParams, or a list of them, got {short(params)}.")
    if len(params) != count:
        raise RequestError(f"{count} prompts, but {len(params)} SamplingParams: wanted one for all, or one for each.")
    return list(params)


def _token_ids(given: object) -> list[int]:
    if isinstance(given, (list, tuple)) and all(type(item) is int for item in given):
        return list(given)
    raise InvalidField(f"A prompt must be text or a list of token ids, got {short(given)}.", "prompt")


def _signed(seed: int) -> int:
    """`seed` as 64 bits with sign, wrapped around."""
    seed %= _INT64
    return seed - _INT64 if seed >= _INT64 // 2 else seed
