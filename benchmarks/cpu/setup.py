"""Sets the rivals up: an environment each, and llama.cpp compiled for this machine. What is there already is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from ..machine import ROOT
from .engines import OURS, Engine

WORK = ROOT / "build" / "bench-cpu"
WORKERS = Path(__file__).with_name("workers")
_LLAMA_PROGRAMS = ("llama-batched-bench", "llama-quantize", "llama-server")
_LLAMA_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


class Unavailable(Exception):
    """An engine that cannot take part, and why: the table says it."""


def set_up(engine: Engine) -> None:
    """Raises Unavailable."""
    if engine.name == OURS:
        return
    if engine.sources and not os.environ.get(engine.sources):
        raise Unavailable(f"not set up: {engine.sources} names no checkout of it")
    stamp, wanted = _environment(engine) / "ready.json", [*engine.packages, engine.sdist]
    if not stamp.is_file() or json.loads(stamp.read_text()) != wanted:
        say(f"{engine.name}: setting up")
        _install(engine)
        stamp.write_text(json.dumps(wanted))
    if engine.sdist:
        _compile(engine, _unpacked(engine) / "vendor" / "llama.cpp")
    elif engine.sources:
        _compile(engine, Path(os.environ[engine.sources]).resolve())


def python(engine: Engine) -> Path:
    """The interpreter that runs its worker."""
    return Path(sys.executable) if engine.name == OURS else _environment(engine) / "bin" / "python"


def environment(engine: Engine, threads: int) -> dict[str, str]:
    """Variables of its worker."""
    variables = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["OMP_NUM_THREADS"] = str(threads)
    places = (_environment(engine) / "lib", Path("/usr/lib/x86_64-linux-gnu"))
    found = [str(place / name) for name in engine.preload for place in places if (place / name).is_file()]
    if found:
        variables["LD_PRELOAD"] = ":".join(found)
    if engine.sdist or engine.sources:
        variables |= {"LLAMA_BIN": str(_programs(engine)), "LLAMA_CPP_LIB_PATH": str(_programs(engine))}
    return variables


def version(engine: Engine) -> str:
    """Of what is measured: a package's, or a commit. Our own, with a mark of what is not committed."""
    if engine.name == OURS:
        rooms = ("plugins", "runtime", "compiler", "engines", "CMakeLists.txt")
        commit = _git(ROOT, "log", "-1", "--format=%h", "--", *rooms)
        changed = _git(ROOT, "diff", "HEAD", "--", *rooms)
        return commit + (f"+{abs(hash_text(changed)):x}" if changed else "")
    if engine.sources:
        return _git(Path(os.environ[engine.sources]), "rev-parse", "--short", "HEAD")
    code = f"from importlib.metadata import version; print(version({engine.version_of!r}))"
    answer = subprocess.run([python(engine), "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "?"


def hash_text(text: str) -> int:
    """Short, and the same in every process."""
    import zlib

    return zlib.crc32(text.encode())


def run(command: list[Any], log: Path, **options: Any) -> None:
    """Runs a command whose output goes into a log. Raises Unavailable with its last lines."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        answer = subprocess.run(list(map(str, command)), stdout=file, stderr=file, check=False, **options)
    if answer.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Unavailable(f"{Path(command[0]).name} failed: {' / '.join(lines[-2:])[-300:]} (all of it: {log})")


def say(text: str) -> None:
    """Progress."""
    print(f"bench-cpu: {text}", flush=True)


def _install(engine: Engine) -> None:
    log = WORK / "logs" / f"setup.{engine.folder}.log"
    if not python(engine).exists():
        run([sys.executable, "-m", "venv", _environment(engine)], log)
    pip = [python(engine), "-m", "pip", "--disable-pip-version-check"]
    report = WORK / "logs" / f"setup.{engine.folder}.json"
    run([*pip, "install", "-q", "--dry-run", "--report", report, *engine.packages], log)
    names = [entry["metadata"]["name"].lower() for entry in json.loads(report.read_text())["install"]]
    if cuda := [name for name in names if name.startswith(("nvidia-", "cuda-"))]:
        raise Unavailable(f"it would bring CUDA: {', '.join(cuda[:3])}, …")
    run([*pip, "install", "-q", *engine.packages], log)
    if engine.without:
        run([*pip, "uninstall", "-q", "-y", *engine.without], log)
    if engine.sdist:
        # Its Python alone: the library that it binds is the one that is compiled below.
        run([*pip, "install", "-q", "scikit-build-core>=1.0"], log)
        options = dict(os.environ) | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
        run([*pip, "install", "-q", "--no-binary", engine.sdist, engine.sdist], log, env=options)


def _unpacked(engine: Engine) -> Path:
    """The source package of the version that is installed."""
    sources = WORK / "sources"
    prefix = f"{engine.sdist.replace('-', '_')}-{version(engine)}"
    if not (sources / prefix).is_dir():
        log = WORK / "logs" / f"setup.{engine.folder}.log"
        wanted = f"{engine.sdist}=={version(engine)}"
        command = [python(engine), "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        run([*command, "--no-binary", engine.sdist, "-d", sources, wanted], log)
        with tarfile.open(next(sources.glob(f"{prefix}*.tar.gz"))) as archive:
            archive.extractall(sources, filter="data")
    return sources / prefix


def _compile(engine: Engine, sources: Path) -> None:
    if all((_programs(engine) / name).is_file() for name in _LLAMA_PROGRAMS):
        return
    say(f"{engine.name}: compiling (some minutes)")
    log, build = WORK / "logs" / f"compile.{engine.folder}.log", _programs(engine).parent
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "cmake"
    options = [f"-D{name}={value}" for name, value in _LLAMA_OPTIONS.items()]
    run([cmake, "-S", sources, "-B", build, *options], log)
    run([cmake, "--build", build, f"-j{os.cpu_count()}", "--target", *_LLAMA_PROGRAMS], log)


def _programs(engine: Engine) -> Path:
    return WORK / "compiled" / engine.folder / "bin"


def _environment(engine: Engine) -> Path:
    return WORK / "venvs" / engine.folder


def _git(directory: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    return answer.stdout.strip()
