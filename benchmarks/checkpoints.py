"""Random checkpoints with the shapes of real models: speed and memory do not depend on what the weights say.

    python benchmarks/checkpoints.py qwen2.5-0.5b build/checkpoints/qwen2.5-0.5b

Written as bf16 in ordinary Hugging Face layout, with the tokenizer of the repository's own model.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-stories" / "model"
_CHUNK = 1 << 22

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "llama-3.2-1b": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "llama-3.1-8b": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-1.7b": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
}


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, as the architecture stores them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", query), ("k", key), ("v", key)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
            if config["model_type"] == "qwen3" and name != "v":
                yield f"{prefix}.self_attn.{name}_norm.weight", (head_dim,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def make_checkpoint(shape: str, directory: Path) -> Path:
    """Writes a random checkpoint of `shape` unless the directory holds one already."""
    if (directory / "config.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config, generator = SHAPES[shape], np.random.default_rng(0)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in tensor_shapes(config):
        end = position + 2 * int(np.prod(size))
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    # No tensor repeats another, or a part of itself: engines and hosts keep equal weights once, and caches hold them.
    values = (generator.standard_normal(1 << 16, np.float32) * np.float32(0.02)).view(np.uint32) >> np.uint32(16)
    noise, ones = values.astype(np.uint16), np.full(_CHUNK, 0x3F80, np.uint16)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, size in tensor_shapes(config):
            remaining = int(np.prod(size))
            while remaining > 0:
                count = min(remaining, _CHUNK)
                block = (
                    ones[:count] if "norm" in name else noise[generator.integers(1 << 16, size=count, dtype=np.uint16)]
                )
                file.write(block.tobytes())
                remaining -= count
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}, indent=1))
    return directory


if __name__ == "__main__":
    print(make_checkpoint(sys.argv[1], Path(sys.argv[2])))
