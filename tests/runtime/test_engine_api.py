"""The Python API on the null executor: vLLM's names and shapes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from enginery import Engine, EngineryError, SamplingParams
from enginery.engines.errors import RequestError
from enginery.runtime.requests import PromptTooLong, RequestOutputKind
from enginery.runtime.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8)
MakeEngine = Callable[..., Engine]


def texts(outputs: Any) -> list[str]:
    return [choice.text for output in outputs for choice in output.outputs]


def test_prompts_may_have_every_form(engine: Engine) -> None:
    token_ids = engine.tokenizer.encode("the cat")
    forms: list[Any] = [
        "the cat",
        ["the cat"],
        token_ids,
        [token_ids],
        {"prompt": "the cat"},
        [{"prompt_token_ids": token_ids}],
    ]
    results = [engine.generate(form, GREEDY) for form in forms]
    assert all(len(result) == 1 and result[0].prompt_token_ids == token_ids for result in results)
    assert len({result[0].outputs[0].text for result in results}) == 1
    assert results[0][0].prompt == "the cat"
    assert results[2][0].prompt is None
    assert engine.generate([]) == []


def test_outputs_come_in_order(engine: Engine) -> None:
    prompts = [f"number {index}" for index in range(20)]
    params = [GREEDY.clone(max_tokens=1 + index % 5) for index in range(20)]
    together = engine.generate(prompts, params)
    assert [output.prompt for output in together] == prompts
    assert [len(output.outputs[0].token_ids) for output in together] == [1 + index % 5 for index in range(20)]
    assert texts(together) == [
        text for prompt, each in zip(prompts, params, strict=True) for text in texts(engine.generate(prompt, each))
    ]


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", 3])
def test_parameters_of_another_kind_are_refused(engine: Engine, params: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams, or a list of them"):
        engine.generate("a", params)


def test_bos_is_added_to_text_alone(make_engine: MakeEngine, sentencepiece: Tokenizer) -> None:
    engine = make_engine(sentencepiece)
    assert engine.generate("the cat", GREEDY)[0].prompt_token_ids[0] == 1
    assert engine.generate([5, 6], GREEDY)[0].prompt_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ([[1, 9999]], "Token id 9999 is out of vocabulary: wanted 0 to"),
        ([[1, -1]], "Token id -1"),
        ([["a"]], "text or a list of token ids"),
        ([[1, True]], "text or a list of token ids"),
        ([3.5], "text or a list of token ids"),
        (7, "prompts must be"),
        ({"prompt": "x", "images": 1}, "no images"),
        ([[1] * 256], "maximum context length is 256 tokens, but the prompt has 256"),
    ],
)
def test_prompts_that_cannot_be(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt, GREEDY)
    assert engine.generate("the", GREEDY)


def test_one_bad_prompt_stops_none_that_runs(engine: Engine) -> None:
    prompts: list[Any] = ["the", [1] * 1000]
    with pytest.raises(PromptTooLong):
        engine.generate(prompts, GREEDY)
    assert engine.stats()["generation_tokens"] == 0


def test_params_that_no_vocabulary_has(engine: Engine) -> None:
    with pytest.raises(RequestError, match="logit_bias names token 9999"):
        engine.generate("the", SamplingParams(logit_bias={9999: 1.0}))
    with pytest.raises(RequestError, match="logprobs must be at most the vocabulary"):
        engine.generate("the", SamplingParams(logprobs=9999))
    with pytest.raises(RequestError, match="2 prompts, but 1 SamplingParams"):
        engine.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="must be SamplingParams"):
        engine.generate("a", {"temperature": 1})  # type: ignore[arg-type]


def test_logprobs_have_vllms_shape(engine: Engine) -> None:
    output = engine.generate("the cat in", GREEDY.clone(logprobs=3, prompt_logprobs=0))[0]
    choice = output.outputs[0]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(entry) for entry in output.prompt_logprobs[1:] if entry] == [[t] for t in output.prompt_token_ids[1:]]
    assert choice.logprobs is not None
    assert choice.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True))
    )
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert len(entry) == 3
        assert entry[token].rank == 1
        assert entry[token].decoded_token == engine.tokenizer.token_text(token)


def test_no_logprobs_unless_asked_for(engine: Engine) -> None:
    choice = engine.generate("the", GREEDY)[0].outputs[0]
    assert (choice.logprobs, choice.cumulative_logprob) == (None, None)


def test_end_token_ends_tokens_but_is_not_in_the_text(engine: Engine) -> None:
    end = engine.model.stop_token_ids[0]
    params = GREEDY.clone(logit_bias={end: 100.0}, min_tokens=2, skip_special_tokens=False)
    choice = engine.generate("the", params)[0].outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
    assert choice.token_ids[-1] == end
    assert len(choice.token_ids) == 3
    assert "<|end|>" not in choice.text
    shown = engine.generate("the", params.clone(include_stop_str_in_output=True))[0].outputs[0]
    assert shown.text == choice.text + "<|end|>"
    ignored = engine.generate("the", params.clone(ignore_eos=True))[0].outputs[0]
    assert (ignored.finish_reason, len(ignored.token_ids)) == ("length", 8)


def test_stop_token_is_named(engine: Engine) -> None:
    choice = engine.generate("the", GREEDY.clone(logit_bias={5: 100.0}, stop_token_ids=[5]))[0].outputs[0]
    assert (choice.finish_reason, choice.stop_reason, choice.token_ids, choice.text) == ("stop", 5, [5], "")


def test_stop_string_ends_across_tokens(engine: Engine) -> None:
    free = engine.generate("the", GREEDY.clone(max_tokens=100, ignore_eos=True))[0].outputs[0]
    stop = free.text[20:24]
    at = free.text.find(stop)
    choice = engine.generate("the", GREEDY.clone(max_tokens=100, ignore_eos=True, stop=["\0never", stop]))[0].outputs[0]
    assert (choice.finish_reason, choice.stop_reason, choice.text) == ("stop", stop, free.text[:at])
    assert choice.token_ids == free.token_ids[: len(choice.token_ids)]
    included = GREEDY.clone(max_tokens=100, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert engine.generate("the", included)[0].outputs[0].text == free.text[: at + len(stop)]


def test_stop_string_ends_the_request_in_the_core(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=8000)
    params = GREEDY.clone(max_tokens=None, ignore_eos=True)
    stop = engine.generate("the", params.clone(max_tokens=3))[0].outputs[0].text[-1:]
    assert engine.generate("the", params.clone(stop=stop))[0].outputs[0].finish_reason == "stop"
    engine.generate("the", GREEDY)
    assert engine.stats()["finished"] == {"stop": 0, "length": 2, "abort": 1, "error": 0}


def test_no_stop_string_before_min_tokens(engine: Engine) -> None:
    free = engine.generate("the", GREEDY.clone(max_tokens=30, ignore_eos=True))[0].outputs[0]
    stop = free.text[0]
    choice = engine.generate("the", GREEDY.clone(max_tokens=30, min_tokens=29, ignore_eos=True, stop=stop))[0].outputs[
        0
    ]
    assert len(choice.token_ids) >= 29


def test_n_outputs_differ_and_repeat(engine: Engine) -> None:
    params = SamplingParams(n=3, seed=(1 << 63) - 2, max_tokens=8)
    first, second = (engine.generate("the", params)[0] for _ in range(2))
    assert [choice.index for choice in first.outputs] == [0, 1, 2]
    assert len(set(texts([first]))) == 3
    assert texts([first]) == texts([second])
    assert engine.generate("the", params.clone(n=1))[0].outputs[0].text == first.outputs[0].text


def test_max_tokens_end_at_the_context(engine: Engine) -> None:
    choice = engine.generate([1] * 250, SamplingParams(max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert (choice.finish_reason, len(choice.token_ids)) == ("length", 6)


def test_without_text(engine: Engine) -> None:
    choice = engine.generate("the", GREEDY.clone(detokenize=False))[0].outputs[0]
    assert (choice.text, len(choice.token_ids)) == ("", 8)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_stream_is_what_generate_gives(engine: Engine, kind: RequestOutputKind) -> None:
    params = GREEDY.clone(n=2, temperature=1.0, seed=1, max_tokens=20, logprobs=1, output_kind=kind)
    wanted = engine.generate("the", params)[0]

    async def collect() -> list[Any]:
        return [output async for output in engine.generate_stream("the", params)]

    outputs = asyncio.run(collect())
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    if kind is RequestOutputKind.DELTA:
        for index, choice in enumerate(wanted.outputs):
            parts = [part for output in outputs for part in output.outputs if part.index == index]
            assert "".join(part.text for part in parts) == choice.text
            assert [token for part in parts for token in part.token_ids] == choice.token_ids
            assert [entry for part in parts for entry in part.logprobs] == choice.logprobs
    else:
        assert outputs[-1].outputs == wanted.outputs
        assert kind is not RequestOutputKind.FINAL_ONLY or len(outputs) == 1


def test_closing_a_stream_frees_its_request(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=8000)

    async def take_one() -> None:
        stream = engine.generate_stream("the", GREEDY.clone(max_tokens=None, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(take_one())
    engine.generate("the", GREEDY)
    assert engine.stats()["finished"]["abort"] == 1
    assert engine.stats()["num_running"] == 0


def test_a_failed_step_fails_its_request_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(spec={"isa": "fail_on=7"})
    with pytest.raises(EngineryError, match="fails on request"):
        engine.generate([7, 7], GREEDY)
    assert engine.generate([8, 8], GREEDY.clone(logit_bias={7: -100.0}))
    assert engine.failure is None


def test_damage_ends_serving(engine: Engine) -> None:
    engine._fail("weights.rank0.safetensors: chunk 3 is damaged")
    with pytest.raises(EngineryError, match="chunk 3 is damaged"):
        engine.generate("the", GREEDY)
    assert engine.failure == "weights.rank0.safetensors: chunk 3 is damaged"


def test_close_ends_what_runs(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=8000)
    reasons: list[str | None] = []

    async def run() -> None:
        params = GREEDY.clone(max_tokens=None, ignore_eos=True)
        async for output in engine.generate_stream("the", params):
            if not reasons and output.outputs[0].token_ids:
                closing = threading.Thread(target=engine.close)
                closing.start()
                reasons.append(None)
            reasons.append(output.outputs[0].finish_reason)

    asyncio.run(run())
    assert reasons[-1] == "abort"
    engine.close()
    with pytest.raises(EngineryError, match="closed"):
        engine.generate("the", GREEDY)
    assert engine.failure == "the engine is closed"


def test_context_manager_closes(make_engine: MakeEngine) -> None:
    with make_engine() as engine:
        assert engine.failure is None
    assert engine.failure is not None


def test_many_threads_at_once(engine: Engine) -> None:
    wanted = [texts(engine.generate(f"thread {index}", GREEDY)) for index in range(8)]
    got: dict[int, list[str]] = {}

    def work(index: int) -> None:
        got[index] = [text for _ in range(5) for text in texts(engine.generate(f"thread {index}", GREEDY))]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {index: wanted[index] * 5 for index in range(8)}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_is_told_to_load_again(engine: Engine) -> None:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            engine.generate("the", GREEDY)
        except EngineryError as error:
            os.write(write, str(error).encode())
        finally:
            engine.close()  # waits for no thread
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        assert "Load it again here" in told.read()
    assert os.waitpid(child, 0)[1] == 0
    assert texts(engine.generate("the", GREEDY))


def test_a_text_of_many_contexts_is_not_tokenized(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 100 * engine.model.max_model_len
    assert len(engine.encode(" " * length)) > engine.model.max_model_len
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("was tokenized"))
    with pytest.raises(PromptTooLong, match="at least"):
        engine.generate("the" * length, GREEDY)


def test_warming_up_makes_the_template_ready(engine: Engine) -> None:
    engine.warm_up()
    template = engine.model.chat_template
    assert template is not None
    assert template.compiled
