"""What the machine code of every kernel must be that a build for a GPU can select, and what it is (gates.json).

    python -m tests.compiler.cuda.gates            compares with the table, and says what differs
    python -m tests.compiler.cuda.gates --update   writes the table

Words behind it choose the builds in whose names all of them occur, as "sm90 fp8": the table's others stay as they are.
The exit code is 1 where a gate does not hold or the table says something else.

Compiles some hundreds of kernels where they are not in the user's cache: half an hour on two cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginery.compiler.build import BuildRequest, prepare
from enginery.compiler.cuda.choice import compile_chosen
from enginery.engines.plan import KernelImage
from enginery.engines.targets import TARGETS, Target

TABLE = Path(__file__).with_name("gates.json")
# Tensor-core instructions by what is multiplied, on architectures that have no other of their own.
_PRODUCTS = {"bf16": "HMMA", "int8": "IMMA", "fp8": "QMMA"}
_OF_ARCH = {
    90: {"bf16": "HGMMA", "int8": "IGMMA", "fp8": "QGMMA"},
    100: {"bf16": "UTCHMMA", "fp8": "UTCQMMA"},
}
# Llama-3.2-1B's shape, which is large enough for every tile.
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
# Every precision that a target has, with the KV cache types between them.
BUILDS = [("bf16", "bf16"), ("bf16", "int8"), ("fp8", "fp8"), ("int8", "bf16")]


@dataclass(frozen=True)
class Build:
    """One way to build an engine."""

    target: Target
    precision: str
    kv_cache_dtype: str
    batch_invariant: bool = False
    num_ranks: int = 1

    @property
    def name(self) -> str:
        """As the table calls it."""
        words = [self.target.name, self.precision, self.kv_cache_dtype]
        words += ["batch-invariant"] * self.batch_invariant + [f"{self.num_ranks} ranks"] * (self.num_ranks > 1)
        return " ".join(words)


def builds() -> Iterator[Build]:
    """Those that are not refused."""
    for target in TARGETS.values():
        for precision, kv_cache_dtype in BUILDS:
            lacks = (precision == "fp8" and target.arch < 89) or (precision == "int8" and target.arch == 100)
            if target.is_cuda and not lacks:
                yield Build(target, precision, kv_cache_dtype)
                yield Build(target, precision, kv_cache_dtype, batch_invariant=True)
        for num_ranks in (2, 8) if target.is_cuda else ():
            yield Build(target, "bf16", "bf16", num_ranks=num_ranks)


def images(build: Build) -> list[KernelImage]:
    """The kernels of such a build, compiled."""
    with tempfile.TemporaryDirectory() as directory:
        write_empty_checkpoint(Path(directory))
        request = BuildRequest(
            directory,
            None,
            target=build.target.name,
            precision=build.precision,
            kv_cache_dtype=build.kv_cache_dtype,
            batch_invariant=build.batch_invariant,
            tensor_parallel_size=build.num_ranks,
        )
        with prepare(request) as prepared:
            ways = prepared.ranks[0].choice.ways
            if build.num_ranks > 1:  # of other sizes, but for those in which ranks meet
                ways = tuple(way for way in ways if way[0].role == "collective")
            compiled = compile_chosen(ways, build.target, 2)
    images = {kernel.image.name: kernel.image for kernel in compiled.values()}
    return sorted(images.values(), key=lambda image: image.name)


def faults(image: KernelImage, build: Build) -> list[str]:
    """What the kernel's machine code should not be."""
    found, target, precision = [], build.target, build.precision
    if image.role in ("gemm", "attention", "collective") and image.spill_bytes:
        found.append(f"spills {image.spill_bytes} bytes")
    if image.shared_bytes > target.shared_bytes:
        found.append(f"takes {image.shared_bytes} bytes of shared memory, {target.name} has {target.shared_bytes}")
    wanted = None
    if image.role == "gemm":
        wanted = instruction_of(precision, target)
    elif image.name.startswith(("attention_prefill", "attention_attend_any")):
        wanted = instruction_of("bf16", target)
    if wanted is not None and image.instruction != wanted:
        found.append(f"multiplies by {image.instruction or 'no tensor core'}, wanted {wanted}")
    return [f"{image.name} for {build.name}: {fault}" for fault in found]


def instruction_of(precision: str, target: Target) -> str:
    """Of the tensor cores that multiply it there."""
    return _OF_ARCH.get(target.arch, _PRODUCTS)[precision]


def row(image: KernelImage) -> dict[str, Any]:
    """The kernel's line of the table."""
    return {
        "registers": image.registers,
        "shared_bytes": image.shared_bytes,
        "spill_bytes": image.spill_bytes,
        "instruction": image.instruction,
    }


def write_empty_checkpoint(directory: Path) -> None:
    """A checkpoint of the configuration whose weights are holes in a file: nobody reads them."""
    config = _CONFIG
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    assert isinstance(head, int)
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head  # type: ignore[operator]
    shapes: dict[str, list[Any]] = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": [queries, hidden],
            f"{prefix}self_attn.k_proj.weight": [keys, hidden],
            f"{prefix}self_attn.v_proj.weight": [keys, hidden],
            f"{prefix}self_attn.o_proj.weight": [hidden, queries],
            f"{prefix}mlp.gate_proj.weight": [inner, hidden],
            f"{prefix}mlp.up_proj.weight": [inner, hidden],
            f"{prefix}mlp.down_proj.weight": [hidden, inner],
            f"{prefix}input_layernorm.weight": [hidden],
            f"{prefix}post_attention_layernorm.weight": [hidden],
        }
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")


def chosen(words: list[str]) -> list[Build]:
    """The builds in whose names every word occurs. Exits where there is none, as every gate would seem to hold."""
    found = [build for build in builds() if all(word in build.name for word in words)]
    if not found:
        sys.exit(f"no build has {' and '.join(words)} in its name: {'; '.join(build.name for build in builds())}")
    return found


def differences(build: Build, known: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Lines of the table that are other ones now, or that only one of both has."""
    return [
        f"{build.name}: {name}: {known.get(name, 'not there')} -> {found.get(name, 'not there')}"
        for name in sorted(known | found)
        if known.get(name) != found.get(name)
    ]


def main() -> None:
    """See the module."""
    words, updates = [word for word in sys.argv[1:] if not word.startswith("--")], "--update" in sys.argv
    known = json.loads(TABLE.read_text())
    table: dict[str, Any] = {}
    wrong = []
    for build in chosen(words):
        made = images(build)
        table[build.name] = {image.name: row(image) for image in made}
        wrong += [fault for image in made for fault in faults(image, build)]
        if not updates:
            wrong += differences(build, known.get(build.name, {}), table[build.name])
        print(f"{build.name}: {len(made)} kernels", flush=True)
    print("\n".join(wrong) or "every gate holds")
    if updates:
        table = (known if words else {}) | table
        TABLE.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
