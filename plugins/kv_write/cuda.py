"""The kernels of kv_write on CUDA, and how a layer's state lies in memory there."""

from __future__ import annotations

from dataclasses import dataclass

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.plan import Range
from ..launches import Constant, Kernel, Launch

BLOCK_TOKENS = 64
ELEMENT_BYTES = {"bf16": 2, "fp8": 1, "i8": 1}
TRITON_TYPES = {"bf16": "*bf16", "fp8": "*fp8e4nv", "i8": "*i8"}


@dataclass(frozen=True)
class StateLayout:
    """One layer's keys and values in the blocks of its state group: in each KV head K [64, head_dim], and V likewise in
    bf16, but [head_dim, 64] in 8-bit types, as tensor cores want pairs of tokens side by side. Scales follow.

    kv_dtype     "bf16", "fp8" or "i8"
    block_bytes  of a whole block: all layers of the group
    """

    num_kv_heads: int
    head_dim: int
    kv_dtype: str
    block_bytes: int

    @property
    def head_bytes(self) -> int:
        """K, V and their scales of one head in one block."""
        scales = 0 if self.kv_dtype == "bf16" else 2 * BLOCK_TOKENS * 2
        return 2 * BLOCK_TOKENS * self.head_dim * ELEMENT_BYTES[self.kv_dtype] + scales

    @property
    def layer_bytes(self) -> int:
        """All KV heads of one layer in one block."""
        return self.num_kv_heads * self.head_bytes

    def constants(self) -> dict[str, Constant]:
        """What every kernel that reads or writes the state is compiled with."""
        element = ELEMENT_BYTES[self.kv_dtype]
        absent: dict[str, Constant] = {"state_scales": None} if self.kv_dtype == "bf16" else {}
        return absent | {
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "WIDTH": padded_width(self.head_dim),
            "BLOCK_STRIDE": self.block_bytes // element,
            "HEAD_STRIDE": self.head_bytes // element,
        }

    def parameters(self) -> tuple[tuple[str, str], ...]:
        """The state's pointers. Both are the address of the layer in block 0."""
        state = ("state", TRITON_TYPES[self.kv_dtype])
        return (state,) if self.kv_dtype == "bf16" else (state, ("state_scales", "*fp16"))


@dataclass(frozen=True)
class KvWrite:
    """An operator `kv_write`. k_offset, v_offset, stride: elements, in the rows that hold k and v."""

    layout: StateLayout
    k_offset: int
    v_offset: int
    stride: int
    rot_dim: int
    eps: float
    has_norm: bool


def kv_write_launches(operator: KvWrite, pdl: bool) -> tuple[Launch, ...]:
    """One launch for every number of tokens. pdl: there is programmatic dependent launch (sm90 and newer)."""
    layout = operator.layout
    heads = max(1, 1024 // padded_width(layout.head_dim))
    norm: tuple[tuple[str, str], ...] = (("k_norm", "*fp32"),) if operator.has_norm else ()
    constants: dict[str, Constant] = layout.constants() | {
        "ROT_DIM": operator.rot_dim,
        "EPS": operator.eps,
        "K_OFFSET": operator.k_offset,
        "V_OFFSET": operator.v_offset,
        "STRIDE": operator.stride,
        "HEADS": heads,
        "PDL": pdl,
    }
    if not operator.has_norm:
        constants["k_norm"] = None
    kernel = Kernel(
        plugin="kv_write",
        function="store",
        role="state",
        parameters=(
            ("k", "*bf16"),
            ("v", "*bf16"),
            ("cos", "*fp32"),
            ("sin", "*fp32"),
            *norm,
            ("slots", "*i64"),
            *layout.parameters(),
            ("count", "i32"),
        ),
        constants=tuple(sorted(constants.items())),
        num_warps=4,
        num_stages=1,
        pdl=pdl,
    )
    programs: Expression = ["ceil_div", ["*", "tokens", layout.num_kv_heads], heads]
    return (Launch(kernel, (programs, 1, 1), (Range("tokens", 1, LARGEST),)),)


def padded_width(head_dim: int) -> int:
    """The power of two that a tile of heads is wide: at least 16, which tensor cores need."""
    return max(16, 1 << (head_dim - 1).bit_length())
