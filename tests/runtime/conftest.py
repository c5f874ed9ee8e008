"""Tiny tokenizers, and engines that run on the null executor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from enginery.runtime._core import Core
from enginery.runtime.chat_template import ChatTemplate
from enginery.runtime.config import EngineConfig
from enginery.runtime.engine import Engine
from enginery.runtime.model import Model
from enginery.runtime.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_byte_level() -> RustTokenizer:
    """As GPT-2 and Qwen have them: 256 bytes, some merges, two special tokens and an added one that is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("o", "n"), ("Ã", "©")]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = RustTokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<not special>", special=False)])
    return tokenizer


def make_sentencepiece() -> RustTokenizer:
    """As Llama 2 and Mistral have them: ▁ for spaces, bytes for what is not in the vocabulary, a BOS."""
    pieces = ["▁the", "▁cat", "▁", "s", "a", "t", "é", "▁▁", "!"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *"▁thec"[2:], "▁c", "▁t"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(make_byte_level())


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return Tokenizer(make_sentencepiece())


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(byte_level: Tokenizer) -> Iterator[MakeEngine]:
    """make_engine(max_model_len=…, spec=…, model=…, **config): an engine on the null executor, closed at the end."""
    engines: list[Engine] = []

    def make(
        tokenizer: Tokenizer | None = None,
        max_model_len: int = 256,
        spec: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **config: Any,
    ) -> Engine:
        engines.append(null_engine(tokenizer or byte_level, max_model_len, spec, model, **config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def null_engine(
    tokenizer: Tokenizer,
    max_model_len: int = 256,
    spec: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **config: Any,
) -> Engine:
    vocab_size = 1 + max(tokenizer._rust.get_vocab().values())
    core_spec = {
        "ranks": [],
        "groups": [{"name": "full", "kind": "full", "window": 0, "block_size": 16}],
        "num_blocks": [512],
        "vocab_size": vocab_size,
        "max_tokens": 64,
        "max_rows": 64,
        "max_sequences": 16,
        **(spec or {}),
    }
    loop = {"max_model_len": max_model_len, "max_num_seqs": 16, "max_num_batched_tokens": 64, **config}
    end = tokenizer._rust.token_to_id("<|end|>")
    facts: dict[str, Any] = {
        "name": "tiny",
        "vocab_size": vocab_size,
        "max_model_len": max_model_len,
        "stop_token_ids": () if end is None else (end,),
        "chat_template": ChatTemplate(CHAT_TEMPLATE, {"eos_token": "<|end|>"}),
        **(model or {}),
    }
    return Engine(Core(core_spec, loop, "null"), Model(**facts), tokenizer, EngineConfig())


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-stories" / "model"


@pytest.fixture(scope="session")
def built_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own model, built for this machine. Tests that change it copy it."""
    from enginery.compiler.build import BuildRequest, build, prepare

    output = tmp_path_factory.mktemp("built") / "engine"
    with prepare(BuildRequest(str(MODEL), output)) as prepared:
        return build(prepared)


@pytest.fixture
def copied_engine(built_engine: Path, tmp_path: Path) -> Path:
    """A copy of the built engine, to be damaged."""
    return Path(shutil.copytree(built_engine, tmp_path / "engine"))
