"""What the CPU benchmark computes, without any rival."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from benchmarks import checkpoints
from benchmarks.checkpoints import SHAPES
from benchmarks.cpu import quality, quiet, serving, setup, tokenizer, turns
from benchmarks.cpu.drive import Task, measure
from benchmarks.cpu.engines import CLASSES, ENGINES, OURS, Engine
from benchmarks.cpu.picture import draw
from benchmarks.cpu.results import Results, Run
from benchmarks.cpu.scenarios import DEFAULT_GROUPS, GROUPS, cells_of
from benchmarks.cpu.table import rows_of, write_table
from benchmarks.roofs import decode_roof, prefill_roof, serve_roof

SHAPE = SHAPES["qwen2.5-0.5b"]
# Two Zen 4 cores (notes/cpu-kernels.md).
LIMITS = {"threads": 2, "dram_gb_per_s": 34.5, "fp32_gflops": 231, "int8_gops": 924, "bf16_gflops": 464}


def run_of(engine: str, number: int = 0, group: str = "core", version: str = "1", **more: object) -> Run:
    document = {"engine": engine, "version": version, "group": group, "round": number, "values": {"decode b1": 30.0}}
    document |= {"before": LIMITS, "after": LIMITS, "others": 0.0}
    return Run(**(document | more))  # type: ignore[arg-type]


def test_no_weight_of_a_random_checkpoint_repeats_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    monkeypatch.setitem(checkpoints.SHAPES, "small", SHAPE | sizes | {"num_attention_heads": 4})
    monkeypatch.setattr(checkpoints, "_CHUNK", 1 << 12)
    data = (checkpoints.make_checkpoint("small", tmp_path) / "model.safetensors").read_bytes()
    values = data[8 + int.from_bytes(data[:8], "little") :]
    parts = [values[begin : begin + 64] for begin in range(0, len(values), 64)]
    weights = [part for part in parts if part != b"\x80\x3f" * 32]
    assert len(weights) > 1000
    assert len(set(weights)) == len(weights)


def test_roofs_are_those_of_the_notes() -> None:
    assert prefill_roof(SHAPE, "int8", 512, LIMITS) == pytest.approx(1216, rel=0.02)
    assert prefill_roof(SHAPE, "int8", 2048, LIMITS) == pytest.approx(1037, rel=0.02)
    assert decode_roof(SHAPE, "int8", 1, 192, LIMITS) == pytest.approx(69, rel=0.02)
    assert decode_roof(SHAPE, "int8", 8, 192, LIMITS) == pytest.approx(537, rel=0.02)
    assert decode_roof(SHAPE, "int8", 32, 192, LIMITS) == pytest.approx(905, rel=0.02)
    assert decode_roof(SHAPE, "int4", 1, 192, LIMITS) == pytest.approx(123, rel=0.02)
    assert decode_roof(SHAPES["llama-3.2-1b"], "int8", 1, 192, LIMITS) == pytest.approx(28, rel=0.02)
    assert decode_roof(SHAPES["qwen3-1.7b"], "int4", 8, 192, LIMITS) == pytest.approx(241, rel=0.02)


def test_a_servers_roof_is_prompts_and_then_steps() -> None:
    seconds = 16 * 256 / prefill_roof(SHAPE, "int8", 256, LIMITS) + 64 * 16 / decode_roof(
        SHAPE, "int8", 16, 288, LIMITS
    )
    assert serve_roof(SHAPE, "int8", 16, 256, 64, LIMITS) == pytest.approx(16 * 64 / seconds)


def test_cells_have_names_of_their_own() -> None:
    names = [cell.name for cell in cells_of(list(GROUPS))]
    assert len(names) == len(set(names))
    assert set(DEFAULT_GROUPS) <= set(GROUPS)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_engines_have_workers_and_say_what_they_lack(engine: Engine) -> None:
    assert (setup.WORKERS / f"{engine.worker}.py").is_file()
    assert engine.lacks or set(engine.precisions) == set(CLASSES)
    assert engine.name == OURS or engine.packages


def test_every_engine_has_its_turn_before_any_has_a_second() -> None:
    tasks = [Task(engine, Path(), "", 0, 2, 1.0) for engine in ENGINES[:3]]
    order = [(turn.task.engine.name, turn.group, turn.round) for turn in turns.turns(tasks, ["core", "load"], 2)]
    names = [engine.name for engine in ENGINES[:3]]
    assert order == [(name, group, number) for group in ("core", "load") for number in (0, 1) for name in names]


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[tuple[str, int]] = []

    def play_one(turn: turns.Turn, version: str, rules: turns.Rules) -> Run:
        played.append((turn.task.engine.name, turn.round))
        return run_of(turn.task.engine.name, turn.round, version=version)

    versions = {engine.name: "1" for engine in ENGINES}
    monkeypatch.setattr(turns, "_run", play_one)
    monkeypatch.setattr(turns, "version", lambda engine: versions[engine.name])
    tasks = [Task(engine, Path(), "", 0, 2, 1.0) for engine in ENGINES[:2]]
    order, rules = list(turns.turns(tasks, ["core"], 2)), turns.Rules(2, 0, 0)
    first, second = ENGINES[0].name, ENGINES[1].name
    # Stopped after three turns of four, and then gone on with, by another process.
    assert turns.play(order, Results(tmp_path / "r.json"), rules, 3) == 1
    assert turns.play(order, Results(tmp_path / "r.json"), rules, None) == 0
    assert played == [(first, 0), (second, 0), (first, 1), (second, 1)]
    # Another version of one is another thing: it is measured anew, in the place of the old one.
    versions[first] = "2"
    assert turns.play(order, results := Results(tmp_path / "r.json"), rules, None) == 0
    assert played[4:] == [(first, 0), (first, 1)]
    assert sorted((run.engine, run.version) for run in results.runs) == sorted([(first, "2"), (second, "1")] * 2)


def test_of_runs_that_were_not_quiet_the_least_disturbed_counts() -> None:
    runs = [run_of(OURS, others=0.5), run_of(OURS, others=0.2), run_of(OURS, others=0.3)]
    assert turns.best_of(iter(runs).__next__, 2).others == 0.2
    runs = [run_of(OURS, others=0.5), run_of(OURS, others=0.01), run_of(OURS, others=0.0)]
    assert turns.best_of(iter(runs).__next__, 2).others == 0.01


def test_a_run_is_not_quiet_when_others_work_or_a_limit_drifts() -> None:
    assert run_of(OURS).unquiet(0.05, 0.1) == ""
    assert "30%" in run_of(OURS, others=0.3).unquiet(0.05, 0.1)
    assert "dram_gb_per_s" in run_of(OURS, after=LIMITS | {"dram_gb_per_s": 20.0}).unquiet(0.05, 0.1)
    assert run_of(OURS, after=LIMITS | {"dram_gb_per_s": 40.0}).limits["dram_gb_per_s"] == 40.0


def test_busy_seconds_leave_out_idle_and_waiting() -> None:
    ticks = quiet._TICKS
    assert quiet.busy_seconds(f"cpu {ticks} {ticks} {ticks} 999 999 {ticks} {ticks} {ticks} 77 77\ncpu0 1") == 6


@pytest.fixture
def results(tmp_path: Path) -> Results:
    results = Results(tmp_path / "results.json")
    results.header = {"machine": {"cpu": "a machine"}, "threads": 2, "commands": ["python -m benchmarks.cpu"]}
    results.missing = {"CTranslate2": "no such package"}
    for number, rate in enumerate((58.0, 60.0, 64.0)):
        results.add(run_of(OURS, number, values={"decode b1": rate, "peak RSS": 600.0, "prefill 512": 800.0}))
        results.add(
            run_of("llama.cpp", number, values={"decode b1": rate - 20, "peak RSS": 800.0, "prefill 512": 200.0})
        )
    results.add(
        run_of("OpenVINO GenAI", 0, values={"decode b1": 28.0, "peak RSS": 500.0}, failures={"prefill 512": "x"})
    )
    return results


def test_rows_compare_medians_with_the_best_rival(results: Results) -> None:
    rows = {row.cell.name: row for row in rows_of(results, ["core"], SHAPE, "int8")}
    decode, memory, prefill = rows["decode b1"], rows["peak RSS"], rows["prefill 512"]
    assert (decode.values[OURS], decode.best_rival, decode.ratio) == (60.0, "llama.cpp", 1.5)
    assert decode.fractions[OURS] == pytest.approx(60 / 69, rel=0.02)
    assert decode.holds
    # Less memory is better.
    assert (memory.best_rival, memory.ratio, memory.holds) == ("OpenVINO GenAI", 500 / 600, False)
    assert (prefill.ratio, prefill.holds) == (4.0, True)
    assert rows["decode b32"].ratio is None


def test_a_cell_near_the_roof_holds_without_the_ratio(results: Results) -> None:
    for number in range(3):
        results.add(run_of("llama.cpp", number, values={"decode b1": 55.0}))
    row = next(row for row in rows_of(results, ["core"], SHAPE, "int8") if row.cell.name == "decode b1")
    assert row.ratio == pytest.approx(60 / 55)
    assert not row.holds
    for number in range(3):
        results.add(run_of(OURS, number, values={"decode b1": 62.0}))
    row = next(row for row in rows_of(results, ["core"], SHAPE, "int8") if row.cell.name == "decode b1")
    assert row.holds


def test_the_table_says_who_is_missing_and_what_failed(results: Results) -> None:
    table = write_table(results, ["core"], SHAPE, "qwen2.5-0.5b", "8-bit")
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert lines["decode b1"].split("|")[3:7] == [" 60 ", " 1.50× ", " 86% ", " yes "]
    assert "**500**" in lines["peak RSS"]
    assert "failed" in lines["prefill 512"]
    assert "- CTranslate2: no such package." in table
    assert "- OpenVINO GenAI prefill 512, failed: x." in table
    assert "dram_gb_per_s 34.5 to 34.5" in table


def test_the_picture_is_a_document_with_a_bar_for_each_value(results: Results) -> None:
    from xml.etree import ElementTree

    rows = rows_of(results, ["core"], SHAPE, "int8")
    picture = ElementTree.fromstring(draw(rows, "a < b"))
    rectangles = picture.findall("{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == 1 + sum(len(row.values) for row in rows)
    assert "a < b" in "".join(picture.itertext())


def test_results_survive_a_stop(results: Results) -> None:
    again = Results(results.path)
    assert (again.runs, again.missing, again.header) == (results.runs, results.missing, results.header)
    assert not results.path.with_suffix(".partial").exists()


@pytest.mark.parametrize(("percent", "value"), [(50, 3), (99, 5), (1, 1), (60, 3), (61, 4)])
def test_percentiles_are_values_that_occurred(percent: int, value: int) -> None:
    assert serving.percentile([5, 3, 1, 4, 2], percent) == value


def test_clients_are_summed_up() -> None:
    streams = [serving.Stream(0.0, [1.0, 1.1, 1.3], 3), serving.Stream(0.5, [2.0, 2.1, 2.5], 3)]
    values = serving.summary(streams, 2, 3)
    assert values["2 clients, output"] == pytest.approx(6 / 2.5)
    assert values["2 clients, TTFT p50"] == pytest.approx(1.0)
    assert values["2 clients, TTFT p99"] == pytest.approx(1.5)
    assert values["2 clients, ITL p99"] == pytest.approx(400)


@pytest.mark.parametrize(("made", "refused"), [(3, False), (2, True)])
def test_a_client_counts_the_tokens_that_the_server_says(made: int, refused: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        events = [{"choices": [{"text": "a", "finish_reason": None}]}] * made
        last = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": made}}
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, last]) + "data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + text.encode())
        await writer.drain()
        writer.close()

    async def go() -> serving.Stream:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await serving.ask(server.sockets[0].getsockname()[1], [1, 2], 3)

    if refused:
        with pytest.raises(OSError, match="2 tokens, not 3"):
            asyncio.run(go())
    else:
        assert len(asyncio.run(go()).pieces) == 3


_WORKER = """
from worker import main, Worker
class Fake(Worker):
    def load(self, model, options):
        print("libraries print what they like")
    def generate(self, prompts, output):
        if len(prompts) == 8:
            raise RuntimeError("eight are too many")
        if len(prompts) == 32:
            raise SystemExit(3)
        return [[len(prompt) + step / 2 for step in range(output)] for prompt in prompts]
