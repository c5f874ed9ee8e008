"""/v1/chat/completions, asked by OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import openai
import pytest
from enginery.runtime.chat_template import ChatTemplate
from enginery.runtime.tokenizer import Tokenizer

from ..conftest import null_engine
from .conftest import Served, serving_engine

USER = [{"role": "user", "content": "Tell me a story."}]


def ask(served: Served, **values: Any) -> Any:
    values = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 12, **values}
    return served.openai.chat.completions.create(**values)


def refuse(served: Served, param: str | None, status: int = 400, **values: Any) -> str:
    body = {"model": "tiny", "messages": USER, "max_tokens": 4, **values}
    answer = served.post("/v1/chat/completions", {key: value for key, value in body.items() if value is not ...})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    return str(error["message"])


def test_answer_has_openais_shape(served: Served) -> None:
    answer = ask(served)
    choice = answer.choices[0]
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", "tiny", 1)
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert choice.finish_reason == "length"
    prompt = served.engine.tokenizer.encode("<|start|>user\nTell me a story.<|end|>\n<|start|>assistant\n")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(prompt) + 12
    wanted = served.engine.generate([prompt], _greedy(12))[0].outputs[0].text
    assert choice.message.content == wanted


def _greedy(max_tokens: int) -> Any:
    from enginery import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens)


def test_stream_is_the_answer_in_parts(served: Served) -> None:
    whole = ask(served, max_tokens=30)
    chunks = list(ask(served, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert parts[-1].choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(part.usage is None for part in parts)


def test_no_usage_unless_asked_for(served: Served) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in ask(served, stream=True))


def test_continuous_usage_counts_up(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in ask(served, stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_several_choices_are_told_apart(served: Served) -> None:
    whole = ask(served, n=3, temperature=1, seed=5)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert whole.usage.completion_tokens == 36
    texts, finished = ["", "", ""], []
    for chunk in ask(served, n=3, temperature=1, seed=5, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(finished) == [0, 1, 2]


def test_logprobs_spell_the_text(served: Served) -> None:
    answer = ask(served, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12
    data = b"".join(bytes(entry.bytes) for entry in entries if entry.bytes is not None)
    assert data.decode(errors="replace") == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0] <= 0
    streamed = [
        entry
        for chunk in ask(served, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries


def test_logprobs_without_top(served: Served) -> None:
    for extra in ({}, {"top_logprobs": 0}):
        entries = ask(served, logprobs=True, **extra).choices[0].logprobs.content
        assert all(entry.top_logprobs == [] for entry in entries)


def test_max_completion_tokens_wins(served: Served) -> None:
    assert ask(served, max_tokens=5, max_completion_tokens=3).usage.completion_tokens == 3


def test_without_a_limit_the_context_is_one(served: Served) -> None:
    answer = ask(served, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_parts_are_joined(served: Served) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story."}]
    joined = ask(served, messages=[{"role": "user", "content": "Tell me\na story."}])
    assert ask(served, messages=[{"role": "user", "content": parts}]).choices == joined.choices


def test_developer_is_the_system(served: Served) -> None:
    answers = [ask(served, messages=[{"role": role, "content": "Hi"}]) for role in ("developer", "system")]
    assert answers[0].choices == answers[1].choices


def test_tool_turns_are_accepted(served: Served) -> None:
    call = {"id": "call_123456", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_123456", "content": "7"},
    ]
    assert ask(served, messages=messages).choices[0].finish_reason == "length"


def test_goes_on_with_the_last_message(served: Served) -> None:
    messages = [*USER, {"role": "assistant", "content": "the cat"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = ask(served, messages=messages, extra_body=extra)
    prompt = "<|start|>user\nTell me a story.<|end|>\n<|start|>assistant\nthe cat"
    assert answer.usage.prompt_tokens == len(served.engine.tokenizer.encode(prompt))
    assert answer.choices[0].message.content.startswith("the cat")
    streamed = ask(served, messages=messages, extra_body=extra, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.choices[0].message.content


def test_stop_strings_never_show(served: Served) -> None:
    text = ask(served, max_tokens=60).choices[0].message.content
    stop = text[10:13]
    answer = ask(served, max_tokens=60, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == text[: text.find(stop)]
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(served, max_tokens=60, stop=[stop], stream=True)]
    assert "".join(parts) == answer.choices[0].message.content


def test_token_ids_if_asked_for(served: Served) -> None:
    answer = ask(served, extra_body={"return_token_ids": True})
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    assert len(answer.choices[0].token_ids) == 12


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("messages", {"messages": ...}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hello"}),
        ("messages[0]", {"messages": [123]}),
        ("messages[0].role", {"messages": [{}]}),
        ("messages[0].role", {"messages": [{"role": 123, "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "system", "content": 123}]}),
        ("messages[1].role", {"messages": [*USER, {}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        (
            "messages[0].content[0]",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
        ("messages[0].content", {"messages": [{"role": "user", "content": "\ud83e"}]}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 512}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": "x"}),
        ("top_p", {"top_p": 1.1}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("n", {"n": 0}),
        ("n", {"n": 1000}),
        ("seed", {"seed": 1 << 63}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options", {"stream": True, "stream_options": 3}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logprobs", {"logprobs": 3}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"1": "x"}}),
        ("logit_bias", {"logit_bias": {"99999": 1}}),
        ("min_tokens", {"min_tokens": 5}),
        ("ignore_eos", {"ignore_eos": 123}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("chat_template_kwargs", {"chat_template_kwargs": 3}),
        ("chat_template_kwargs", {"chat_template_kwargs": []}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("grammar", {"grammar": 'root ::= "x"'}),
        ("json_schema", {"json_schema": {"type": "object"}}),
        ("regex", {"regex": "a+"}),
        ("ebnf", {"ebnf": 'root ::= "x"'}),
        ("tool_choice", {"tool_choice": "auto"}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("structured_outputs", {"structured_outputs": {"json": {}}}),
        ("best_of", {"best_of": 3}),
        ("bad_words", {"bad_words": ["x"]}),
    ],
)
def test_refuses_by_name(served: Served, param: str, values: dict[str, Any]) -> None:
    message = refuse(served, param, **values)
    assert len(message) < 500


def test_harmless_parameters_are_ignored(served: Served) -> None:
    answer = ask(
        served,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        top_p=0,
        stop=[],
        logit_bias={},
        extra_body={"never_heard_of": 1, "tools": [], "best_of": 1},
    )
    assert answer.choices[0].finish_reason == "length"


def test_prompt_beyond_the_context(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, messages=[{"role": "user", "content": "x " * 600}])
    assert caught.value.code == "context_length_exceeded"
    assert "512" in str(caught.value)


def test_logit_bias_forces_and_forbids(served: Served) -> None:
    free = ask(served, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    forced = ask(served, max_tokens=3, logit_bias={"40": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [40, 40, 40]
    other = ask(served, max_tokens=1, logit_bias={str(free): -100}, extra_body={"return_token_ids": True})
    assert other.choices[0].token_ids != [free]


def test_template_errors_are_the_clients(byte_level: Tokenizer) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    engine = null_engine(byte_level, model={"chat_template": template})
    with serving_engine(engine) as served:
        assert "roles must alternate" in refuse(served, None)
    with serving_engine(null_engine(byte_level, model={"chat_template": None})) as served:
        assert "no chat template" in refuse(served, "messages")
        assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_template_without_end_holds_nobody_up(byte_level: Tokenizer) -> None:
    endless = "{% if messages[0].content == 'loop' %}" + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    template = ChatTemplate(endless + "{% endif %}x", {})
    with serving_engine(null_engine(byte_level, model={"chat_template": template})) as served:
        template.compile()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            body = {"messages": [{"role": "user", "content": "loop"}], "max_tokens": 1}
            asked = pool.submit(served.post, "/v1/chat/completions", body)
            while not served.state.in_flight:
                assert not asked.done()
            assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
            assert not asked.done()
            assert asked.result().status_code == 400
            assert "computes for more than" in asked.result().json()["error"]["message"]
        assert served.post("/v1/chat/completions", {"messages": USER, "max_tokens": 1}).status_code == 200


def test_the_models_own_sampling_is_the_default(byte_level: Tokenizer) -> None:
    engine = null_engine(byte_level, model={"suggested": {"temperature": 0.0}})
    with serving_engine(engine) as served:
        body = {"messages": USER, "max_tokens": 10}
        answers = [served.post("/v1/chat/completions", body).json()["choices"] for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        hot = [
            served.post("/v1/chat/completions", {**body, "temperature": 1}).json()["choices"][0]["message"]
            for _ in range(3)
        ]
        assert len({message["content"] for message in hot}) > 1


def test_reasoning_effort_and_documents_reach_the_template(byte_level: Tokenizer) -> None:
    template = ChatTemplate("{{ reasoning_effort }}{{ documents|length }}{{ x }}", {})
    with serving_engine(null_engine(byte_level, model={"chat_template": template})) as served:
        body = {"messages": USER, "max_tokens": 1, "reasoning_effort": "low", "documents": [{}, {}]}
        answer = served.post("/v1/chat/completions", {**body, "chat_template_kwargs": {"x": "yz"}}).json()
        assert answer["usage"]["prompt_tokens"] == len("low2yz")
