"""Targets: which one is a machine's best, and what is told of a machine that lacks something."""

from __future__ import annotations

import io
from typing import Any

import pytest
from enginery.engines.errors import TargetError
from enginery.engines.targets import TARGETS, best_target, find_target, host_features, missing_features

AVX2 = ["avx2", "fma", "f16c", "bmi2"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"]


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (AVX2, "cpu-avx2"),
        ([*AVX2, "avxvnni"], "cpu-avx2-vnni"),
        (AVX512, "cpu-avx512"),
        ([*AVX512, "avx512vnni"], "cpu-avx512-vnni"),
        ([*AVX512, "avx512vnni", "avxvnni", "amx"], "cpu-avx512-vnni"),
        ([*AVX2, "avx512f"], "cpu-avx2"),
        ([*AVX2, "avx512vnni"], "cpu-avx2"),
    ],
)
def test_cpu_is_the_best_that_a_machine_can_run(features: list[str], name: str) -> None:
    assert best_target(features).name == find_target("cpu", features).name == name


@pytest.mark.parametrize("lacking", AVX512)
def test_every_feature_counts(lacking: str) -> None:
    features = [feature for feature in [*AVX512, "avx512vnni"] if feature != lacking]
    assert missing_features(TARGETS["cpu-avx512-vnni"], features) == [lacking]


def test_a_machine_without_any_is_told_what_the_least_needs() -> None:
    with pytest.raises(TargetError, match="cpu-avx2, the least, needs avx2, f16c, bmi2"):
        best_target(["fma", "sse2"])


def test_what_is_not_known_is_refused_with_what_is() -> None:
    with pytest.raises(TargetError, match=r"'cpu-z80' is not known.*cpu, cpu-avx2, .*cpu-avx512-vnni"):
        find_target("cpu-z80")


def test_int8_kernels_of_vnni_targets_take_unsigned_activations() -> None:
    assert {name for name, target in TARGETS.items() if target.unsigned_activations} == {
        "cpu-avx2-vnni",
        "cpu-avx512-vnni",
    }


def test_targets_are_called_as_their_kernels_and_have_blocks_of_32_tokens() -> None:
    assert all(name == target.name for name, target in TARGETS.items())
    cpus = {name: target for name, target in TARGETS.items() if name.startswith("cpu-")}
    assert all(name == f"cpu-{target.isa}" and target.block_size == 32 for name, target in cpus.items())


def _open(text: str | None) -> Any:
    def opened(*arguments: object, **options: object) -> io.StringIO:
        if text is None:
            raise FileNotFoundError
        return io.StringIO(text)

    return opened


def test_features_are_read_under_the_names_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nflags\t\t: fpu avx2 avx_vnni avx512_vnni avx512_bf16\nflags\t\t: other\n"
    monkeypatch.setattr("builtins.open", _open(text))
    assert host_features() == ["fpu", "avx2", "avxvnni", "avx512vnni", "avx512bf16"]
    for nothing in (None, "", "processor : 0\n"):
        monkeypatch.setattr("builtins.open", _open(nothing))
        assert host_features() == []
