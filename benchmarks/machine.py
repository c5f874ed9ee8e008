"""What the machine is, and what it can do at most: printed beside every result.

python benchmarks/machine.py
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def probe(threads: int) -> dict[str, Any]:
    """DRAM bandwidth and peak arithmetic with `threads` threads, measured now."""
    binary = ROOT / "build" / "probe"
    source = Path(__file__).with_name("probe.cpp")
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        binary.parent.mkdir(exist_ok=True)
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-O3", "-march=native", "-std=c++20", "-pthread", str(source), "-o", str(binary)]
        subprocess.run(command, check=True)
    answer = subprocess.run([str(binary), str(threads)], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system and the commit that is measured."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return {
        "cpu": f"{fields.get('model name')}, family {fields.get('cpu family')}, model {fields.get('model')}",
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "commit": _commit(),
    }


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result, with the machine and the command that gave it, if it is wanted."""
    if path is not None:
        spec = sys.modules["__main__"].__spec__
        script = ["-m", spec.name] if spec else [str(Path(sys.argv[0]).resolve().relative_to(ROOT))]
        command = ["python", *script, *sys.argv[1:]]
        path.write_text(json.dumps(result | {"machine": describe(), "command": " ".join(command)}, indent=1) + "\n")


def _commit() -> str:
    if shutil.which("git") is None:
        return "?"
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "?"


if __name__ == "__main__":
    print(json.dumps(describe() | {"limits": probe(os.cpu_count() or 1)}, indent=1))
