"""State groups: which layers keep their keys and values together, and how many bytes a block of them takes."""

from __future__ import annotations

from ...engines.layouts import round_up
from ...engines.plan import PrefixKey, StateGroup
from ...engines.targets import Target
from ..models.config import Config
from ..models.layers import group_name
from ..passes.options import Options

_ELEMENT_BYTES = {"f32": 4, "bf16": 2, "fp8": 1, "i8": 1}
_VALUE_PADDING = 16


def head_bytes(dtype: str, target: Target, head_dim: int) -> int:
    """Bytes of one KV head of one layer in a block (plugins/README.md)."""
    value_width = head_dim if target.is_cuda else round_up(head_dim, _VALUE_PADDING)
    scales = 2 * 2 if dtype in ("i8", "fp8") else 0
    return target.block_size * ((head_dim + value_width) * _ELEMENT_BYTES[dtype] + scales)


def state_groups(config: Config, options: Options) -> tuple[StateGroup, ...]:
    """One group for each window that layers have, and one for those that see everything."""
    kv_heads = config.num_kv_heads // options.world_size
    block_size = options.target.block_size
    groups = []
    for window in sorted(set(config.windows)):
        layers = config.windows.count(window)
        groups.append(
            StateGroup(
                name=group_name(window),
                kind="window" if window else "full",
                window=window,
                layers=layers,
                block_size=block_size,
                block_bytes=layers * kv_heads * head_bytes(options.kv_dtype, options.target, config.head_dim),
                num_kv_heads=kv_heads,
                head_dim=config.head_dim,
                dtype=options.kv_dtype,
            )
        )
    return tuple(groups)


def layer_in_group(config: Config, layer: int) -> int:
    """Which of its group's layers a layer is."""
    return config.windows[:layer].count(config.windows[layer])


def prefix_key(config: Config) -> PrefixKey:
    """What two prompts must have in common beyond their tokens, because rotary tables look at a prompt's length."""
    tables = [table for table in config.rope_tables if table.kind != "static"]
    if not tables:
        return PrefixKey()
    exact = any(table.kind == "dynamic" for table in tables) or len({table.threshold for table in tables}) > 1
    return PrefixKey(min(table.threshold for table in tables), exact)