main(Fake())
"""


def test_a_worker_answers_fails_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cpu import drive

    (tmp_path / "worker.py").write_text((setup.WORKERS / "worker.py").read_text())
    (tmp_path / "fake.py").write_text(_WORKER)
    monkeypatch.setattr(drive, "WORKERS", tmp_path)
    monkeypatch.setattr(drive, "WORK", tmp_path)
    monkeypatch.setattr(drive, "python", lambda engine: Path(sys.executable))
    task = Task(Engine("fake", "fake", {}), tmp_path, "", 1000, 2, 60.0)
    values, failures = measure(task, "core")
    assert values == {"prefill 512": 1.0, "prefill 2048": 1.0, "decode b1": 2.0}
    assert failures["decode b8"] == "RuntimeError: eight are too many"
    assert "ended with 3" in failures["decode b32"]
    assert set(failures) == {"decode b8", "decode b32", "peak RSS"}


def test_logprobs_are_meant_over_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(setup.WORKERS)
    worker = importlib.import_module("worker")
    logits = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]) + 7.0
    values = worker.log_softmax_at(logits, [1, 0])
    assert values == pytest.approx(np.log([0.25, 0.125]))
    made = worker.Worker()
    monkeypatch.setattr(made, "logprobs", lambda prompt: values[: len(prompt) - 1], raising=False)
    request = {"kind": "logprobs", "prompts": [[0, 1, 0], [0, 1]]}
    assert made.answer(request)["value"] == pytest.approx(np.log([1 / np.sqrt(4 * 8), 0.25]))
    with pytest.raises(RuntimeError):  # a token has none
        made.answer({"kind": "logprobs", "prompts": [[0, 1, 0, 1]]})


@pytest.mark.parametrize(("config", "begin"), [({"bos_token_id": 1}, [1]), ({"bos_token_id": None}, []), ({}, [])])
def test_documents_begin_as_the_model_has_learned(config: dict[str, object], begin: list[int], tmp_path: Path) -> None:
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((checkpoints.TOKENIZER / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    one, two = (Tokenizer.from_file(str(copy)).encode(text, add_special_tokens=False).ids for text in ("One.", "Two."))
    assert quality.tokens_of(tmp_path, "One.\n<|endoftext|>\n<|endoftext|> Two.") == [*begin, *one, *begin, *two]


def test_change_of_perplexity_has_the_standard_error_of_its_windows() -> None:
    exact, lost = np.full(4, -1.5), np.array([0.01, 0.02, 0.03, 0.04])
    change, error = quality.change_percent(exact, exact - lost)
    assert change == pytest.approx(100 * (np.exp(1.525) / np.exp(1.5) - 1), abs=1e-3)
    assert error == pytest.approx(100 * np.exp(0.025) * np.std(lost, ddof=1) / 2, abs=1e-3)
    assert quality.change_percent(exact, exact - 0.02)[1] == 0


def test_quality_is_measured_on_a_copy_in_bf16(tmp_path: Path) -> None:
    values = torch.cat([torch.randn(512), torch.tensor([1.00390625, 1.01171875, -0.0, 3e38])])  # two ties
    (tmp_path / "model").mkdir()
    save_file({"a": values, "b": values.bfloat16()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 400, "rope_parameters": {"rope_theta": 5.0}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    copy = quality.copy_in_bf16(tmp_path / "model", tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    assert all(torch.equal(tensor, values.bfloat16()) for tensor in (tensors["a"], tensors["b"]))
    written = json.loads((copy / "config.json").read_text())
    assert (written["rope_theta"], written["head_dim"]) == (5.0, 16)


def test_decode_counts_while_all_sequences_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(setup.WORKERS)
    worker = importlib.import_module("worker")
    # The second begins late, and the first ends early: from 2 to 4, two tokens of the first and four of the other.
    assert worker.decode_rate([[0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5, 4.0, 9.0]]) == 3.0
    assert worker.decode_rate([[1.0, 2.0, 3.0]]) == 1.0


def test_llama_cpps_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(setup.WORKERS)
    worker = importlib.import_module("llama_worker")
    head = "main: n_kv_max = 272\n\n|  PP |  TG |  B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |\n|---|"
    row = "|   128 |    128 |    1 |    256 |    0.500 |   256.00 |    4.000 |    32.00 |    4.500 |    56.89 |"
    (figures,) = worker.table_rows(f"{head}\n{row}\n\nllama_perf: |")
    assert (figures[worker._PP], figures[worker._TG]) == (256.0, 32.0)


def test_the_tokenizer_has_every_token_once_and_reads_back_what_it_wrote(tmp_path: Path) -> None:
    tokenizer.write_tokenizer(tmp_path, 2000)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.get_vocab_size() == 2000
    text = "Hello, wörld! 123\n\tdone"
    assert loaded.decode(loaded.encode(text).ids) == text
    assert len(tokenizer.random_merges(2000)[0]) == 2000
