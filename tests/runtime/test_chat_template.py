"""Chat templates give what transformers' apply_chat_template gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from enginery.engines.errors import RequestError
from enginery.runtime import template_worker
from enginery.runtime.chat_template import ChatTemplate, read_chat_template
from enginery.runtime.template_process import TemplateProcess

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


DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "computes for more than"),
        (DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"), "computes for more than"),
        (DOUBLED.replace("START", "'x'").replace("STEP", "ns.x ~ ns.x"), "MiB of memory"),
        ("{{ 'x' * 10**9 }}", "MiB of memory"),
        ("{{ [1] * 10**9 }}", "MiB of memory"),
        ("{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ],
)
def test_a_template_has_so_much_time_and_memory(source: str, reason: str) -> None:
    process = TemplateProcess(source, cpu_seconds=0.3 if "computes" in reason else 30)
    for _ in range(2):  # also when the process has died of it
        with pytest.raises(RequestError, match=reason):
            process.render({})


def test_a_template_that_cannot_be_compiled_in_time() -> None:
    process = TemplateProcess("{{ x }}" * 50_000, cpu_seconds=0.2)
    for ask in (process.compile, lambda: process.render({})):
        with pytest.raises(RequestError, match=r"cannot be used: it computes for more than 0\.2 s"):
            ask()
    assert not process.compiled


def test_a_prompt_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "LONGEST_PROMPT", 10)
    template = template_worker.compile_template("{% for c in text %}{{ c }}{% endfor %}")
    assert template_worker.render(template, {"text": "x" * 10}) == "x" * 10
    with pytest.raises(ValueError, match="over 10 characters"):
        template_worker.render(template, {"text": "x" * 11})


def test_a_process_that_died_is_replaced() -> None:
    template = ChatTemplate("{{ messages[0] }}", {})
    assert template.render(["a"]) == "a"
    child = template._process._child
    assert child is not None
    child.kill()
    child.wait()
    assert template.render(["é"]) == "é"
    template.close()
    with pytest.raises(RequestError, match="closed"):
        template.render(["a"])


def test_no_process_outlives_the_server() -> None:
    program = """
import os
from enginery.runtime.chat_template import ChatTemplate
template = ChatTemplate("{{ 1 }}", {})
template.compile()
print(template._process._child.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    worker = Path("/proc") / done.stdout.strip()
    while worker.exists() and "(zombie)" not in (worker / "status").read_text():
        pass


def test_messages_that_are_no_json() -> None:
    with pytest.raises(RequestError, match="no JSON"):
        ChatTemplate("", {}).render([{"content": object()}])


@pytest.mark.parametrize("source", ["{{ messages }}", "{{ '\\ud800' }}", "{{ 1 }}\ud800"])
def test_half_a_surrogate_pair_is_no_text(source: str) -> None:
    messages = [{"role": "\ud800", "content": "x"}] if "messages" in source else []
    with pytest.raises(RequestError, match="half a surrogate pair"):
        ChatTemplate(source, {}).render(messages)


def test_filters_are_those_of_transformers() -> None:
    template = ChatTemplate(
        "{{ messages | tojson }}{% generation %}x{% endgeneration %}{{ strftime_now('%Y')|length }}", {}
    )
    assert template.render([{"role": "é<"}]) == '[{"role": "é<"}]x4'
