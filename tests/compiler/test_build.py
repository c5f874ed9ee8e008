"""Building: the same bytes every time, nothing left by a build that fails, bad input refused with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.compiler.cli import build_engine
from enginery.engines.errors import CheckpointError, CompileError, EngineryError, TargetError
from enginery.engines.manifest import MANIFEST, hash_file, read_manifest
from enginery.engines.plan_format import decode_plan
from enginery.engines.weights import read_weights_header
from enginery.plugins.linear.layouts import deinterleave_gated, unpack_f32_k1n16
from safetensors.torch import load_file, save_file

from ..tiny import edit_config, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("llama-biases", directory)
    return directory


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in checkpoint.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def compile_to(model: Path, output: Path, **options: Any) -> Path:
    with prepare(BuildRequest(str(model), output, **({"target": "cpu-avx2"} | options))) as prepared:
        return build(prepared)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_and_narrow_types_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "whole", dtype)
    make_checkpoint("qwen3", tmp_path / "shards", dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    engines = [
        compile_to(tmp_path / name, tmp_path / f"{name}.engine", precision="fp32") for name in ("whole", "shards")
    ]
    first, second = (hash_file(engine / "weights.rank0.safetensors", "weights", "safetensors") for engine in engines)
    assert first == second


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


def refused(kind: type[EngineryError], reason: str, model: Path, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(kind, match=reason):
        compile_to(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def _drop(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors")

    return damage


def _poison(value: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(tensors, directory / "model.safetensors")

    return damage


def _add(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"model.layers.1.extra": torch.ones(3)}, directory / "model.safetensors")


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _garble(name: str, text: str) -> Callable[[Path], None]:
    def damage(copy: Path) -> None:
        (copy / name).write_text(text)

    return damage


def _no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def _misshape(directory: Path) -> None:
    edit_config(directory, intermediate_size=80)


def _vector(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][7] = float("nan")
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            _drop("model.layers.2.self_attn.k_proj.weight"),
            r"model.layers.2.self_attn.k_proj.weight \[16, 48\]: missing",
        ),
        (_poison(float("nan")), r"model.layers.1.mlp.down_proj.weight\[3, 5\] is not a finite number"),
        (_poison(float("inf")), r"model.layers.1.mlp.down_proj.weight\[3, 5\] is not a finite number"),
        (_vector, r"model.norm.weight\[7\] is not a finite number"),
        (_add, "no use for model.layers.1.extra"),
        (_truncate, "truncated or damaged"),
        (_pickle, "(?s)pickles.*safetensors first: python -c"),
        (_no_tokenizer, "no tokenizer.json"),
        (_garble("generation_config.json", "{bad"), r"generation_config.json: not JSON: .*Download it again"),
        (_garble("tokenizer_config.json", "[]"), "tokenizer_config.json: wanted a JSON object"),
        (_misshape, r"config.json makes it \[80, 48\], the checkpoint has \[72, 48\]"),
    ],
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[Path], None], reason: str, copy: Path, tmp_path: Path
) -> None:
    damage(copy)
    refused(CheckpointError, reason, copy, tmp_path)


def test_everything_missing_is_told_at_once(copy: Path, tmp_path: Path) -> None:
    _drop("model.norm.weight")(copy)
    _drop("model.layers.0.mlp.up_proj.weight")(copy)
    with pytest.raises(CheckpointError) as raised:
        compile_to(copy, tmp_path / "out")
    assert "model.norm.weight" in str(raised.value)
    assert "up_proj" in str(raised.value)


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
    refused(
        CompileError, "2: not implemented for cuda-sm90", checkpoint, tmp_path, target="h200", tensor_parallel_size=2
    )


def test_an_output_that_exists_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(CompileError, match=r"exists|is no engine"):
            compile_to(checkpoint, tmp_path / "out", force=force)
    assert contents(tmp_path / "out") == {"diary.txt": b"dear"}


def test_force_replaces_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    compile_to(checkpoint, tmp_path / "out", precision="int8")
    compile_to(checkpoint, tmp_path / "out", precision="fp32", force=True)
    assert read_manifest(tmp_path / "out").precision == "fp32"


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, iter(range(100))

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if next(calls) > 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2], offset)  # as a disk does that has room for half

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(CompileError, "the disk is full: the engine needs", checkpoint, tmp_path)


def test_a_killed_build_leaves_nothing_that_looks_like_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    """Killed outright in the middle of writing weights; the next build cleans up and succeeds."""
    program = (
        "import os, signal, sys\n"
        "from enginery.compiler import build as b\n"
        "write = b.write_weights\n"
        "def die(*arguments):\n"
        "    write(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "b.write_weights = die\n"
        "with b.prepare(b.BuildRequest(sys.argv[1], b.Path(sys.argv[2]), target='cpu-avx2')) as p: b.build(p)\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(MANIFEST))
    read_manifest(compile_to(checkpoint, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_engine, [str(argument) for argument in arguments])


def test_the_command_says_one_thing_and_exits_with_2(copy: Path, tmp_path: Path) -> None:
    _no_tokenizer(copy)
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


def test_graphs_are_saved_for_people(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "-o", tmp_path / "out", "--save-graph", tmp_path / "graphs", "--target", "cpu-avx2")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "graphs").glob("*.txt"))
    assert names[0] == "rank0.00.model.txt"
    assert len(names) == 10
    assert "PagedAttention" in (tmp_path / "graphs" / names[-1]).read_text()
    model = onnx.load(tmp_path / "graphs" / names[-1].replace(".txt", ".onnx"))
    assert "layers.0.qkv.weight" in {value.name for value in model.graph.input}
    assert not [tensor.name for tensor in model.graph.initializer if "weight" in tensor.name]


def test_generation_config_and_template_come_along(copy: Path, tmp_path: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    engine = compile_to(copy, tmp_path / "e")
    assert read_manifest(engine).of_role("generation") == "generation_config.json"
    assert (engine / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("spelling", ["{}/missing/../engine", "{}/./new/deep/engine/", "{}/a b/é 模型"])
def test_an_output_may_be_spelled_in_any_way(spelling: str, checkpoint: Path, tmp_path: Path) -> None:
    output = compile_to(checkpoint, Path(spelling.format(tmp_path)))
    assert read_manifest(output).model.architecture == "llama"


def test_force_replaces_the_directory_that_one_stands_in(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compile_to(checkpoint, tmp_path / "engine"))
    compile_to(checkpoint, Path(), precision="bf16", force=True)
    monkeypatch.chdir(tmp_path)
    assert read_manifest(tmp_path / "engine").precision == "bf16"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_what_came_to_the_output_during_a_build_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"

    def interfere(count: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "mine").touch()

    with (
        prepare(BuildRequest(str(checkpoint), output, target="cpu-avx2")) as prepared,
        pytest.raises(CompileError, match="exists"),
    ):
        build(prepared, interfere)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["engine", "engine/mine"]


@pytest.mark.parametrize("name", ["n" * 300, "n" * 250])
def test_a_name_too_long_for_the_disk_is_one_message(name: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot be written"):
        compile_to(checkpoint, tmp_path / name)
    with pytest.raises(CompileError, match="--save-graph"):
        compile_to(checkpoint, tmp_path / "engine", save_graph=tmp_path / ("n" * 300))


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, [-1, 5], [1.0, 2.0], ["a", "b"], [[1], [2]]], ids=str)
def test_headers_with_other_kinds_of_values_are_refused(key: str, value: object, copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.norm.weight"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(CheckpointError):
        compile_to(copy, tmp_path / "engine")


def test_a_fifo_is_no_weights_file(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    refused(CheckpointError, "no \\*.safetensors file", copy, tmp_path)


def _rename(directory: Path, rename: Callable[[str], str | None], **more: torch.Tensor) -> None:
    tensors = load_file(directory / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in renamed.items() if name} | more, directory / "model.safetensors")


def weights_of(model: Path, output: Path) -> bytes:
    return (compile_to(model, output, precision="fp32") / "weights.rank0.safetensors").read_bytes()


def test_names_without_the_prefix_are_those_of_a_base_model(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    _rename(copy, lambda name: name.removeprefix("model."))
    read = [
        read_weights_header(compile_to(model, tmp_path / name, precision="fp32") / "weights.rank0.safetensors")
        for name, model in (("prefixed", checkpoint), ("base", copy))
    ]
    assert {name: placed.tensor.layout for name, placed in read[0].placed.items()} == {
        name: placed.tensor.layout for name, placed in read[1].placed.items()
    }


def test_what_old_checkpoints_store_beside_is_no_obstacle(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    _rename(copy, lambda name: name, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert weights_of(copy, tmp_path / "old") == weights_of(checkpoint, tmp_path / "new")


def test_a_tied_head_that_is_stored_too_is_not_used(tmp_path: Path) -> None:
    for name in ("tied", "stored"):
        make_checkpoint("qwen3", tmp_path / name)
    _rename(tmp_path / "tied", lambda name: None if name == "lm_head.weight" else name)
    _rename(tmp_path / "stored", lambda name: name, **{"lm_head.weight": torch.ones(301, 48)})
    assert weights_of(tmp_path / "tied", tmp_path / "a") == weights_of(tmp_path / "stored", tmp_path / "b")


def _integers(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, directory / "model.safetensors")


def test_a_type_that_is_not_implemented_is_refused_where_it_is_used(copy: Path, tmp_path: Path) -> None:
    _integers(copy)
    refused(CheckpointError, "model.norm.weight: stored as I8; implemented are F32, BF16, F16", copy, tmp_path)


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


def test_a_build_that_another_is_making_is_left_to_it(checkpoint: Path, tmp_path: Path) -> None:
    with prepare(BuildRequest(str(checkpoint), tmp_path / "out", target="cpu-avx2")) as prepared:

        def interfere(count: int) -> None:
            with pytest.raises(CompileError, match="another build is writing it now"):
                compile_to(checkpoint, tmp_path / "out")

        build(prepared, interfere)
    read_manifest(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_build_left_goes(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.building"
    (partial / "directory").mkdir(parents=True)
    (partial / "directory" / "file").touch()
    (partial / "leftover").touch()
    engine = compile_to(checkpoint, tmp_path / "out")
    assert {path.name for path in engine.iterdir()} == {MANIFEST, *read_manifest(engine).files}


def test_a_link_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    engine = compile_to(checkpoint, tmp_path / "engine")
    for name, to in (("link", engine), ("dangling", tmp_path / "nothing")):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(CompileError, match="exists"):
            compile_to(checkpoint, tmp_path / name)
        with pytest.raises(CompileError, match="is no engine"):
            compile_to(checkpoint, tmp_path / name, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(CompileError, match="is no engine"):
        compile_to(checkpoint, tmp_path / "file", force=True)
    read_manifest(engine)


def test_a_disk_too_small_is_told_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    monkeypatch.setattr("enginery.compiler.build.write_weights", None)
    refused(CompileError, "the disk is full: the engine needs", checkpoint, tmp_path)


def test_a_checkpoint_of_the_hub_is_told_by_its_id_and_revision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, allow_patterns: str(checkpoint))
    with prepare(BuildRequest("owner/name", tmp_path / "e", target="cpu-avx2")) as prepared:
        model = read_manifest(build(prepared)).model
    assert (model.source, model.revision) == ("owner/name", checkpoint.name)


def test_an_output_that_exists_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_to(checkpoint, tmp_path / "engine")
    monkeypatch.setattr("enginery.compiler.build.write_weights", None)
    with pytest.raises(CompileError, match=r"exists\. Choose another directory"):
        compile_to(checkpoint, tmp_path / "engine")
