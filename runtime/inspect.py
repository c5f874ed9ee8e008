"""`enginery inspect`: what an engine is, for a person or as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..engines.defaults import SHARED_SCRATCH_BYTES, THREAD_SCRATCH_BYTES, default_step, step_limits
from ..engines.manifest import VERSIONS
from ..engines.plan import Call, Launch, Plan, Range, plan_arena
from ..engines.sizes import format_bytes
from .capacity import StateShape
from .files import EngineFiles, open_engine
from .loader import Rank, read_ranks

# A guard that no step reaches is none.
_UNBOUNDED = 1 << 31


def inspect_engine(directory: Path) -> dict[str, Any]:
    """What the engine at `directory` is. Raises EngineFormatError."""
    files = open_engine(directory)
    ranks = read_ranks(files)
    manifest, model = files.manifest, files.manifest.model
    return {
        "model": {
            "architecture": model.architecture,
            "source": model.source,
            "revision": model.revision,
            "num_parameters": model.num_parameters,
            "vocab_size": model.vocab_size,
            "max_model_len": model.max_model_len,
        },
        "target": manifest.target,
        "precision": manifest.precision,
        "kv_cache_dtype": manifest.kv_cache_dtype,
        "max_model_len": manifest.default_max_model_len,
        "tensor_parallel_size": manifest.tensor_parallel_size,
        "batch_invariant": manifest.batch_invariant,
        "calibration": manifest.calibration,
        "layer_precisions": list(manifest.layer_precisions),
        "versions": dict(VERSIONS),
        "files": {
            name: {"role": entry.role, "size": entry.size, "sha256": entry.sha256}
            for name, entry in manifest.files.items()
        },
        "total_bytes": manifest.total_bytes(),
        "memory": _memory(files, ranks),
        "state_groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "window": group.window,
                "layers": group.layers,
                "block_size": group.block_size,
                "block_bytes": group.block_bytes,
                "dtype": group.dtype,
            }
            for group in ranks[0].plan.state_groups
        ],
        "kernels": _kernels(ranks),
    }


def _memory(files: EngineFiles, ranks: list[Rank]) -> dict[str, int]:
    on_gpu = bool(ranks[0].plan.kernels)
    tokens, sequences = default_step(on_gpu)
    block_size = ranks[0].plan.state_groups[0].block_size
    limits = step_limits(tokens, sequences, -(-files.manifest.default_max_model_len // block_size))
    arenas = [plan_arena(rank.plan, limits) for rank in ranks]
    shape = StateShape(ranks[0].plan.state_groups, len(ranks), tokens)
    per_token = sum(group.block_bytes // group.block_size for group in shape.groups) * len(ranks)
    scratch = {"activations_per_thread": max(arena.per_thread_bytes + THREAD_SCRATCH_BYTES for arena in arenas)}
    return {
        "weights": sum(rank.weights.size for rank in ranks),
        "activations": sum(arena.arena_bytes + (0 if on_gpu else SHARED_SCRATCH_BYTES) for arena in arenas),
        **({} if on_gpu else scratch),
        "state_per_token": per_token,
        "state_per_sequence": shape.sequence_bytes(files.manifest.default_max_model_len),
    }


def _kernels(ranks: list[Rank]) -> list[dict[str, Any]]:
    """Of a CPU target the operators that it calls, of a CUDA target the kernels that it launches, with counts."""
    if ranks[0].plan.kernels:
        return _launched(ranks)
    counts: Counter[tuple[str, int, str]] = Counter()
    for rank in ranks:
        calls = [call for call in rank.plan.forward if isinstance(call, Call)]
        counts.update((call.op, call.version, _variant(call, rank)) for call in calls)
    return [
        {"operator": op, "version": version, "variant": variant, "calls": count}
        for (op, version, variant), count in sorted(counts.items())
    ]


def _launched(ranks: list[Rank]) -> list[dict[str, Any]]:
    counts = Counter(each.kernel for rank in ranks for each in rank.plan.instructions if isinstance(each, Launch))
    kernels = {kernel.name: kernel for rank in ranks for kernel in rank.plan.kernels}
    return [
        {
            "name": name,
            "role": kernel.role,
            "arch": kernel.arch,
            "file": kernel.file,
            "registers": kernel.registers,
            "shared_bytes": kernel.shared_bytes,
            "spill_bytes": kernel.spill_bytes,
            "instruction": kernel.instruction,
            "launches": counts[name],
        }
        for name, kernel in sorted(kernels.items())
    ]


def _variant(call: Call, rank: Rank) -> str:
    """What distinguishes a kernel from others of its operator: the forms of what it reads and writes, and its guard."""
    forms = []
    for name in ("a", "x", "table", "weight", "out"):
        operand = call.operands.get(name)
        if operand is None:
            continue
        if operand.kind == "weight" and operand.name in rank.weights.placed:
            forms.append(rank.weights.placed[operand.name].tensor.layout)
        elif operand.kind == "buffer":
            forms.append(f"{name} {_dtype(rank.plan, operand.name)}")
    if activation := call.attributes.get("activation"):
        forms += [str(activation)] if activation != "none" else []
    groups = {group.name: group for group in rank.plan.state_groups}
    forms += [
        f"{groups[operand.name].kind} {groups[operand.name].dtype}"
        for operand in call.operands.values()
        if operand.kind == "state" and operand.name in groups
    ]
    forms += [_guard(guard) for guard in call.guard]
    return ", ".join(forms)


def _guard(guard: Range) -> str:
    if guard.high >= _UNBOUNDED:
        return f"{guard.variable} ≥ {guard.low}"
    return f"{guard.variable} ≤ {guard.high}" if guard.low <= 1 else f"{guard.variable} {guard.low}…{guard.high}"


def _dtype(plan: Plan, name: str) -> str:
    return next((buffer.dtype for buffer in plan.buffers if buffer.name == name), "?")


def describe_engine(facts: dict[str, Any]) -> str:
    """`inspect_engine`'s facts for a person."""
    model, memory = facts["model"], facts["memory"]
    revision = f" at {model['revision']}" if model["revision"] else ""
    parameters = f"{model['num_parameters'] / 1e6:,.1f} M parameters"
    rows = [
        (
            "model",
            f"{model['source']}{revision} ({model['architecture']}, {parameters}, vocabulary {model['vocab_size']})",
        ),
        ("target", facts["target"]),
        ("precision", f"{facts['precision']}, KV cache {facts['kv_cache_dtype']}"),
        ("context", f"{facts['max_model_len']} tokens (the model's own: {model['max_model_len']})"),
        ("tensor parallel", str(facts["tensor_parallel_size"])),
        ("batch invariant", "yes" if facts["batch_invariant"] else "no"),
        *[("of some layers", ", ".join(facts["layer_precisions"]))] * bool(facts["layer_precisions"]),
        ("calibrated", f"with {facts['calibration'][:16]}" if facts["calibration"] else "no"),
        ("versions", ", ".join(f"{section} {version}" for section, version in facts["versions"].items())),
        ("size", format_bytes(facts["total_bytes"])),
    ]
    files = [(name, f"{entry['size']:>15,} bytes  {entry['sha256'][:16]}…") for name, entry in facts["files"].items()]
    memory_rows = [(name.replace("_", " "), format_bytes(count)) for name, count in memory.items()]
    groups = [
        (
            group["name"],
            f"{group['layers']} layers, {group['kind']}{' ' + str(group['window']) if group['window'] else ''}, "
            f"{group['dtype']}, blocks of {group['block_size']} tokens and {group['block_bytes']} bytes",
        )
        for group in facts["state_groups"]
    ]
    kernels = [_describe_kernel(kernel) for kernel in facts["kernels"]]
    sections = [_table(rows)]
    for title, table in (("files", files), ("memory", memory_rows), ("state", groups), ("kernels", kernels)):
        sections.append(f"{title}\n{_table(table, indent=2)}")
    return "\n\n".join(sections)


def _describe_kernel(kernel: dict[str, Any]) -> tuple[str, str]:
    if "operator" in kernel:
        return f"{kernel['operator']} v{kernel['version']}", f"{kernel['calls']:>5} × {kernel['variant']}".rstrip(" ×")
    spills = f", spills {kernel['spill_bytes']} bytes" if kernel["spill_bytes"] else ""
    instruction = f", {kernel['instruction']}" if kernel["instruction"] else ""
    what = f"{kernel['registers']} registers, {kernel['shared_bytes']} bytes shared{spills}{instruction}"
    return kernel["name"], f"{kernel['launches']:>5} × {kernel['role']}: {what}"


def _table(rows: list[tuple[str, str]], indent: int = 0) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{' ' * indent}{name:<{width}}  {text}" for name, text in rows)
