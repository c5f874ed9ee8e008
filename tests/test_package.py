"""The package as it is installed: what importing the runtime brings, and the commands that pyproject.toml declares."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import enginery
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "safetensors", "huggingface_hub", "ml_dtypes", "sympy", "triton"}


@pytest.mark.parametrize("module", ["enginery", "enginery.runtime.engine", "enginery.runtime.cli"])
def test_runtime_brings_nothing_of_the_compiler(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    modules = json.loads(result.stdout)
    assert module in modules
    assert not HEAVY & {name.split(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith(("enginery.compiler", "enginery.plugins"))]


def test_a_build_does_without_sympy() -> None:
    """onnx-ir imports it, a quarter of a second, to compute with symbolic dimensions; and can still do that."""
    program = """import sys
from enginery.compiler.startup import import_onnx_ir
import_onnx_ir()
import enginery.compiler.build, enginery.compiler.cli, onnx_ir
assert not [name for name in sys.modules if name.startswith("sympy")], "sympy was imported"
assert str(onnx_ir.SymbolicDim("max(n, 3)") + onnx_ir.SymbolicDim("n")) == "n + Max(3, n)"
assert sys.modules["sympy"].Symbol"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_command_tells_its_version(command: str) -> None:
    program = [str(Path(sys.executable).parent / command), "--version"]
    result = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == f"{command}, version {PROJECT['version']}"


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_command_exists(command: str) -> None:
    module, function = PROJECT["scripts"][command].split(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", ["Engine", "EngineryError", "RequestOutput", "SamplingParams"])
def test_package_offers(name: str) -> None:
    assert getattr(enginery, name).__module__.startswith("enginery.")


def test_package_refuses_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        enginery.Engin  # noqa: B018


def test_version_is_the_projects() -> None:
    assert enginery.__version__ == PROJECT["version"]


def test_tests_run_the_checkout() -> None:
    assert Path(enginery.__file__).resolve() == ROOT / "__init__.py"
    assert Path(import_module("enginery.engines").__file__ or "").resolve() == ROOT / "engines" / "__init__.py"


def _installed_with(name: str, seen: set[str]) -> int:
    """Bytes of a distribution and of all it requires without extras, byte code counted as pip compiles it."""
    key = canonicalize_name(name)
    if key in seen:
        return 0
    seen.add(key)
    distribution = metadata.distribution(key)
    size = sum(Path(str(path)).stat().st_size for path in _files(distribution) if path.exists())
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            size += _installed_with(requirement.name, seen)
    return size


def _files(distribution: metadata.Distribution) -> list[Path]:
    return [Path(str(distribution.locate_file(file))) for file in distribution.files or []]


def test_the_runtime_installs_in_130_megabytes() -> None:
    seen: set[str] = set()
    dependencies = _installed_with("enginery", seen)
    rooms = [path for room in ("engines", "plugins", "compiler", "runtime") for path in (ROOT / room).rglob("*.py")]
    # Sources twice, for their byte code; the extensions are among the editable install's files.
    own = 2 * sum(path.stat().st_size for path in rooms)
    assert "torch" not in seen
    assert dependencies + own <= 130_000_000, f"{(dependencies + own) / 1e6:.0f} MB: {sorted(seen)}"
