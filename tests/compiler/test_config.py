"""config.json: both spellings read alike, and what is not implemented refused by name, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from enginery.compiler.models import read_config
from enginery.engines.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def read(directory: Path, remove: tuple[str, ...] = (), **changes: Any) -> Any:
    config = {key: value for key, value in (LLAMA | changes).items() if key not in remove}
    (directory / "config.json").write_text(json.dumps(config))
    return read_config(directory)


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0]}
_GEMMA = {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 7}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}, "torch_dtype": "bfloat16"},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}, "dtype": "bfloat16"},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        ),
        (
            {"partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        ),
        (
            {
                "model_type": "phi3",
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "su", **_LONG},
            },
            {
                "model_type": "phi3",
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **_LONG},
            },
        ),
        (
            {**_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3},
            {
                **_GEMMA,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        (
            {**_GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                **_GEMMA,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
        ),
    ],
)
def test_both_spellings_are_read_alike(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, **old) == read(tmp_path, **new)


def test_windows_are_those_of_the_layers(tmp_path: Path) -> None:
    assert read(tmp_path, **_GEMMA, sliding_window_pattern=3).windows == (16, 16, 0, 16, 16, 0, 16)
    assert read(tmp_path, model_type="mistral", sliding_window=7).windows == (7,) * 4
    assert read(tmp_path, model_type="mistral", sliding_window=None).windows == (0,) * 4
    assert read(tmp_path, model_type="mistral").windows == (4096,) * 4
    assert read(tmp_path, model_type="qwen3", sliding_window=7).windows == (0,) * 4


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("llama", {"num_kv_heads": 64, "head_dim": 8, "tied": False, "activation": "silu", "scale": 8**-0.5}),
        ("mistral", {"num_kv_heads": 8, "head_dim": 8, "windows": (4096,) * 4, "attention_bias": False}),
        ("qwen2", {"num_kv_heads": 32, "head_dim": 8, "attention_bias": True, "output_bias": False}),
        ("qwen3", {"num_kv_heads": 32, "head_dim": 128, "attention_bias": False, "scale": 128**-0.5}),
        ("phi3", {"num_kv_heads": 64, "head_dim": 8, "windows": (0,) * 4}),
        ("gemma3_text", {"num_kv_heads": 4, "head_dim": 256, "tied": True, "activation": "gelu_tanh", "scale": 1 / 16}),
    ],
)
def test_keys_left_out_mean_what_transformers_means(model_type: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    config = read(tmp_path, ("num_key_value_heads",), model_type=model_type, hidden_size=512, num_attention_heads=64)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.rms_norm_eps, config.attention_softcap, config.logits_softcap) == (1e-6, 0.0, 0.0)


def test_keys_of_gemma_left_out_mean_what_transformers_means(tmp_path: Path) -> None:
    config = read(tmp_path, model_type="gemma3_text", num_hidden_layers=13)
    assert config.windows == ((4096,) * 5 + (0,)) * 2 + (4096,)
    sliding, full = (config.rope_tables[config.ropes[layer]].frequencies[1] for layer in (0, 5))
    assert (sliding, full) == pytest.approx((10_000.0 ** (-1 / 128), 1_000_000.0 ** (-1 / 128)))


def test_what_a_config_says_is_honoured(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        **_GEMMA,
        rms_norm_eps=1e-3,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=False,
        attention_bias=True,
        max_position_embeddings=77,
        hidden_act="silu",
        hidden_activation="gelu_pytorch_tanh",
    )
    assert (config.rms_norm_eps, config.scale, config.tied) == (1e-3, 1 / 8, False)
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)
    assert (config.attention_bias, config.output_bias, config.max_model_len) == (True, True, 77)
    assert config.activation == "gelu_tanh"
    qwen = read(tmp_path, model_type="qwen3", attention_bias=True)
    assert (qwen.attention_bias, qwen.output_bias, qwen.mlp_bias) == (True, True, False)
    llama = read(tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (llama.attention_bias, llama.output_bias, llama.mlp_bias, llama.tied) == (True, True, True, True)
    assert read(tmp_path, model_type="phi3", sliding_window=9).windows == (9,) * 4


@pytest.mark.parametrize(
    ("name", "activation"),
    [("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")],
)
def test_activations_have_several_names(name: str, activation: str, tmp_path: Path) -> None:
    assert read(tmp_path, hidden_act=name).activation == activation


def test_null_is_as_good_as_missing(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("rms_norm_eps", "hidden_act", "head_dim", "rope_scaling", "tie_word_embeddings", "moons"))
    assert read(tmp_path, **nothing) == read(tmp_path)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_early_names_of_longrope_are_read(kind: str, tmp_path: Path) -> None:
    (table,) = read(tmp_path, model_type="phi3", rope_scaling={"type": kind, **_LONG}).rope_tables
    assert table.kind == "longrope"


def test_windows_of_qwen_need_their_switch_and_a_layer_that_has_one(tmp_path: Path) -> None:
    window: dict[str, Any] = {"model_type": "qwen2", "sliding_window": 9}
    assert read(tmp_path, **window).windows == (0,) * 4
    assert read(tmp_path, **window, use_sliding_window=False, max_window_layers=0).windows == (0,) * 4
    assert read(tmp_path, **window, use_sliding_window=True).windows == (0,) * 4  # max_window_layers is 28
    assert read(tmp_path, **window, use_sliding_window=True, max_window_layers=2).windows == (0, 0, 9, 9)
    assert read(tmp_path, **window, use_sliding_window=True, max_window_layers=0).windows == (9,) * 4
    assert read(tmp_path, model_type="qwen2", use_sliding_window=True, max_window_layers=0).windows == (4096,) * 4


def test_layers_of_one_rope_share_its_table(tmp_path: Path) -> None:
    alike = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    assert len(read(tmp_path, **_GEMMA).rope_tables) == 2
    assert len(read(tmp_path, **_GEMMA, rope_parameters=alike).rope_tables) == 1


def test_scaled_ropes_reach_further(tmp_path: Path) -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    assert read(tmp_path).max_model_len == 128
    assert read(tmp_path, **dynamic).max_model_len == 256
    # Of two tables the one that reaches less decides; what Gemma says of positions has scaling in it.
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    full = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    both = dict.fromkeys(full, linear)
    windows = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    assert read(tmp_path, **windows, rope_parameters=full).max_model_len == 128
    assert read(tmp_path, **windows, rope_parameters=both).max_model_len == 1024
    assert read(tmp_path, **_GEMMA, rope_parameters=both).max_model_len == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not implemented"),
        ({"hidden_act": "relu"}, 'hidden_act = "relu"'),
        ({"rope_scaling": {"rope_type": "spiral"}}, 'rope_scaling.rope_type = "spiral"'),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "moons": 3}}, "rope_parameters.moons"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*take the one that it was made from"),
        ({"attention_multiplier": 0.3}, "attention_multiplier = 0.3"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"head_dim": 12}, "head_dim = 12"),
        ({"head_dim": 512}, "head_dim = 512"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"num_attention_heads": 7}, "hidden_size = 64"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", **_LONG, "short_factor": [1.0]}}, "short_factor"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "wanted 4 of full_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "sliding_window"),
        ({"model_type": "phi3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "phi3", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "phi3", "lm_head_bias": True}, "lm_head_bias"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"rms_norm_eps": 1e39}, "rms_norm_eps"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path, **changes)


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        read(tmp_path, hidden_act="relu", quantization_config={"bits": 4}, num_experts=8, head_dim=9)
    for name in ("hidden_act", "quantization_config", "num_experts", "head_dim"):
        assert name in str(raised.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_what_is_missing_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=key):
        read(tmp_path, remove=(key,))


def test_bookkeeping_is_no_obstacle(tmp_path: Path) -> None:
    read(tmp_path, unknown_switch=False, _unknown=5)
    read(tmp_path, transformers_version="9.9", torch_dtype="float16", _name_or_path="x", use_cache=True, max_length=20)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_config(tmp_path)


_NUMBERS = [float("nan"), float("inf"), 0, -1, 10**400, "x", [], {}, True]
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("value", _NUMBERS, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "linear", "factor": 2.0}, "factor"),
        ({"rope_type": "dynamic", "factor": 2.0}, "factor"),
        ({"rope_type": "llama3", **_LLAMA3}, "low_freq_factor"),
        ({"rope_type": "llama3", **_LLAMA3}, "original_max_position_embeddings"),
        (_YARN, "beta_fast"),
        (_YARN, "attention_factor"),
        (_YARN, "factor"),
    ],
)
def test_numbers_that_give_no_frequencies_are_refused(
    kind: dict[str, Any], name: str, value: object, tmp_path: Path
) -> None:
    if value == 0 and name in ("beta_fast", "attention_factor"):
        return  # asks for the default, as in transformers
    with pytest.raises(CheckpointError, match=name):
        read(tmp_path, rope_parameters=kind | {name: value})


@pytest.mark.parametrize("found", [3, "x", [1], {"rope_type": ["x"]}, {"full_attention": 3}, {"full_attention": [1]}])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_rope_parameters_of_another_shape_are_refused(found: object, model_type: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rope_parameters"):
        read(tmp_path, model_type=model_type, head_dim=8, rope_parameters=found)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ["llama"]},
        {"architectures": 5},
        {"rms_norm_eps": 10**400},
        {"head_dim": 10**30},
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 0},
        {"model_type": "mistral", "layer_types": [["sliding_attention"]] * 4},
        {"model_type": "gemma3_text", "layer_types": [["sliding_attention"]] * 4},
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=list(changes)[-1]):
        read(tmp_path, **changes)


def test_of_both_spellings_of_scaling_transformers_takes_the_older(tmp_path: Path) -> None:
    newer = {"rope_type": "default", "rope_theta": 5e5}
    both = read(tmp_path, rope_parameters=newer, rope_scaling={"type": "linear", "factor": 2.0})
    assert both.rope_tables == read(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}).rope_tables


def test_parameters_beside_those_of_layer_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rope_parameters\.factor"):
        read(tmp_path, **_GEMMA, rope_parameters={"factor": 2.0})
