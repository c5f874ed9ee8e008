"""What checkpoints may hold: other names and types are read, damage is refused with its remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from enginery.engines.errors import CheckpointError
from enginery.engines.manifest import hash_file
from enginery.engines.weights import read_weights_header
from safetensors.torch import load_file, save_file

from ..tiny import edit_config, make_checkpoint
from .building import compile_to, refused


def _drop(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors")

    return damage


def _poison(value: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(tensors, directory / "model.safetensors")

    return damage


def _add(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"model.layers.1.extra": torch.ones(3)}, directory / "model.safetensors")


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _garble(name: str, text: str) -> Callable[[Path], None]:
    def damage(copy: Path) -> None:
        (copy / name).write_text(text)

    return damage


def _no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def _misshape(directory: Path) -> None:
    edit_config(directory, intermediate_size=80)


def _vector(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][7] = float("nan")
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            _drop("model.layers.2.self_attn.k_proj.weight"),
            r"model.layers.2.self_attn.k_proj.weight \[16, 48\]: missing",
        ),
        (_poison(float("nan")), r"model.layers.1.mlp.down_proj.weight\[3, 5\] is not a finite number"),
        (_poison(float("inf")), r"model.layers.1.mlp.down_proj.weight\[3, 5\] is not a finite number"),
        (_vector, r"model.norm.weight\[7\] is not a finite number"),
        (_add, "no use for model.layers.1.extra"),
        (_truncate, "truncated or damaged"),
        (_pickle, "(?s)pickles.*safetensors first: python -c"),
        (_no_tokenizer, "no tokenizer.json"),
        (_garble("generation_config.json", "{bad"), r"generation_config.json: not JSON: .*Download it again"),
        (_garble("tokenizer_config.json", "[]"), "tokenizer_config.json: wanted a JSON object"),
        (_garble("tokenizer_config.json", "\ufeff{}"), "tokenizer_config.json: not JSON: Unexpected UTF-8 BOM"),
        (_garble("generation_config.json", " " * (1 << 20) + "{}"), "generation_config.json: 1048578 bytes; at most"),
        (
            _garble("chat_template.jinja", "{% for m in messages %}\n{{ m }"),
            r"chat_template.jinja: the chat template is no valid Jinja: line 2: .*Mend it, or remove it",
        ),
        (
            _garble("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "{% if %}"}]}'),
            r"tokenizer_config.json: the chat template is no valid Jinja: line 1: ",
        ),
        (_misshape, r"config.json makes it \[80, 48\], the checkpoint has \[72, 48\]"),
    ],
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[Path], None], reason: str, copy: Path, tmp_path: Path
) -> None:
    damage(copy)
    refused(CheckpointError, reason, copy, tmp_path)


def test_everything_missing_is_told_at_once(copy: Path, tmp_path: Path) -> None:
    _drop("model.norm.weight")(copy)
    _drop("model.layers.0.mlp.up_proj.weight")(copy)
    with pytest.raises(CheckpointError) as raised:
        compile_to(copy, tmp_path / "out")
    assert "model.norm.weight" in str(raised.value)
    assert "up_proj" in str(raised.value)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, [-1, 5], [1.0, 2.0], ["a", "b"], [[1], [2]]], ids=str)
def test_headers_with_other_kinds_of_values_are_refused(key: str, value: object, copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.norm.weight"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(CheckpointError):
        compile_to(copy, tmp_path / "engine")


def test_a_fifo_is_no_weights_file(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    refused(CheckpointError, "no \\*.safetensors file", copy, tmp_path)


def _rename(directory: Path, rename: Callable[[str], str | None], **more: torch.Tensor) -> None:
    tensors = load_file(directory / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in renamed.items() if name} | more, directory / "model.safetensors")


def weights_of(model: Path, output: Path) -> bytes:
    return (compile_to(model, output, precision="fp32") / "weights.rank0.safetensors").read_bytes()


def test_names_without_the_prefix_are_those_of_a_base_model(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    _rename(copy, lambda name: name.removeprefix("model."))
    read = [
        read_weights_header(compile_to(model, tmp_path / name, precision="fp32") / "weights.rank0.safetensors")
        for name, model in (("prefixed", checkpoint), ("base", copy))
    ]
    assert {name: placed.tensor.layout for name, placed in read[0].placed.items()} == {
        name: placed.tensor.layout for name, placed in read[1].placed.items()
    }


def test_what_old_checkpoints_store_beside_is_no_obstacle(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    _rename(copy, lambda name: name, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert weights_of(copy, tmp_path / "old") == weights_of(checkpoint, tmp_path / "new")


def test_a_tied_head_that_is_stored_too_is_not_used(tmp_path: Path) -> None:
    for name in ("tied", "stored"):
        make_checkpoint("qwen3", tmp_path / name)
    _rename(tmp_path / "tied", lambda name: None if name == "lm_head.weight" else name)
    _rename(tmp_path / "stored", lambda name: name, **{"lm_head.weight": torch.ones(301, 48)})
    assert weights_of(tmp_path / "tied", tmp_path / "a") == weights_of(tmp_path / "stored", tmp_path / "b")


def _integers(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, directory / "model.safetensors")


def test_a_type_that_is_not_implemented_is_refused_where_it_is_used(copy: Path, tmp_path: Path) -> None:
    _integers(copy)
    refused(CheckpointError, "model.norm.weight: stored as I8; implemented are F32, BF16, F16", copy, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_and_narrow_types_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "whole", dtype)
    make_checkpoint("qwen3", tmp_path / "shards", dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    engines = [
        compile_to(tmp_path / name, tmp_path / f"{name}.engine", precision="fp32") for name in ("whole", "shards")
    ]
    first, second = (hash_file(engine / "weights.rank0.safetensors", "weights", "safetensors") for engine in engines)
    assert first == second
