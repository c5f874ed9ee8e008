"""Rotary frequencies and attention factors are transformers' own, for every kind and every parameter of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from enginery.compiler.models import read_config
from enginery.compiler.models.rope import Rope
from enginery.engines.errors import CheckpointError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + step / 7 for step in range(8)],
    "long_factor": [2.0 + step / 3 for step in range(8)],
}


def read(directory: Path, parameters: dict[str, Any]) -> tuple[Any, Any]:
    """What we read, and transformers' configuration: 16 elements a head, 1,024 positions."""
    kind, changes = "LlamaConfig", {}
    if parameters["rope_type"] == "longrope":
        kind, changes = "Phi3Config", {"original_max_position_embeddings": 128}
    config = getattr(transformers, kind)(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        rope_parameters={"rope_theta": 10000.0} | parameters,
        **changes,
    )
    config.save_pretrained(directory)
    return read_config(directory), config


def expect(rope: Rope, config: Any, frequencies: tuple[float, ...], seq_len: int | None = None) -> None:
    wanted, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu", seq_len=seq_len)
    np.testing.assert_allclose(frequencies, wanted.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 3.0},
        _LLAMA3,
        _LLAMA3 | {"rope_theta": 500000.0},
        _LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 30.0, "factor": 32.0},
        _LLAMA3 | {"high_freq_factor": 1.0},
        _YARN,
        _YARN | {"rope_theta": 1e6},
        _YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
        _YARN | {"beta_fast": 500.0},
        _YARN | {"beta_slow": 0.001},
        _YARN | {"truncate": False},
        _YARN | {"attention_factor": 1.7},
        _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        _YARN | {"mscale": 0.7},
        _YARN | {"factor": 0.5},
    ],
)
def test_scaled_frequencies_are_those_of_transformers(parameters: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = read(tmp_path, parameters)
    (rope,) = ours.rope_tables
    assert (rope.kind, rope.rotary_dim) == ("static", 16)
    expect(rope, theirs, rope.frequencies)


@pytest.mark.parametrize(
    "parameters", [_LONG, _LONG | {"factor": 16.0}, _LONG | {"attention_factor": 1.3}, _LONG | {"factor": 0.5}]
)
def test_both_sets_of_longrope_are_those_of_transformers(parameters: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = read(tmp_path, parameters)
    (rope,) = ours.rope_tables
    assert (rope.kind, rope.threshold) == ("longrope", 128)
    expect(rope, theirs, rope.frequencies)
    expect(rope, theirs, rope.long_frequencies, seq_len=129)


def test_dynamic_scaling_begins_at_the_models_own_length(tmp_path: Path) -> None:
    """Where transformers begins, whatever original_max_position_embeddings says."""
    parameters = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
    ours, theirs = read(tmp_path, parameters)
    (rope,) = ours.rope_tables
    assert (rope.kind, rope.threshold, rope.base, rope.factor) == ("dynamic", 1024, 10000.0, 2.0)
    expect(rope, theirs, rope.frequencies, seq_len=1024)


def test_a_part_of_each_head_is_rotated(tmp_path: Path) -> None:
    whole, _ = read(tmp_path, {"rope_type": "default"})
    part, _ = read(tmp_path, {"rope_type": "default", "partial_rotary_factor": 0.5})
    assert (whole.rope_tables[0].rotary_dim, part.rope_tables[0].rotary_dim) == (16, 8)
    np.testing.assert_allclose(part.rope_tables[0].frequencies, 10000.0 ** -(np.arange(4) / 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 3.0}, 3072),
        ({"rope_type": "linear", "factor": 0.5}, 1024),
        ({"rope_type": "dynamic", "factor": 2.5}, 2560),
        (_LLAMA3, 1024),
        (_YARN, 1024),
        (_YARN | {"factor": 8.0}, 2048),
        (_YARN | {"factor": 2.0}, 1024),
        (_LONG, 1024),
    ],
)
def test_the_longest_sequence_is_what_scaling_makes_of_it(
    parameters: dict[str, Any], length: int, tmp_path: Path
) -> None:
    """max_position_embeddings says it already for llama3 and longrope, and for yarn unless its factor goes further."""
    assert read(tmp_path, parameters)[0].max_model_len == length


def test_a_gemma_is_made_for_what_it_says(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3_text",
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).max_model_len == 128


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rope_type": "default", "partial_rotary_factor": 0.19}, "rotates 3 of 16 elements; wanted an even number"),
        ({"rope_type": "default", "partial_rotary_factor": 0.01}, "rotates 0 of 16 elements"),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, "makes no sense"),
        ({"rope_type": "default", "rope_theta": 1.0}, "makes no sense"),
        ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.125}, "more than 2 rotated elements"),
        ({"rope_type": "linear", "factor": 1e-300}, "no finite frequencies for linear"),
        (_LLAMA3 | {"original_max_position_embeddings": "x"}, "original_max_position_embeddings"),
    ],
)
def test_parameters_that_make_no_table_are_refused(parameters: dict[str, Any], reason: str, tmp_path: Path) -> None:
    read(tmp_path, {"rope_type": "default"})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 10000.0} | parameters}))
    with pytest.raises(CheckpointError, match=reason):
        read_config(tmp_path)


def test_equal_band_limits_of_llama3_scale_without_a_ramp(tmp_path: Path) -> None:
    """transformers divides by zero there; what lies below the limit is stretched, the rest kept."""
    ours, _ = read(tmp_path, _LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 2.0})
    plain = 10000.0 ** -(np.arange(8) / 8)
    wanted = np.where(2 * np.pi / plain > 64 / 2, plain / 8, plain)
    np.testing.assert_allclose(ours.rope_tables[0].frequencies, wanted, rtol=1e-6)
