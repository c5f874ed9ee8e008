"""The architectures, named as Hugging Face names them. To add one: a file here, a line below, a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError
from ..checkpoint.tensors import Checkpoint
from ..graph.builder import GraphBuilder
from . import gemma3_text, llama, mistral, phi3, qwen2, qwen3
from .config import Config
from .layers import Tensors
from .reader import ConfigReader


@dataclass(frozen=True)
class Architecture:
    """read_config: config.json to what its layers need; build: appends the whole model to a graph."""

    read_config: Callable[[ConfigReader], Config]
    build: Callable[[GraphBuilder, Tensors, Config], None]


MODELS = {
    "gemma3_text": Architecture(gemma3_text.read_config, gemma3_text.build),
    "llama": Architecture(llama.read_config, llama.build),
    "mistral": Architecture(mistral.read_config, mistral.build),
    "phi3": Architecture(phi3.read_config, phi3.build),
    "qwen2": Architecture(qwen2.read_config, qwen2.build),
    "qwen3": Architecture(qwen3.read_config, qwen3.build),
}


def read_config(directory: Path) -> Config:
    """What the checkpoint's config.json says. Raises CheckpointError with everything that is not implemented."""
    reader = ConfigReader(directory / "config.json")
    model_type = reader.value("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise CheckpointError(
            f"{reader.path}: model_type {model_type!r} is not implemented. Implemented are {', '.join(MODELS)}; to add "
            f"one, see CONTRIBUTING.md."
        )
    names = reader.value("architectures", [])
    if not isinstance(names, list) or any(not str(name).endswith("ForCausalLM") for name in names):
        reader.refuse("architectures", "wanted a language model (…ForCausalLM)")
    reader.only("is_encoder_decoder", False)
    config = MODELS[model_type].read_config(reader)
    reader.finish()
    return config


def build_graph(config: Config, checkpoint: Checkpoint) -> GraphBuilder:
    """The model as its paper says it, weights lazy. Raises CheckpointError where tensors do not fit the config."""
    g = GraphBuilder(config.model_type)
    prefixed = any(name.startswith("model.") for name in checkpoint.tensors)
    tensors = Tensors(checkpoint)
    if not prefixed:
        checkpoint.tensors = {
            name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in checkpoint.tensors.items()
        }
    MODELS[config.model_type].build(g, tensors, config)
    tensors.finish()
    return g
