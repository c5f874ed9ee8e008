"""Chat templates give what transformers' apply_chat_template gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.errors import RequestError
from enginery.runtime.chat_template import ChatTemplate, read_chat_template

TEMPLATES = Path(__file__).resolve().parents[3] / "shared" / "data" / "templates"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "Why is the sky blue?"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "  Hi\n"}],
    "several turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "<b>And</b> \"2 + 2\" & 'é'?"},
    ],
}


def names() -> list[str]:
    return sorted(path.name for path in TEMPLATES.glob("*.jinja")) if TEMPLATES.is_dir() else ["absent"]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_as_transformers(name: str, conversation: str, add_generation_prompt: bool) -> None:
    if name == "absent":
        pytest.skip(f"{TEMPLATES} is not here")
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    facts = json.loads((TEMPLATES / "index.json").read_text())[name]
    source = (TEMPLATES / name).read_text()
    tokens = {key: value for key, value in facts.items() if key.endswith("_token") and value is not None}
    messages = CONVERSATIONS[conversation]
    try:
        wanted = utils.render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **tokens
        )[0][0]
    except Exception:
        with pytest.raises(RequestError, match="refuses these messages"):
            ChatTemplate(source, tokens).render(messages, add_generation_prompt=add_generation_prompt)
        return
    assert ChatTemplate(source, tokens).render(messages, add_generation_prompt=add_generation_prompt) == wanted


@pytest.mark.parametrize("name", names())
def test_continues_the_last_message_as_transformers(name: str) -> None:
    if name == "absent":
        pytest.skip(f"{TEMPLATES} is not here")
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (TEMPLATES / name).read_text()
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, "}]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted = utils.render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, add_generation_prompt=False, **tokens
    )[0][0]
    template = ChatTemplate(source, tokens)
    assert template.render(messages, continue_final_message=True, add_generation_prompt=False) == wanted


def test_reads_the_template_from_where_it_is() -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for jinja, config, wanted in (
        ("J", {"chat_template": "C"}, "J"),
        (None, {"chat_template": "C"}, "C"),
        (None, {"chat_template": named}, "D"),
        (None, {"chat_template": named[:1]}, "T"),
    ):
        template = read_chat_template(jinja, config)
        assert template is not None
        assert template.source == wanted
    assert read_chat_template(None, {}) is None
    assert read_chat_template(None, {"chat_template": 3}) is None


def test_special_tokens_may_be_objects() -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    template = read_chat_template("{{ bos_token }}{{ eos_token }}{{ pad_token }}", config)
    assert template is not None
    assert template.render([]) == "<s></s>"


def test_a_template_says_why_it_refuses() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render([])


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
def test_a_broken_template_is_one_error(source: str) -> None:
    with pytest.raises(RequestError, match="cannot be used"):
        ChatTemplate(source, {}).render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'x' * (10**30) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        ChatTemplate(source, {}).render([])


def test_filters_are_those_of_transformers() -> None:
    template = ChatTemplate(
        "{{ messages | tojson }}{% generation %}x{% endgeneration %}{{ strftime_now('%Y')|length }}", {}
    )
    assert template.render([{"role": "é<"}]) == '[{"role": "é<"}]x4'
