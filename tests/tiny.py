"""Tiny random checkpoints of every architecture, made with transformers: what models are tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 301
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}

_ODD = {
    "hidden_size": 56,
    "intermediate_size": 89,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "vocab_size": 257,
}
_GEMMA = {"head_dim": 24, "sliding_window": 17, "query_pre_attn_scalar": 20}
_SOFTCAP = {
    "num_hidden_layers": 2,
    "final_logit_softcapping": 3.0,
    "layer_types": ["full_attention", "sliding_attention"],
}

# Name -> configuration class and what it changes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-llama3": ("LlamaConfig", {"tie_word_embeddings": True, **_rope("llama3", **_LLAMA3)}),
    "llama-linear": ("LlamaConfig", _rope("linear", factor=2.0)),
    "llama-dynamic": ("LlamaConfig", {"max_position_embeddings": 48, **_rope("dynamic", factor=4.0)}),
    "llama-yarn": ("LlamaConfig", {"head_dim": 32, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)}),
    "llama-wide-heads": ("LlamaConfig", {"head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama-odd-sizes": ("LlamaConfig", _ODD),
    "llama-head-256": ("LlamaConfig", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 19}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
    "phi3-partial": ("Phi3Config", {"hidden_size": 96, **_rope("default", partial_rotary_factor=0.5)}),
    "phi3-longrope": ("Phi3Config", {"original_max_position_embeddings": 48, **_rope("longrope", **_LONGROPE)}),
    "gemma3_text": ("Gemma3TextConfig", _GEMMA | {"num_hidden_layers": 7, "tie_word_embeddings": True}),
    "gemma3_text-softcap": ("Gemma3TextConfig", _GEMMA | _SOFTCAP),
}


def make_checkpoint(case: str, directory: Path, dtype: torch.dtype = torch.float32, **save: Any) -> Any:
    """Writes the checkpoint of `case` with a tokenizer, and returns transformers' model in float32."""
    kind, changes = CASES[case]
    config = getattr(transformers, kind)(**(_BASE | changes))
    return write_model(config, directory, dtype, **save)


def write_model(config: Any, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any) -> Any:
    """Random weights for a transformers configuration, saved as an ordinary checkpoint."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    gemma = "gemma" in config.model_type
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Large enough that attention is far from uniform and rotary angles matter.
                torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
            else:
                torch.nn.init.normal_(parameter, mean=0.0 if gemma or parameter.shape[0] < 8 else 0.8, std=0.2)
        model.to(dtype).save_pretrained(directory, **save)
    write_tokenizer(directory)
    return model.float()


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: every byte is a token, and any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    turns = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<s>{% endif %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def edit_config(directory: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Changes keys of a checkpoint's config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy continuation, end tokens ignored."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
        )
    return list(map(int, out[0, len(prompt) :]))


def logits(model: Any, token_ids: list[int]) -> Any:
    """transformers' logits [tokens, vocab] as a NumPy array."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()
