"""The CPU executor on small plans made by hand: teams, ranks, regions, guards, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError, TargetError
from enginery.plugins.linear.layouts import pack_f32_k1n16
from enginery.runtime import _core
from numpy.typing import NDArray

Array = NDArray[Any]
VOCAB, HIDDEN, INNER, MAX_TOKENS = 50, 24, 40, 9
STRIDE = 64


def operand(kind: str, index: int, layout: str, size: int) -> dict[str, Any]:
    return {"kind": kind, "index": index, "name": f"{kind} {index}", "layout": layout, "bytes": size}


def buffer(index: int, per_thread: bool = False) -> dict[str, Any]:
    return operand("buffer", index, "f32", (2 if per_thread else MAX_TOKENS) * STRIDE * 4)


class Model:
    """logits = table . norm(x + all-reduced down . up . x), x = table[ids]: an embedding, an MLP and a tied head."""

    def __init__(self, folder: Path, world_size: int, num_threads: int) -> None:
        random = np.random.default_rng(0)
        self.table = random.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
        self.up = random.normal(size=(INNER, HIDDEN)).astype(np.float32)
        self.down = random.normal(size=(HIDDEN, INNER)).astype(np.float32)
        self.norm = random.normal(size=HIDDEN).astype(np.float32)
        ranks = [self.rank(folder, rank, world_size) for rank in range(world_size)]
        self.spec: dict[str, Any] = {
            "isa": "avx2",
            "ranks": ranks,
            "groups": [],
            "num_blocks": [],
            "vocab_size": VOCAB,
            "num_threads": num_threads,
            "max_tokens": MAX_TOKENS,
            "max_rows": MAX_TOKENS,
            "max_sequences": MAX_TOKENS,
        }

    def rank(self, folder: Path, rank: int, world_size: int) -> dict[str, Any]:
        part = slice(INNER * rank // world_size, INNER * (rank + 1) // world_size)
        inner = part.stop - part.start
        arrays = [
            ("table", "f32_k1n16.v0", pack_f32_k1n16(self.table)),
            ("up", "f32_k1n16.v0", pack_f32_k1n16(self.up[part])),
            ("down", "f32_k1n16.v0", pack_f32_k1n16(self.down[:, part])),
            ("norm", "rows_f32.v0", self.norm),
        ]
        weights, data = [], b"the header".ljust(4096)
        for name, layout, array in arrays:
            weights.append({"name": name, "layout": layout, "offset": len(data), "bytes": array.nbytes})
            data += array.tobytes().ljust(-(-array.nbytes // 64) * 64, b"\0")
        path = folder / f"weights.rank{rank}.safetensors"
        path.write_bytes(data)
        table, up, down, norm = (
            operand("weight", index, str(weight["layout"]), int(str(weight["bytes"])))
            for index, weight in enumerate(weights)
        )

        def call(op: str, region: int, operands: dict[str, Any], guard: Any = (), **attributes: Any) -> dict[str, Any]:
            limits = {"max_tokens": MAX_TOKENS, "max_rows": MAX_TOKENS, "max_sequences": MAX_TOKENS}
            if guard:
                limits["max_tokens"] = min(MAX_TOKENS, guard[0][2])
            fields = {"op": op, "region": region, "operands": operands, "attributes": attributes, "guard": list(guard)}
            return fields | limits

        def linear(
            region: int, n: int, k: int, guard: Any = (), domain: str = "tokens", **operands: Any
        ) -> dict[str, Any]:
            plain = {"n": n, "k": k, "activation": "none", "softcap": 0.0, "domain": domain}
            return call("linear", region, operands, guard, **plain)

        few, many = [["tokens", 0, 2]], [["tokens", 3, 1 << 40]]
        convert = {"hidden": HIDDEN, "eps": 0.0, "domain": "tokens"}
        normed = {"hidden": HIDDEN, "eps": 1e-6, "domain": "tokens"}
        ids = {"kind": "input", "name": "token_ids"}
        rows = {"kind": "input", "name": "rows"}
        embedding = {"hidden": HIDDEN, "vocab": VOCAB, "scale": 1.0, "vocab_start": 0}
        forward = [
            call("embedding", 0, {"token_ids": ids, "table": table, "out": buffer(0)}, **embedding),
            # Few tokens: every thread prepares its own copy, and the product follows in the same region.
            call("rms_norm", 1, {"x": buffer(0), "out": buffer(6, True)}, few, **convert),
            linear(1, inner, HIDDEN, few, a=buffer(6, True), weight=up, out=buffer(1)),
            linear(2, inner, HIDDEN, many, a=buffer(0), weight=up, out=buffer(1)),
            linear(3, HIDDEN, inner, a=buffer(1), weight=down, out=buffer(2)),
            call("all_reduce", 4, {"x": buffer(2), "out": buffer(3)}, columns=HIDDEN, domain="tokens"),
            call("rms_norm", 5, {"x": buffer(0), "delta": buffer(3), "weight": norm, "out": buffer(4)}, **normed),
            call("gather_rows", 6, {"rows": rows, "x": buffer(4), "out": buffer(5)}, columns=HIDDEN),
            linear(7, VOCAB, HIDDEN, domain="rows", a=buffer(5), weight=table, out=buffer(1)),
        ]
        size = MAX_TOKENS * STRIDE * 4
        buffers: list[dict[str, Any]] = [{"name": f"b{i}", "bytes": size, "offset": i * size} for i in range(6)]
        buffers.append({"name": "private", "bytes": 2 * STRIDE * 4, "offset": 0, "per_thread": True})
        return {
            "weights_path": str(path),
            "weights_file_bytes": len(data),
            "weights": weights,
            "buffers": buffers,
            "arena_bytes": 6 * size,
            "forward": forward,
            "logits_buffer": 1,
            "logits_stride": STRIDE,
        }

    def wanted(self, ids: Array, rows: Array) -> Array:
        x = self.table[ids].astype(np.float64)
        x = x + x @ self.up.T @ self.down.T
        normed = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * self.norm
        logits: Array = normed[rows] @ self.table.T
        return logits


def make_step(num_tokens: int, num_rows: int) -> dict[str, Any]:
    ids = np.random.default_rng(num_tokens).integers(0, VOCAB, num_tokens).astype(np.int32)
    return {"token_ids": ids, "rows": np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32)}


STEPS = [make_step(*sizes) for sizes in [(9, 9), (1, 1), (0, 0), (2, 1), (3, 0), (7, 2)]]


@pytest.mark.parametrize("num_threads", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_computes_the_model(tmp_path: Path, world_size: int, num_threads: int) -> None:
    model = Model(tmp_path, world_size, num_threads)
    results, _ = _core.run_forward(model.spec, STEPS)
    for step, logits in zip(STEPS, results, strict=True):
        wanted = model.wanted(step["token_ids"], step["rows"])
        assert logits.shape == wanted.shape
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_threads_do_not_change_a_bit(tmp_path: Path, world_size: int) -> None:
    alone, _ = _core.run_forward(Model(tmp_path, world_size, 1).spec, STEPS)
    together, _ = _core.run_forward(Model(tmp_path, world_size, 4).spec, STEPS * 30)
    for index, logits in enumerate(together):
        np.testing.assert_array_equal(logits, alone[index % len(STEPS)])


def test_tells_its_memory(tmp_path: Path) -> None:
    model = Model(tmp_path, 2, 4)
    model.spec["groups"] = [{"name": "g", "kind": "full", "block_size": 16, "block_bytes": 4096}]
    model.spec["num_blocks"] = [10]
    for step in STEPS:
        step["groups"] = [{}]
    _, memory = _core.run_forward(model.spec, [])
    ranks = model.spec["ranks"]
    assert memory["weights"] == sum(rank["weights_file_bytes"] for rank in ranks)
    assert memory["state"] == 2 * 10 * 4096
    scratch_and_private = 4 * ((1 << 20) + 2 * STRIDE * 4) + 2 * (1 << 20)
    assert memory["activations"] == sum(rank["arena_bytes"] for rank in ranks) + scratch_and_private


def test_refuses_an_isa_that_nobody_has(tmp_path: Path) -> None:
    model = Model(tmp_path, 1, 1)
    model.spec["isa"] = "avx1024"
    with pytest.raises(TargetError, match="avx1024"):
        _core.run_forward(model.spec, [])


def change(path: str, value: Any) -> Any:
    """Sets spec[a][b][c] for the path "a.b.c"."""

    def apply(spec: dict[str, Any]) -> None:
        *keys, last = [int(key) if key.lstrip("-").isdigit() else key for key in path.split(".")]
        place: Any = spec
        for key in keys:
            place = place[key]
        place[last] = value

    return apply


HOSTILE = {
    "a buffer beyond the arena": (change("ranks.0.buffers.5.offset", 1 << 62), "outside of the arena"),
    "a buffer before the arena": (change("ranks.0.buffers.0.offset", -64), "outside of the arena"),
    "a huge private buffer": (change("ranks.0.buffers.6.bytes", 1 << 62), "per-thread"),
    "a weight beyond the file": (change("ranks.0.weights.0.offset", 1 << 40), "outside of the file"),
    "a crooked weight": (change("ranks.0.weights.0.offset", 4100), "not on 64 bytes"),
    "an operand beyond its buffer": (change("ranks.0.forward.0.operands.out.offset", 64), "reach beyond"),
    "an operand before its buffer": (change("ranks.0.forward.0.operands.out.offset", -64), "reach beyond"),
    "a buffer that is not there": (change("ranks.0.forward.0.operands.out.index", 99), "there is no buffer 99"),
    "a weight that is not there": (change("ranks.0.forward.0.operands.table.index", -1), "there is no weight -1"),
    "a smaller file": (change("ranks.0.weights_file_bytes", 4096), "wanted 4096 bytes"),
    "no file": (change("ranks.0.weights_path", "/nowhere/weights"), "cannot be opened"),
    "a device": (change("ranks.0.weights_path", "/dev/null"), "not a regular file"),
    "an unknown operator": (change("ranks.0.forward.0.op", "exec"), "no CPU operator 'exec'"),
    "a newer operator": (change("ranks.0.forward.0.version", 7), "in version 0, not 7"),
    "a guard on nothing": (change("ranks.0.forward.1.guard", [["weather", 0, 1]]), "no variable"),
    "a call planned too small": (change("ranks.0.forward.0.max_tokens", 8), "may reach it"),
    "regions out of order": (change("ranks.0.forward.8.region", 0), "region"),
    "ranks that meet differently": (change("ranks.1.forward.5.attributes.columns", 8), "differ in their collectives"),
    "small logits": (change("ranks.0.logits_stride", 1 << 20), "logits"),
    "logits nowhere": (change("ranks.0.logits_buffer", -1), "logits"),
    "private logits": (change("ranks.0.logits_buffer", 6), "logits"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(tmp_path: Path, fault: str) -> None:
    apply, message = HOSTILE[fault]
    spec = copy.deepcopy(Model(tmp_path, 2, 2).spec)
    apply(spec)
    with pytest.raises(EngineFormatError, match=message):
        _core.run_forward(spec, STEPS)
