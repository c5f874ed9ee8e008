"""What a cubin's machine code says of a kernel: its registers, whether it spills them, which tensor cores it uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# The longest first: UTCHMMA is no HMMA. Of sm_100, of sm_90, and of all others.
TENSOR_CORE = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_USAGE = re.compile(r"\b(REG|STACK):(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """instruction: the tensor-core instruction that occurs most, empty for none; spill_bytes: per thread."""

    registers: int
    spill_bytes: int
    instruction: str


def read_machine_code(cubin: bytes) -> MachineCode:
    """Disassembles a cubin of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        counts = Counter(_INSTRUCTION.findall(_run("-sass", file.name)))
        usage = {name: int(count) for name, count in _USAGE.findall(_run("-res-usage", file.name))}
    used = {name: count for name in TENSOR_CORE if (count := counts[name])}
    spills = counts["STL"] + counts["LDL"] > 0
    return MachineCode(
        registers=usage["REG"],
        spill_bytes=max(usage["STACK"], 1) if spills else 0,
        instruction=max(used, key=lambda name: used[name]) if used else "",
    )


def _run(option: str, path: str) -> str:
    from triton import backends

    program = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, path], check=True, capture_output=True, text=True).stdout
