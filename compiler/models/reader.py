"""Reading config.json.

Every key is either understood, known to change nothing, or refused by name: never ignored. A reader collects what it
refuses and raises it all at once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, faults

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

_LARGEST = 2**31 - 1
_LARGEST_FLOAT = 3e38  # that float32 holds
_MOST_LAYERS = 4096

# Keys that say nothing about the result of inference: bookkeeping, training, generation defaults, token ids.
_HARMLESS = frozenset(
    """architectures attention_dropout attention_probs_dropout_prob attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id full_attn_mod gradient_checkpointing hidden_dropout hidden_dropout_prob id2label
    initializer_range interpolate_factor is_decoder is_encoder_decoder is_llama_config label2id length_penalty
    max_length max_window_layers min_length model_max_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache""".split()
)


def is_number(value: object) -> bool:
    """True for a finite JSON number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT


class ConfigReader:
    """config.json with a memory of what was read and what must be refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}. Download it again.") from None
        if not isinstance(self.raw, dict):
            raise CheckpointError(f"{path}: wanted a JSON object. Download it again.")
        self.reasons: list[str] = []
        self._read: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """The value of `key`; a missing or null one is the default."""
        self._read.add(key)
        found = self.raw.get(key)
        return default if found is None else found

    def refuse(self, key: str, why: str) -> None:
        """Notes that `key` asks for something that is not implemented."""
        self.reasons.append(f"{key} = {_short(self.raw.get(key))}: {why}")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A count. Without a default it must be there."""
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= _LARGEST:
            wanted = f"an integer from {least} to {_LARGEST}"
            self.reasons.append(
                f"{key} = {_short(found)}: wanted {wanted}" if found is not None else f"{key} is missing"
            )
            return least
        return found

    def num_layers(self) -> int:
        """num_hidden_layers, of which no model has thousands: lists of that length are made before weights are seen."""
        found = self.integer("num_hidden_layers")
        if found > _MOST_LAYERS:
            self.refuse("num_hidden_layers", f"wanted at most {_MOST_LAYERS}")
        return min(found, _MOST_LAYERS)

    def number(self, key: str, default: float, above: float = -math.inf) -> float:
        """A finite number larger than `above`."""
        found = self.value(key, default)
        if not is_number(found) or found <= above:
            self.refuse(key, "wanted a number" + ("" if above == -math.inf else f" above {above}"))
            return default
        return float(found)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        found = self.value(key, default)
        if not isinstance(found, bool):
            self.refuse(key, "wanted true or false")
            return default
        return found

    def activation(self, key: str, default: str) -> str:
        """The gated MLP's activation, as operators call it."""
        found = self.value(key, default)
        if not isinstance(found, str) or found not in ACTIVATIONS:
            self.refuse(key, f"this activation is not implemented; implemented are {', '.join(ACTIVATIONS)}")
            return "silu"
        return ACTIVATIONS[found]

    def only(self, key: str, *accepted: Any) -> None:
        """Refuses any value of `key` but these; a missing one is fine."""
        found = self.value(key)
        if found is not None and found not in accepted:
            self.refuse(key, f"not implemented for {self.raw.get('model_type')} (implemented: {_short(accepted[0])})")

    def finish(self) -> None:
        """Refuses keys that nobody read. Raises CheckpointError with all that was refused."""
        for key, found in self.raw.items():
            known = key in self._read or key in _HARMLESS or key.startswith("_")
            if not known and found is not None and found is not False:
                self.refuse(key, _UNKNOWN.get(key, _UNKNOWN_KEY))
        if self.reasons:
            raise faults(CheckpointError, f"{self.path}: not implemented", self.reasons)


_UNKNOWN_KEY = "not known, so it cannot be honoured; if it does not change results, remove it"
_UNKNOWN = {
    "quantization_config": "quantized checkpoints are not read yet; take the one that it was made from, and build with "
    "--precision int8",
}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def head_geometry(reader: ConfigReader, kv_default: int | None, head_dim_default: int | None) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim), checked: heads divide into groups, head_dim is a multiple of 8 up to 256."""
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", kv_default or heads)
    if reader.value("head_dim") is None and head_dim_default is None:
        if hidden % heads:
            reader.refuse("hidden_size", f"not a multiple of num_attention_heads = {heads}, and there is no head_dim")
        head_dim = max(hidden // heads, 1)
    else:
        head_dim = reader.integer("head_dim", head_dim_default)
    if heads % kv_heads:
        reader.refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    if head_dim % 8 or head_dim > 256:
        reader.reasons.append(f"head_dim = {head_dim}: attention has kernels for multiples of 8 from 8 to 256")
    return heads, kv_heads, head_dim


def layer_windows(
    reader: ConfigReader, num_layers: int, window: int | None, sliding_default: list[bool]
) -> tuple[int, ...]:
    """Of each layer 0 or its window, from `layer_types` where the config has them, else from `sliding_default`."""
    types = reader.value("layer_types")
    if types is None:
        sliding = sliding_default
    elif (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in types)
    ):
        reader.refuse("layer_types", f"wanted {num_layers} of full_attention and sliding_attention")
        sliding = [False] * num_layers
    else:
        sliding = [kind == "sliding_attention" for kind in types]
    if any(sliding) and window is None:
        reader.refuse("sliding_window", "layers of type sliding_attention need it")
    return tuple((window or 0) if slides else 0 for slides in sliding)
