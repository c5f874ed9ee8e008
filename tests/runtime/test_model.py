"""What an engine says of its model: end tokens, suggestions for sampling; damaged files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import enginery
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.engines.manifest import encode_manifest, hash_file, read_manifest
from enginery.runtime.files import LARGEST_BYTES, open_engine
from enginery.runtime.model import Model, load_tokenizer, read_model, start_loading_tokenizer


def rewrite(engine: Path, name: str, content: bytes, role: str) -> None:
    """Another content, signed as if it had been built so."""
    (engine / name).write_bytes(content)
    manifest = read_manifest(engine)
    manifest.files[name] = hash_file(engine / name, role, "json")
    (engine / "manifest.json").write_bytes(encode_manifest(manifest))


def model_of(engine: Path, generation: object, config: object = None) -> Model:
    rewrite(engine, "generation_config.json", json.dumps(generation).encode(), "generation")
    if config is not None:
        rewrite(engine, "config.json", json.dumps(config).encode(), "config")
    return read_model(open_engine(engine), 64)


@pytest.mark.parametrize(
    ("suggested", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}, None),
        ({"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}, None),
        ({"temperature": 2.1, "top_p": 0.0, "top_k": -1, "min_p": 1.5, "repetition_penalty": 0}, {}),
        ({"temperature": True, "top_p": "0.9", "top_k": None, "min_p": [0.1], "repetition_penalty": {}}, {}),
        ({"do_sample": True, "max_length": 20, "temperature": 0.5}, {"temperature": 0.5}),
    ],
)
def test_suggestions_that_make_sense_are_kept(
    copied_engine: Path, suggested: dict[str, Any], kept: dict[str, float] | None
) -> None:
    found = model_of(copied_engine, suggested).suggested
    assert found == (suggested if kept is None else kept)
    assert all(type(value) is (int if name == "top_k" else float) for name, value in found.items())


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 9}, (5,)),
        ({"eos_token_id": [5, 6]}, {}, (5, 6)),
        ({"eos_token_id": None}, {"eos_token_id": [9]}, (9,)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({}, {}, ()),
        ({"eos_token_id": []}, {"eos_token_id": 9}, ()),
    ],
)
def test_end_tokens_are_the_generation_configs_or_else_the_configs(
    copied_engine: Path, generation: object, config: object, ends: tuple[int, ...]
) -> None:
    assert model_of(copied_engine, generation, config).stop_token_ids == ends


@pytest.mark.parametrize("value", [-1, 1 << 31, "2", [2, -3], [[2]], 1.5, list(range(5000))])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_is_no_token_is_refused(copied_engine: Path, name: str, value: object) -> None:
    documents = {"generation_config.json": {}, "config.json": {}} | {name: {"eos_token_id": value}}
    with pytest.raises(EngineFormatError, match=f"{name}: eos_token_id: wanted a token id"):
        model_of(copied_engine, documents["generation_config.json"], documents["config.json"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff{}", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "wanted a JSON object"),
        (b" " * (LARGEST_BYTES["generation_config.json"] + 1), "at most 1048576 are allowed"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(copied_engine: Path, content: bytes, reason: str) -> None:
    rewrite(copied_engine, "generation_config.json", content, "generation")
    with pytest.raises(EngineFormatError, match=rf"generation_config\.json: .*{reason}"):
        read_model(open_engine(copied_engine), 64)


def test_sizes_are_those_of_the_manifest_and_the_loader(built_engine: Path) -> None:
    files = open_engine(built_engine)
    model = read_model(files, 64)
    assert (model.max_model_len, model.vocab_size) == (64, files.manifest.model.vocab_size)


def test_a_tokenizer_that_cannot_be_read_is_told_when_it_is_asked_for(copied_engine: Path) -> None:
    rewrite(copied_engine, "tokenizer.json", b"{}", "tokenizer")
    with pytest.raises(EngineFormatError, match=r"tokenizer\.json"):
        load_tokenizer(open_engine(copied_engine))
    with pytest.raises(EngineFormatError, match=r"tokenizer\.json"):
        start_loading_tokenizer(open_engine(copied_engine)).result(timeout=60)


def test_an_engine_without_a_tokenizer_is_told_so(copied_engine: Path) -> None:
    """tokenizer_config.json has the role too, so the manifest is sound."""
    manifest = read_manifest(copied_engine)
    del manifest.files["tokenizer.json"]
    (copied_engine / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(EngineFormatError, match=r"no tokenizer\.json\. Build the engine again"):
        load_tokenizer(open_engine(copied_engine))


def test_files_of_other_sizes_are_named_each(copied_engine: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        with open(copied_engine / name, "ab") as file:
            file.write(b" ")
    with pytest.raises(
        EngineFormatError, match=r"(?s)files that are not.*config\.json: the manifest says \d+ bytes.*tok"
    ):
        open_engine(copied_engine)
    (copied_engine / "config.json").write_bytes((copied_engine / "config.json").read_bytes()[:-1])
    with pytest.raises(
        EngineFormatError, match=r"^[^\n]*tokenizer\.json: the manifest says \d+ bytes, found \d+[^\n]*$"
    ):
        open_engine(copied_engine)


def test_a_model_is_called_what_its_directory_is(copied_engine: Path, tmp_path: Path) -> None:
    copied_engine.rename(tmp_path / "storyteller")
    with enginery.Engine.load(tmp_path / "storyteller" / ".") as engine:
        assert engine.model.name == "storyteller"
