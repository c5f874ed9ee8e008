"""A paged cache on the device, and steps of attention over it, at real sizes (plugins/README.md says how it lies)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from enginery.plugins.attention.cuda import TILE_TOKENS, Attention, attention_launches
from enginery.plugins.kv_write.cuda import StateLayout
from enginery.plugins.launches import Launch

from .launcher import DEVICE, TYPES, Address, Argument, bind_launches, run_launches, target
from .shapes import generator, normal, padded

KV_DTYPES = ("bf16", "fp8", "i8")
_LARGEST = {"fp8": 448.0, "i8": 127.0}


class Cache:
    """Blocks of 64 tokens, of all layers, in each the KV heads. Nobody has written yet: all is what must not matter."""

    def __init__(self, num_kv_heads: int, head_dim: int, kv_dtype: str, blocks: int, layers: int = 1) -> None:
        self.layout = make_layout(num_kv_heads, head_dim, kv_dtype, layers)
        self.layers = layers
        # NaN in bf16 and in scales; in 8 bits large values, as those must hold no NaN.
        fill = 0xFF if kv_dtype == "bf16" else 0x7E
        self.bytes = torch.full((blocks, self.layout.block_bytes), fill, dtype=torch.uint8, device=DEVICE)
        if kv_dtype != "bf16":
            for layer in range(layers):
                for scales in self.parts(layer)[2:]:
                    scales.fill_(float("nan"))

    def arguments(self, layer: int) -> dict[str, Argument]:
        """The pointers of a kernel that reads or writes this layer."""
        offset = layer * self.layout.layer_bytes
        return {name: Address(self.bytes, offset) for name, _ in self.layout.parameters()}

    def parts(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Keys, values [blocks, kv_heads, 64, head_dim] and, of 8 bits, their scales [blocks, kv_heads, 64]: views."""
        layout = self.layout
        kind, shape = TYPES[dict(layout.parameters())["state"]], (64, layout.head_dim)
        heads = self.bytes.view(len(self.bytes), self.layers, layout.num_kv_heads, layout.head_bytes)[:, layer]
        size = 64 * layout.head_dim * kind.itemsize
        keys, values = (heads[..., at : at + size].view(kind) for at in (0, size))
        if layout.kv_dtype == "bf16":
            return keys.unflatten(-1, shape), values.unflatten(-1, shape)
        scales = heads[..., 2 * size :].view(torch.float16)
        turned = values.unflatten(-1, shape[::-1]).transpose(-1, -2)
        return keys.unflatten(-1, shape), turned, scales[..., :64], scales[..., 64:]

    def fill(self, layer: int, written: torch.Tensor, random: torch.Generator) -> None:
        """Random keys and values where `written` [blocks, 64]."""
        parts = self.parts(layer)
        live = written[:, None, :, None]
        for index in (0, 1):
            wide, place = normal(random, *parts[index].shape), parts[index]
            if self.layout.kv_dtype != "bf16":
                scale = (wide.abs().amax(-1) / _LARGEST[self.layout.kv_dtype]).half()
                wide = wide / scale.float()[..., None]
                wide = wide.round() if self.layout.kv_dtype == "i8" else wide
                parts[2 + index].copy_(torch.where(written[:, None], scale, parts[2 + index]))
            # As bytes: torch has no where of e4m3.
            old, new = place.contiguous(), wide.to(place.dtype)
            integer = {1: torch.uint8, 2: torch.int16}[place.dtype.itemsize]
            place.copy_(torch.where(live, new.view(integer), old.view(integer)).view(place.dtype))

    def unpacked(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, values f32 [tokens, kv_heads, head_dim] of these blocks, one after the other."""
        parts = self.parts(layer)
        wide = []
        for index in (0, 1):
            values = parts[index][blocks].float()
            if self.layout.kv_dtype != "bf16":
                values = values * parts[2 + index][blocks].float()[..., None]
            wide.append(values.transpose(1, 2).flatten(0, 1))
        return wide[0], wide[1]


@dataclass(frozen=True)
class Heads:
    """Of an attention operator."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rot_dim: int = 0
    q_norm: bool = False
    window: int = 0
    softcap: float = 0.0
    invariant: bool = False

    @property
    def stride(self) -> int:
        """Elements of the rows that hold q, k and v."""
        return padded((self.num_heads + 2 * self.num_kv_heads) * self.head_dim)


class Scene:
    """Sequences with caches, and queries at the ends of their contexts. A sequence with one query decodes.

    contexts  of each sequence how many keys it has, and how many of its last tokens ask
    layers    caches that are filled, each with a pointer of its own
    """

    def __init__(
        self, kv_dtype: str, heads: Heads, contexts: Sequence[tuple[int, int]], layers: int = 1, seed: int = 0
    ) -> None:
        self.heads, self.contexts = heads, contexts
        random = generator(seed)
        blocks = [-(-length // 64) for length, _ in contexts]
        order = torch.randperm(sum(blocks) + 1, generator=random, device=DEVICE).int()
        self.table = torch.full((len(contexts), max(blocks) + 1), -1, dtype=torch.int32, device=DEVICE)
        written = torch.zeros(len(order), 64, dtype=torch.bool, device=DEVICE)
        first = 0
        for sequence, ((length, _), count) in enumerate(zip(contexts, blocks, strict=True)):
            mine = order[first : first + count]
            self.table[sequence, :count] = mine
            written[mine.long()] = (torch.arange(count * 64, device=DEVICE) < length).view(count, 64)
            first += count
        self.positions = torch.cat([torch.arange(n - q, n) for n, q in contexts]).int().to(DEVICE)
        counts = torch.tensor([queries for _, queries in contexts])
        self.sequence = torch.repeat_interleave(torch.arange(len(contexts)), counts).int().to(DEVICE)
        tokens, columns, stride = len(self.positions), heads.num_heads * heads.head_dim, heads.stride
        self.q = torch.full((tokens, stride), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        self.q[:, :columns] = 2 * normal(random, tokens, columns)
        angles = normal(random, tokens, heads.rot_dim // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.q_norm = normal(random, heads.head_dim) if heads.q_norm else None
        self.cache = Cache(heads.num_kv_heads, heads.head_dim, kv_dtype, len(order), layers)
        for layer in range(layers):
            self.cache.fill(layer, written, random)
        self.out = torch.full((tokens, padded(columns)), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        self.operator = make_operator(heads, kv_dtype, layers)

    def launches(self) -> tuple[Launch, ...]:
        """Of decode and prefill, on this GPU."""
        return make_launches(self.operator)

    def step(self, layer: int = 0) -> tuple[dict[str, int], dict[str, Argument]]:
        """The step's variables, and the arguments of launches."""
        decodes, tiles, token = [], [], 0
        for _, queries in self.contexts:
            if queries == 1:
                decodes.append(token)
            else:
                tiles += [(token + i, min(TILE_TOKENS, queries - i)) for i in range(0, queries, TILE_TOKENS)]
            token += queries
        sizes = {"tokens": token, "decodes": len(decodes), "tiles": len(tiles), "max_blocks": self.table.shape[1]}
        inputs: dict[str, Argument] = {"q": self.q, "cos": self.cos, "sin": self.sin, "out": self.out}
        inputs |= {"positions": self.positions, "token_sequence": self.sequence, "block_table": self.table}
        inputs |= {"decode_tokens": torch.tensor(decodes, dtype=torch.int32, device=DEVICE)}
        inputs |= {"tiles": torch.tensor(tiles, dtype=torch.int32, device=DEVICE).reshape(-1, 2)}
        inputs |= {"max_blocks": self.table.shape[1]} | self.cache.arguments(layer)
        return sizes, inputs | ({} if self.q_norm is None else {"q_norm": self.q_norm})

    def calls(self, layer: int, scratch: dict[str, torch.Tensor]) -> list[Callable[[], None]]:
        """The step's launches, bound."""
        sizes, inputs = self.step(layer)
        return bind_launches(self.launches(), sizes, inputs, scratch)

    def run(self) -> torch.Tensor:
        """f32 [tokens, columns], of the first layer; launched twice."""
        sizes, inputs = self.step()
        run_launches(self.launches(), sizes, inputs, times=2)
        columns = self.heads.num_heads * self.heads.head_dim
        assert not self.out[:, columns:].any(), "padding is not zero"
        return self.out[:, :columns].float()

    def wanted(self) -> torch.Tensor:
        """f32 [tokens, columns], by torch."""
        found, token = [], 0
        for sequence, (length, queries) in enumerate(self.contexts):
            blocks = self.table[sequence, : -(-length // 64)].long()
            keys, values = (part[:length] for part in self.cache.unpacked(0, blocks))
            rows = slice(token, token + queries)
            for part in torch.arange(token, token + queries, device=DEVICE).split(512):
                queries_of = self._prepared(self.q[part], self.cos[part], self.sin[part])
                found.append(self._attend(queries_of, keys, values, self.positions[part]))
            token = rows.stop
        return torch.cat(found)

    def _prepared(self, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[M, stride] -> f32 [heads, M, head_dim]: normed and rotated."""
        heads, half = self.heads, self.heads.rot_dim // 2
        x = q[:, : heads.num_heads * heads.head_dim].float().unflatten(1, (heads.num_heads, heads.head_dim))
        if self.q_norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.operator.eps) * self.q_norm
        left, right, rest = x.split([half, half, heads.head_dim - 2 * half], -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1).transpose(0, 1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[heads, M, d], [L, kv_heads, d] twice, [M] -> [M, heads · d]."""
        group, window = self.heads.num_heads // self.heads.num_kv_heads, self.heads.window
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q @ keys.transpose(1, 2) * self.operator.scale
        if self.heads.softcap:
            scores = self.heads.softcap * torch.tanh(scores / self.heads.softcap)
        at = torch.arange(len(k), device=DEVICE)[None, :]
        hidden = at > positions[:, None]
        if window:
            hidden |= at <= positions[:, None] - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ values).transpose(0, 1).flatten(1)


def make_layout(num_kv_heads: int, head_dim: int, kv_dtype: str, layers: int) -> StateLayout:
    """Of blocks that hold so many layers."""
    one = StateLayout(num_kv_heads, head_dim, kv_dtype, 0)
    return StateLayout(num_kv_heads, head_dim, kv_dtype, layers * one.layer_bytes)


def make_operator(heads: Heads, kv_dtype: str, layers: int = 1) -> Attention:
    """q first in its rows; scores scaled as usual."""
    return Attention(
        layout=make_layout(heads.num_kv_heads, heads.head_dim, kv_dtype, layers),
        num_heads=heads.num_heads,
        q_offset=0,
        stride=heads.stride,
        rot_dim=heads.rot_dim,
        eps=1e-6,
        scale=heads.head_dim**-0.5,
        softcap=heads.softcap,
        window=heads.window,
        has_norm=heads.q_norm,
        invariant=heads.invariant,
    )


def make_launches(operator: Attention) -> tuple[Launch, ...]:
    """Of decode and prefill, on this GPU."""
    return attention_launches(operator, target().arch, "tokens", pdl=target().arch >= 90)
