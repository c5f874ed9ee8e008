"""Building: the same bytes every time, what was asked for, and what the command tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import CheckpointError, CompileError, TargetError
from enginery.engines.manifest import MANIFEST, hash_file, read_manifest
from enginery.engines.plan_format import decode_plan
from enginery.engines.weights import read_weights_header
from enginery.plugins.linear.layouts import deinterleave_gated, unpack_f32_k1n16
from safetensors.torch import load_file

from .building import compile_to, contents, refused, run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_same_inputs_same_bytes(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    first = compile_to(checkpoint, tmp_path / "a", precision=precision, num_threads=1)
    second = compile_to(checkpoint, tmp_path / "b", precision=precision, num_threads=3)
    assert contents(first) == contents(second)


def test_the_manifest_tells_every_other_file(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "e")
    manifest = read_manifest(engine)
    assert {path.name for path in engine.iterdir()} == {MANIFEST, *manifest.files}
    for name, file in manifest.files.items():
        assert hash_file(engine / name, file.role, file.format, file.rank) == file


def test_weights_are_those_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "e", precision="fp32")
    data = np.fromfile(engine / "weights.rank0.safetensors", np.uint8)
    placed = read_weights_header(engine / "weights.rank0.safetensors").placed
    source = load_file(checkpoint / "model.safetensors")

    def packed(name: str) -> Any:
        tensor, offset = placed[name].tensor, placed[name].offset
        values = data[offset : offset + tensor.num_bytes].view(np.float32)
        return unpack_f32_k1n16(values, tensor.rows, tensor.columns)

    prefix = "model.layers.1.self_attn"
    qkv = np.concatenate([source[f"{prefix}.{name}_proj.weight"].numpy() for name in "qkv"])
    np.testing.assert_array_equal(packed("layers.1.qkv.weight"), qkv)
    gate, up = deinterleave_gated(packed("layers.1.gate_up.weight"), 72)
    np.testing.assert_array_equal(gate, source["model.layers.1.mlp.gate_proj.weight"].numpy())
    np.testing.assert_array_equal(up, source["model.layers.1.mlp.up_proj.weight"].numpy())


def test_plans_of_ranks_share_the_work(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "e", tensor_parallel_size=2)
    plans = [decode_plan((engine / f"plan.rank{rank}.msgpack").read_bytes(), "plan") for rank in range(2)]
    assert [(plan.rank, plan.world_size) for plan in plans] == [(0, 2), (1, 2)]
    assert plans[0].state_groups[0].num_kv_heads == 1


def test_a_layer_has_few_regions(checkpoint: Path, tmp_path: Path) -> None:
    """At most six for a decode step: norm-QKV, KV write, attention, O, norm-gate-up, down."""
    engine = compile_to(checkpoint, tmp_path / "e", precision="int8")
    plan = decode_plan((engine / "plan.rank0.msgpack").read_bytes(), "plan")
    decode = [call for call in plan.forward if all(guard.low <= 1 <= guard.high for guard in call.guard)]
    regions = len({call.region for call in decode})
    assert regions <= 1 + 2 * 6 + 9 + 1  # embedding, two whole layers, the last on rows, the head


def test_exact_precision_of_fp32_keeps_kv_in_fp32(checkpoint: Path, tmp_path: Path) -> None:
    assert read_manifest(compile_to(checkpoint, tmp_path / "a", precision="fp32")).kv_cache_dtype == "fp32"
    assert read_manifest(compile_to(checkpoint, tmp_path / "b", precision="int8")).kv_cache_dtype == "bf16"
    assert read_manifest(compile_to(checkpoint, tmp_path / "c", kv_cache_dtype="int8")).kv_cache_dtype == "int8"


def test_options_that_cannot_be_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    refused(TargetError, "cpu-z80", checkpoint, tmp_path, target="cpu-z80")
    refused(CompileError, "fp8", checkpoint, tmp_path, precision="fp8")
    refused(CompileError, "fp8", checkpoint, tmp_path, kv_cache_dtype="fp8")
    refused(CompileError, "made for 256 tokens", checkpoint, tmp_path, max_model_len=257)
    refused(
        CompileError,
        r"(?s)possible here: 1, 2\).*num_attention_heads = 6",
        checkpoint,
        tmp_path,
        tensor_parallel_size=4,
    )
    refused(CheckpointError, "does not exist", tmp_path / "nowhere", tmp_path)


def test_the_command_says_one_thing_and_exits_with_2(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    result = run(copy, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith("CheckpointError: ")
    assert "Traceback" not in result.output


def test_the_plan_is_told_without_reading_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginery.compiler.checkpoint.tensors.Checkpoint.read", None)
    result = run(checkpoint, "--plan", "--memory", "64MiB", "--target", "cpu-avx512")
    assert result.exit_code == 0, result.output
    assert "state per token" in result.output
    assert "x 256 tokens, which is the longest" in result.output


def test_graphs_are_saved_for_people(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(checkpoint, "-o", tmp_path / "out", "--save-graph", tmp_path / "graphs", "--target", "cpu-avx2")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "graphs").glob("*.txt"))
    assert names[0] == "rank0.00.model.txt"
    assert len(names) == 12
    assert "PagedAttention" in (tmp_path / "graphs" / names[-1]).read_text()
    model = onnx.load(tmp_path / "graphs" / names[-1].replace(".txt", ".onnx"))
    assert "layers.0.qkv.weight" in {value.name for value in model.graph.input}
    assert not [tensor.name for tensor in model.graph.initializer if "weight" in tensor.name]
    assert [record.message for record in caplog.records if record.name.startswith("onnx_ir")] == []


def test_generation_config_and_template_come_along(copy: Path, tmp_path: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    engine = compile_to(copy, tmp_path / "e")
    assert read_manifest(engine).of_role("generation") == "generation_config.json"
    assert (engine / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_manifest_says_what_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    options = {"precision": "bf16", "kv_cache_dtype": "int8", "max_model_len": 100, "tensor_parallel_size": 2}
    with prepare(BuildRequest(str(checkpoint), tmp_path / "e", target="cpu-avx512", **options)) as prepared:
        planned = prepared.memory(num_threads=1)
        manifest = read_manifest(build(prepared))
    assert (manifest.target, manifest.precision, manifest.kv_cache_dtype) == ("cpu-avx512", "bf16", "int8")
    assert (manifest.default_max_model_len, manifest.model.max_model_len) == (100, 256)
    assert (manifest.tensor_parallel_size, manifest.model.vocab_size) == (2, 301)
    assert (manifest.model.architecture, manifest.model.source, manifest.model.revision) == (
        "llama",
        checkpoint.name,
        "",
    )
    stored = load_file(checkpoint / "model.safetensors")
    assert manifest.model.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert manifest.memory == {
        "weights": planned.weights,
        "activations": planned.activations,
        "state_per_token": planned.state_bytes_per_token,
    }
    files = [tmp_path / "e" / f"weights.rank{rank}.safetensors" for rank in (0, 1)]
    assert manifest.memory["weights"] == sum(file.stat().st_size for file in files)


def test_the_tokenizers_files_come_along(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "e")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (engine / name).read_bytes() == (checkpoint / name).read_bytes()


def test_int8_kernels_read_what_their_target_multiplies(checkpoint: Path, tmp_path: Path) -> None:
    for target, dtype in (("cpu-avx2", "i8"), ("cpu-avx512-vnni", "u8")):
        engine = compile_to(checkpoint, tmp_path / target, target=target, precision="int8")
        plan = decode_plan((engine / "plan.rank0.msgpack").read_bytes(), "plan")
        assert {buffer.dtype for buffer in plan.buffers} == {"f32", dtype}


def test_few_rows_and_many_take_one_way_each(checkpoint: Path, tmp_path: Path) -> None:
    """Of the two variants of a norm and its product exactly one runs, whatever the step."""
    engine = compile_to(checkpoint, tmp_path / "e", precision="int8")
    plan = decode_plan((engine / "plan.rank0.msgpack").read_bytes(), "plan")
    for count in (1, 4, 5, 64, 100_000):
        runs = [call for call in plan.forward if all(guard.low <= count <= guard.high for guard in call.guard)]
        written = [o.name for call in runs for o in call.operands.values() if o.kind == "buffer" and o.access == "w"]
        assert len(written) == len(set(written))
        assert sum(call.op == "linear" for call in runs) == 4 * 3 + 1 + 1
        private = {buffer.name for buffer in plan.buffers if buffer.per_thread}
        assert bool(private & set(written)) == (count <= 4)


def test_buffers_share_memory(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "e", precision="int8")
    buffers = decode_plan((engine / "plan.rank0.msgpack").read_bytes(), "plan").buffers
    assert len({buffer.slot for buffer in buffers}) < len(buffers) / 2


def test_a_checkpoint_of_the_hub_is_told_by_its_id_and_revision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, allow_patterns: str(checkpoint))
    with prepare(BuildRequest("owner/name", tmp_path / "e", target="cpu-avx2")) as prepared:
        model = read_manifest(build(prepared)).model
    assert (model.source, model.revision) == ("owner/name", checkpoint.name)
