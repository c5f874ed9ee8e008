"""What passes ensure beyond right results, which test_models compares: nothing is computed that need not be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from enginery.compiler.checkpoint.tensors import open_checkpoint
from enginery.compiler.graph.builder import GraphBuilder, attribute, rows_of, weight_of
from enginery.compiler.graph.rewrite import input_of, is_op, is_ours, users
from enginery.compiler.models import build_graph, read_config
from enginery.compiler.passes import PASSES
from enginery.compiler.passes.fold_constants import scalar_of
from enginery.compiler.passes.fuse_gate_up import fuse_gate_up
from enginery.compiler.passes.options import Options
from enginery.compiler.passes.shard import check_divisible, vocab_starts
from enginery.engines.errors import CompileError
from enginery.engines.precisions import PRECISIONS
from enginery.engines.targets import TARGETS

from ...tiny import make_checkpoint

OPTIONS = Options(TARGETS["cpu-avx2"], PRECISIONS["fp32"], "f32")
LAYERS = 3


def after(stage: str, case: str, directory: Path, options: Options = OPTIONS) -> GraphBuilder:
    """The graph of a tiny model after the pass called `stage`."""
    make_checkpoint(case, directory)
    with open_checkpoint(directory) as checkpoint:
        g = build_graph(read_config(directory), checkpoint)
        for step in PASSES:
            step(g, options)
            if step.__name__ == stage:
                return g
    raise AssertionError(stage)


def of_type(g: GraphBuilder, op_type: str) -> list[ir.Node]:
    return [node for node in g.graph if is_op(node, op_type)]


def test_behind_the_last_keys_and_values_there_are_only_rows(tmp_path: Path) -> None:
    g = after("select_rows", "llama", tmp_path)
    gemms = {node.name or "": rows_of(node.outputs[0]) for node in of_type(g, "Gemm")}
    last = f"layers.{LAYERS - 1}."
    on_rows = {name.removesuffix(".rows").removeprefix(last) for name, rows in gemms.items() if rows == "rows"}
    assert on_rows == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert len(gemms) == 7 * LAYERS + 1


def test_no_row_is_selected_or_computed_twice(tmp_path: Path) -> None:
    g = after("select_rows", "qwen3", tmp_path)
    nodes = [node for node in g.graph if node.op_type not in ("Unsqueeze", "Squeeze")]
    seen = Counter((node.op_type, tuple(id(value) for value in node.inputs)) for node in nodes)
    assert [what for (what, _), count in seen.items() if count > 1] == []


@pytest.mark.parametrize(("case", "weights_read"), [("llama", 4), ("phi3", 4), ("qwen2", 4)])
def test_products_of_one_input_are_one(case: str, weights_read: int, tmp_path: Path) -> None:
    """qkv, o, gate-up, down; in the last layer q is apart from k and v, for it is computed on rows."""
    g = after("fuse_linear", case, tmp_path)
    assert not of_type(g, "Gemm")
    linears = [node for node in g.graph if is_ours(node, "Linear")]
    assert len(linears) == weights_read * LAYERS + 1 + 1
    assert len({input_of(node, 0) for node in linears}) == len(linears)
    assert Counter(attribute(node, "activation") for node in linears)["silu_gated"] == LAYERS


def built(case: str, directory: Path) -> GraphBuilder:
    """The graph of a tiny model before any pass."""
    make_checkpoint(case, directory)
    with open_checkpoint(directory) as checkpoint:
        return build_graph(read_config(directory), checkpoint)


def named(g: GraphBuilder, name: str) -> ir.Node:
    return next(node for node in g.graph if node.name == name)


def test_products_of_which_only_some_have_a_bias_stay_apart_and_share_what_they_read(tmp_path: Path) -> None:
    g = built("llama-biases", tmp_path)
    named(g, "layers.0.k_proj").resize_inputs(2)
    for step in PASSES:
        step(g, replace(OPTIONS, precision=PRECISIONS["int8"]))
    found = {node.name: node for node in g.graph if is_ours(node, "Linear")}
    projections = [found[f"layers.0.{letter}_proj"] for letter in "qkv"]
    assert [node.inputs[2] is not None for node in projections] == [True, False, True]
    assert len({input_of(node, 0) for node in projections}) == 1
    assert "layers.1.qkv" in found


def test_only_a_gate_and_an_up_of_one_input_are_one(tmp_path: Path) -> None:
    g = built("llama", tmp_path)
    up = named(g, "layers.0.up_proj")
    up.replace_input_with(0, input_of(named(g, "layers.0.post_attention_layernorm"), 0))
    fuse_gate_up(g, OPTIONS)
    assert [node.name for node in of_type(g, "Mul")] == ["layers.0.gated"]
    assert len([node for node in g.graph if is_ours(node, "Linear")]) == LAYERS - 1


def test_only_scalars_are_folded() -> None:
    g = GraphBuilder("constants")
    assert scalar_of(g.constant("one", np.array([2.0], np.float32))) == 2.0
    assert scalar_of(g.constant("two", np.array([2.0, 2.0], np.float32))) is None


def test_residuals_are_epilogues_of_products_and_norms(tmp_path: Path) -> None:
    g = after("fuse_norm", "llama", tmp_path)
    assert not of_type(g, "Add")
    assert not of_type(g, "RMSNormalization")


def test_norms_of_gemma_are_two_a_block_in_one(tmp_path: Path) -> None:
    g = after("fuse_norm", "gemma3_text-softcap", tmp_path)
    norms = [node for node in g.graph if is_ours(node, "RmsNorm")]
    assert sum(node.inputs[2] is not None for node in norms) == 2 * 2  # the first of two layers has none before it
    assert not of_type(g, "Add")


def test_a_tied_table_is_one_weight(tmp_path: Path) -> None:
    g = after("quantize", "qwen3", tmp_path)
    (embedding,) = of_type(g, "Embedding")
    head = next(value.producer() for value in g.graph.outputs if value.name == "logits")
    assert head is not None
    assert embedding.inputs[1] is head.inputs[1]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_activations_are_quantized_once_behind_their_norm(precision: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, precision=PRECISIONS[precision])
    g = after("quantize", "llama", tmp_path, options)
    quantized = of_type(g, "Quantize")
    assert len({node.inputs[0] for node in quantized}) == len(quantized)
    for node in g.graph:
        if is_ours(node, "Linear"):
            source = input_of(node, 0).producer()
            assert is_ours(source, "Quantize"), node.name
            assert len(node.inputs) == 5 or precision == "bf16"
    for node in quantized:
        assert len(node.outputs) == (2 if precision == "int8" else 1)
        if is_ours(input_of(node, 0).producer(), "RmsNorm"):
            assert users(input_of(node, 0)) == [node]


@pytest.mark.parametrize(
    ("case", "precision", "table"),
    [
        ("llama", "fp32", "f32"),
        ("llama", "bf16", "bf16"),
        ("llama", "int8", "bf16"),
        ("qwen3", "int8", "int8"),
    ],
)
def test_tables_are_held_as_rows_unless_the_head_has_them(
    case: str, precision: str, table: str, tmp_path: Path
) -> None:
    g = after("quantize", case, tmp_path, replace(OPTIONS, precision=PRECISIONS[precision]))
    (embedding,) = of_type(g, "Embedding")
    assert attribute(embedding, "precision") == table


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "i8"])
def test_caches_are_held_as_asked_for(kv_dtype: str, tmp_path: Path) -> None:
    g = after("quantize", "llama", tmp_path, replace(OPTIONS, kv_dtype=kv_dtype))
    writers = of_type(g, "WriteKv")
    assert [attribute(node, "kv_dtype") for node in writers] == [kv_dtype] * LAYERS


def test_ranks_have_parts_that_make_the_whole(tmp_path: Path) -> None:
    graphs = [after("shard", "llama-biases", tmp_path, replace(OPTIONS, rank=rank, world_size=2)) for rank in (0, 1)]
    parts = [{n.name: weight_of(input_of(n, 1)) for n in g.graph if is_ours(n, "Linear")} for g in graphs]
    covered = set()
    for name, first in parts[0].items():
        second = parts[1][name]
        covered |= {part.tensor for weight in (first, second) for part in weight.parts}
        assert not set(first.parts) & set(second.parts)
    assert len(covered) == 7 * LAYERS + 1
    biases = [sum(n.inputs[2] is not None for n in g.graph if is_ours(n, "Linear")) for g in graphs]
    assert biases[0] - biases[1] == 2 * LAYERS  # those of o and down are added once


@pytest.mark.parametrize(
    ("vocab", "ranks", "starts"),
    [(301, 2, [0, 144, 301]), (301, 4, [0, 64, 144, 224, 301]), (16, 4, [0, 0, 0, 0, 16]), (257, 1, [0, 257])],
)
def test_vocabularies_are_cut_between_panels(vocab: int, ranks: int, starts: list[int]) -> None:
    assert vocab_starts(vocab, ranks) == starts


def test_what_does_not_divide_is_named_with_what_would_do(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    config = replace(read_config(tmp_path), num_heads=12, num_kv_heads=6, intermediate_size=9)
    check_divisible(config, 3)
    with pytest.raises(CompileError, match=r"6 \(possible here: 1, 3\): intermediate_size = 9 is not a multiple of 6"):
        check_divisible(config, 6)


@pytest.mark.parametrize(("case", "fused"), [("llama", 6), ("gemma3_text-softcap", 0)])
def test_residuals_are_epilogues_of_sums_over_ranks(case: str, fused: int, tmp_path: Path) -> None:
    """On GPUs; but for the embedding's, and sums that are normalised before they are added."""
    options = replace(OPTIONS, target=TARGETS["cuda-sm90"], world_size=2)
    g = after("fuse_all_reduce", case, tmp_path, options)
    sums = of_type(g, "AllReduce")
    assert sum(len(node.inputs) == 2 for node in sums) == fused
    norms = of_type(g, "RmsNorm")
    assert sum(node.inputs[1] is not None and node.inputs[2] is None for node in norms) == 0
    on_cpu = after("fuse_all_reduce", case, tmp_path, replace(options, target=OPTIONS.target))
    assert all(len(node.inputs) == 1 for node in of_type(on_cpu, "AllReduce"))
