"""Whatever a directory holds, verifying, loading and the first tokens raise nothing but EngineryError, within 20 s and
2 GiB. Each batch runs in a process of its own (victim.py), so that a crash names the attack that it is of."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import enginery
import pytest
from enginery.engines.errors import EngineFormatError, EngineryError, TargetError
from enginery.engines.manifest import MANIFEST
from enginery.runtime.cli import enginery as command

from .batches import BATCHES, GPU_BATCHES
from .forge import PLAN, WEIGHTS, Forge, calls_of

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ["windows", "ranks", "longrope"]
MOST_SECONDS, MOST_BYTES = 20, 2 << 30
# The part of each batch that every run of the tests makes: one in so many.
PARTS = {
    "plan numbers": 90,
    "plan operands": 25,
    "plan encodings": 20,
    "plan structure": 16,
    "weights": 20,
    "manifest": 16,
    "tokenizer": 12,
    "signed bytes": 12,
    "unsigned bytes": 3,
    "documents": 3,
    "plan drawing": 40,
    "plan collectives": 12,
}


@dataclass(frozen=True)
class Outcome:
    """Of one attack. refused: by loading, by verifying."""

    attack: str
    seconds: float
    loaded: str
    verified: str

    def is_sound(self) -> bool:
        known = ("ok", "refused")
        return self.seconds < 2 * MOST_SECONDS and self.loaded in known and self.verified in known


def run_batch(engine: Path, batch: str, part: int = 0, parts: int = 1) -> list[Outcome]:
    """Outcomes of a batch, whose process neither crashed nor hung nor took too much memory."""
    arguments = [sys.executable, "-m", "tests.attacks.victim", str(engine), batch, str(part), str(parts)]
    # The process must not outlive its worst attack by much; what it said until then tells which that was.
    process = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800)
    lines = process.stdout.splitlines()
    attacks = [line.removeprefix("attack ") for line in lines if line.startswith("attack ")]
    results = [line.removeprefix("result ") for line in lines if line.startswith("result ")]
    last = attacks[-1] if attacks else "none"
    assert process.returncode == 0, f"crashed with {process.returncode} at {last!r}:\n{process.stderr[-3000:]}"
    memory = int(lines[-1].removeprefix("memory "))
    assert memory < MOST_BYTES, f"batch {batch} took {memory} bytes"
    outcomes = []
    for attack, result in zip(attacks, results, strict=True):
        seconds, rest = result.split(" ", 1)
        loaded, verified = rest.split(" | ", 1)
        outcomes.append(Outcome(attack, float(seconds), loaded, verified))
    unsound = [outcome for outcome in outcomes if not outcome.is_sound()]
    assert not unsound, unsound[:20]
    return outcomes


@pytest.mark.parametrize("batch", BATCHES)
def test_attacks_on_windows(batch: str, sound_engines: dict[str, Path]) -> None:
    outcomes = run_batch(sound_engines["windows"], batch, 0, PARTS.get(batch, 1))
    assert any(outcome.loaded == "refused" for outcome in outcomes)
    if batch in ("unsigned bytes", "special files"):
        # A flipped byte of weights is found after the first token, and by verify.
        silent = [o for o in outcomes if o.loaded == "ok" and not o.attack.startswith(WEIGHTS)]
        assert not silent
        assert all(outcome.verified == "refused" for outcome in outcomes)


@pytest.mark.heavy
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch", BATCHES)
def test_many_more_attacks(batch: str, engine: str, sound_engines: dict[str, Path]) -> None:
    """Four times as many, others on each engine. All of them, hours: `python -m tests.attacks.victim`."""
    parts = max(1, PARTS.get(batch, 1) // 4)
    run_batch(sound_engines[engine], batch, ENGINES.index(engine) % parts, parts)


@pytest.mark.parametrize("batch", GPU_BATCHES)
def test_attacks_on_gpus(batch: str, sound_gpu_engines: dict[str, Path]) -> None:
    outcomes = run_batch(sound_gpu_engines[batch], batch, 0, PARTS[batch])
    assert {"ok", "refused"} == {outcome.loaded for outcome in outcomes}


@pytest.mark.heavy
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("batch", GPU_BATCHES)
def test_many_more_attacks_on_gpus(batch: str, sound_gpu_engines: dict[str, Path]) -> None:
    run_batch(sound_gpu_engines[batch], batch, 1, PARTS[batch] // 4)


@pytest.fixture
def forge(sound_engines: dict[str, Path], tmp_path: Path) -> Forge:
    """A sound engine with windows, about to be damaged."""
    forge = Forge(sound_engines["windows"], tmp_path / "engine")
    forge.restore()
    return forge


def refused(forge: Forge, kind: type[EngineryError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        enginery.Engine.load(forge.directory, max_model_len=128)


def test_a_sound_engine_answers(forge: Forge) -> None:
    with enginery.Engine.load(forge.directory) as engine:
        assert len(engine.generate("Once", enginery.SamplingParams(temperature=0, max_tokens=2))[0].outputs) == 1


def test_attention_cannot_see_behind_the_window_that_its_state_keeps(forge: Forge) -> None:
    """Blocks behind the window are gone; their numbers in the block table are -1."""

    def see_everything(plan: dict[str, object]) -> None:
        for call in calls_of(plan):
            if call["op"] == "attention":
                call["attributes"]["window"] = 0

    forge.edit_plan(see_everything)
    refused(forge, EngineFormatError, r"attribute window: its state keeps \d+ tokens, but all are to be seen")


def test_what_a_cpu_cannot_launch_is_refused(forge: Forge) -> None:
    draws = dict.fromkeys(("token", "logprob", "rank", "top_tokens", "top_logprobs"), forge.plan["buffers"][0]["name"])
    kernel = {"name": "k", "file": "k", "symbol": "k", "role": "sample", "arch": 90, "num_warps": 1, "shared_bytes": 0}
    kernel |= {"registers": 1, "spill_bytes": 0, "instruction": "", "parameters": [], "hidden": 0, "pdl": False}
    launch = {"kind": "launch", "kernel": "k", "region": 1 << 20, "guard": [], "grid": [1, 1, 1], "arguments": {}}
    sample = {"outputs": {"draws": draws | {"top": 1, "edit_slots": 1}}, "instructions": [launch]}

    def draw(plan: dict[str, object]) -> None:
        plan["kernels"] = [kernel]
        plan["entry_points"]["sample"] = sample  # type: ignore[index]

    forge.edit_plan(draw)
    refused(forge, EngineFormatError, "launches k, which cpu-avx2 cannot")


def test_operands_outside_of_their_buffers_are_refused(forge: Forge) -> None:
    forge.edit_plan(lambda plan: plan["buffers"][0].update(bytes=64))
    refused(forge, EngineFormatError, "reaches byte")


def test_extents_that_are_too_small_are_refused(forge: Forge) -> None:
    forge.edit_plan(lambda plan: [o.update(extent=4) for c in calls_of(plan) for o in c["operands"].values()])
    refused(forge, EngineFormatError, r"wanted \d+ bytes, got 4")


def test_state_that_nobody_uses_is_refused(forge: Forge) -> None:
    forge.edit_plan(lambda plan: plan["state_groups"].append(plan["state_groups"][0] | {"name": "idle"}))
    refused(forge, EngineFormatError, "no call uses state group 'idle'")


def test_plans_that_cost_more_than_their_weights_allow_are_refused(forge: Forge) -> None:
    def repeat(plan: dict[str, object]) -> None:
        calls = calls_of(plan)
        plan["buffers"][0]["bytes"] = 1 << 29  # type: ignore[index]
        operand = {"kind": "buffer", "name": plan["buffers"][0]["name"], "extent": 1 << 29}  # type: ignore[index]
        calls[0]["operands"] |= {f"o{i}": operand | {"offset": 0, "access": "r", "layer": -1} for i in range(20)}

    forge.edit_plan(repeat)
    refused(forge, EngineFormatError, "are believed")


def test_newer_formats_are_named(forge: Forge) -> None:
    forge.edit_manifest(lambda manifest: manifest["versions"].update(plan=1))
    refused(forge, EngineFormatError, "plan version 1 is newer than 0")


def test_other_targets_are_named(forge: Forge) -> None:
    forge.edit_manifest(lambda manifest: manifest.update(target="cuda-sm90"))
    refused(forge, TargetError, "was built for cuda-sm90")


def test_an_unsigned_change_is_refused_by_its_hash(forge: Forge) -> None:
    forge.write(PLAN, forge.files[PLAN].replace(b"rms_norm", b"rms_nose"), signed=False)
    refused(forge, EngineFormatError, "the manifest says sha256")


def test_the_command_says_it_with_its_exit_code(forge: Forge) -> None:
    from click.testing import CliRunner

    assert CliRunner().invoke(command, ["verify", str(forge.directory)]).exit_code == 0
    for damage in (
        lambda: forge.write(WEIGHTS, forge.files[WEIGHTS][:-1], signed=False),
        lambda: forge.edit_manifest(lambda manifest: manifest["model"].update(architecture="\ud800")),
        lambda: forge.write(MANIFEST, b"[" * 100_000),
        lambda: forge.write_json("config.json", json.loads(forge.files["config.json"]) | {"eos_token_id": -5}),
    ):
        forge.restore()
        damage()
        result = CliRunner().invoke(command, ["verify", str(forge.directory)])
        assert result.exit_code in (0, 2), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
