"""The CUDA executor on the null device: thousands of steps of the real loop, and plans that are damaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError, EngineryError
from enginery.engines.expressions import VARIABLES, evaluate
from enginery.engines.fields import LARGEST
from enginery.engines.targets import TARGETS
from enginery.runtime import _core
from enginery.runtime._core import Core
from enginery.runtime.config import EngineConfig
from enginery.runtime.files import open_engine
from enginery.runtime.loader import CoreSettings, read_ranks
from enginery.runtime.prepare import prepare_core
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from .cuda_engines import build_shell, make_step
from .serving import check_same, random_requests, serve

# Case of tests/tiny.py, target, precision, type of the KV cache.
ENGINES = {
    "llama bf16": ("llama", "h100", "bf16", "auto"),
    "llama fp8, fp8 cache": ("llama", "h100", "fp8", "fp8"),
    "biases int8, int8 cache": ("llama-biases", "a100", "int8", "int8"),
    "two groups, tied": ("gemma3_text", "b200", "bf16", "fp8"),
    "two groups fp8": ("gemma3_text-softcap", "l4", "fp8", "bf16"),
    "a window": ("mistral-window", "h100", "int8", "bf16"),
    "a table for long prompts": ("phi3-longrope", "rtx5090", "fp8", "auto"),
    "batch-invariant": ("gemma3_text-softcap", "h100", "fp8", "fp8"),
    "batch-invariant, biases": ("llama-biases", "a100", "int8", "bf16"),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, target, precision, cache = ENGINES[request.param]
    directory = tmp_path_factory.mktemp("engine")
    invariant = request.param.startswith("batch-invariant")
    return build_shell(case, directory, target, precision=precision, kv_cache_dtype=cache, batch_invariant=invariant)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shell("llama", tmp_path_factory.mktemp("engine"), precision="fp8")


def settings(engine: Path, **knobs: Any) -> CoreSettings:
    """For the null device."""
    files = open_engine(engine)
    knobs = {"max_num_seqs": 13, "max_num_batched_tokens": 200, "kv_cache_memory_bytes": 1 << 20} | knobs
    return prepare_core(files, read_ranks(files), TARGETS[files.manifest.target], EngineConfig(**knobs))


def test_thousands_of_steps_are_the_steps_of_the_loop(engine: Path) -> None:
    """The null device checks all launches, and has the null executor compute from the inputs that lie on it."""
    made = settings(engine)
    assert made.executor == "cuda-null"
    config, requests = {**made.config, "max_num_seqs": 13}, random_requests(300)
    wanted = serve(made.spec, config, "null", requests)
    check_same(serve(made.spec, config, "cuda-null", requests), wanted)
    assert wanted.num_tokens > 2000


@pytest.mark.parametrize("knobs", [{"max_num_seqs": 1}, {"max_num_seqs": 13, "max_num_batched_tokens": 13}])
def test_small_steps(llama: Path, knobs: dict[str, int]) -> None:
    made = settings(llama, **knobs)
    config = made.config
    core = Core(made.spec, config, "cuda-null")
    ids = [core.submit({"prompt_token_ids": list(range(3, 60)), "max_tokens": 9}) for _ in range(5)]
    ended = set()
    while len(ended) < len(ids):
        for output in core.wait(60.0):
            assert output.error is None
            if output.finish_reason is not None:
                ended.add(output.request_id)
    core.close()


STEPS = [make_step([(0, 70), (0, 5)], [69, 74]), make_step([(70, 1), (5, 1)], [0, 1])]


def test_steps_by_hand(llama: Path) -> None:
    """Prefill, decode (captured, then replayed), both together, a step without rows."""
    steps = [
        *STEPS,
        make_step([(71, 1), (6, 1)], [0, 1]),
        make_step([(72, 1), (7, 130)], [0, 130]),
        make_step([(73, 1)], []),
        make_step([(74, 1)], [0]),
    ]
    made = settings(llama)
    got, memory = _core.run_forward(made.spec, steps, "cuda-null")
    wanted, _ = _core.run_forward(made.spec, steps, "null")
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(left, right)
    assert memory["state"] == made.spec["num_blocks"][0] * made.spec["groups"][0]["block_bytes"]


Spec = dict[str, Any]


def launches_of(spec: Spec, function: str) -> list[dict[str, Any]]:
    names = [kernel["name"] for kernel in spec["cuda"]["kernels"]]
    return [launch for launch in spec["ranks"][0]["launches"] if function in names[launch["kernel"]]]


def argument(launch: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in launch["arguments"] if item["name"] == name)
    return found


def change_argument(function: str, name: str, **changes: Any) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        for launch in launches_of(spec, function):
            argument(launch, name).update(changes)

    return damage


def remove(function: str) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        for launch in launches_of(spec, function):
            spec["ranks"][0]["launches"].remove(launch)

    return damage


def change_kernel(function: str, **changes: Any) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        for kernel in spec["cuda"]["kernels"]:
            if function in kernel["name"]:
                kernel.update(changes)

    return damage


def change_grid(axis: int, size: Any) -> Callable[[Spec], None]:
    def damage(spec: Spec) -> None:
        launches_of(spec, "embedding_")[0]["grid"][axis] = size

    return damage


def take_argument(spec: Spec) -> None:
    launches_of(spec, "embedding_")[0]["arguments"].pop()


def one_region(spec: Spec) -> None:
    for launch in spec["ranks"][0]["launches"]:
        launch["region"] = 3


def share_bytes(spec: Spec) -> None:
    """The residual stream lies where the first layer's q, k and v are written."""
    buffers = {buffer["name"]: buffer for buffer in spec["ranks"][0]["buffers"]}
    buffers["layers.0.qkv"]["offset"] = buffers["embed_tokens"]["offset"]


def half_written(spec: Spec) -> None:
    item = argument(launches_of(spec, "embedding_")[0], "out")
    item["extent"] = ["*", "tokens", 2]


def infinite(spec: Spec) -> None:
    launch = launches_of(spec, "kv_write_")[0]
    launch["arguments"][-1] = {"name": "count", "parameter": "fp32", "value": float("inf")}
    spec["cuda"]["kernels"][launch["kernel"]]["parameters"][-1] = "fp32"


def other_buffer(spec: Spec) -> None:
    argument(launches_of(spec, "embedding_")[0], "out")["target"] = "layers.0.qkv"


DAMAGED: dict[str, tuple[Callable[[Spec], None], str]] = {
    "an argument too few": (take_argument, r"launch of embedding_\S+ in region 1: 3 arguments are given; it takes 4"),
    "another kind": (
        change_kernel("embedding_", parameters=["pointer", "pointer", "pointer", "i32"]),
        "argument out: is a pointer; the kernel takes an i32",
    ),
    "no order": (one_region, "has no order to the one before it: region 3 comes after region 3"),
    "a grid that is too deep": (change_grid(1, 1 << 16), "axis 1 of its grid is 65536; wanted 1 to 65535"),
    "a grid that is too wide": (change_grid(0, 1 << 31), "axis 0 of its grid is 2147483648"),
    "beyond its buffer": (
        change_argument("embedding_", "out", extent=["*", "tokens", 1 << 20]),
        r"argument out: \d+ bytes reach outside of 'embed_tokens'",
    ),
    "before its buffer": (change_argument("embedding_", "out", offset=-16), "reach outside of 'embed_tokens'"),
    "beyond its tensor": (change_argument("embedding_", "table", offset=1 << 20), "reach outside of 'model.embed"),
    "nothing at all": (change_argument("embedding_", "out", extent=0), "argument out: reaches over 0 bytes"),
    "a crooked address": (change_argument("embedding_", "table", offset=8), "argument table: its address is not a mul"),
    "another buffer": (other_buffer, "argument out: points into 'embed_tokens', not 'layers.0.qkv'"),
    "a weight that is written": (change_argument("embedding_", "table", access="w"), "argument table: writes 'model."),
    "an input that is written": (change_argument("embedding_", "token_ids", access="rw"), "writes 'token_ids'"),
    "a number too large": (
        change_argument("kv_write_", "count", value=1 << 40),
        "argument count: is larger than an i3",
    ),
    "a number without end": (infinite, "argument count: is not finite"),
    "read before it is written": (remove("embedding_"), "reads 'embed_tokens', which is not written in this step"),
    "bytes that others have since": (share_bytes, "or whose bytes others have since"),
    "half written": (half_written, r"bytes of 'embed_tokens', of which 150 are written"),
    "state without news": (remove("kv_write_"), "argument state: reads state of 'full', to which this step has added"),
    "no logits": (
        change_argument("linear_", "out", extent=128),
        r"bytes of logits are read, of which the step has written 128|of which 128 are written",
    ),
    "no tiles": (lambda spec: spec["cuda"].update(tile_tokens=0), "reads 'layers.0.attention', which is not written"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_null_device_notices(llama: Path, damage: str) -> None:
    made = settings(llama)
    spec = copy.deepcopy(made.spec)
    change, message = DAMAGED[damage]
    change(spec)
    with pytest.raises(EngineryError, match=f"null device: .*({message})"):
        _core.run_forward(spec, STEPS, "cuda-null")


def put_into_nothing(spec: Spec, name: str) -> None:
    rank = spec["ranks"][0]
    rank["draws"][name] = len(rank["buffers"])


REFUSED: dict[str, tuple[Callable[[Spec], None], str]] = {
    "shared memory": (change_kernel("linear_", shared_bytes=1 << 20), "of shared memory; sm90 has 232448"),
    "machine code cut off": (change_kernel("linear_", cubin=b"\x7fELF" + bytes(30)), "is no whole ELF file for a GPU"),
    "a kernel that is not there": (lambda spec: spec["ranks"][0]["launches"][0].update(kernel=99999), "is not there"),
    "a buffer that is not there": (change_argument("embedding_", "out", index=9999), "is not there"),
    "a weight that is not there": (change_argument("embedding_", "table", index=-1), "is not there"),
    "a layer that is not there": (change_argument("kv_write_", "state", layer=77), "State of layer 77 of group 0"),
    "a group that is not there": (change_argument("kv_write_", "slots", index=5), "'slots' of state group 5"),
    "an input that is not there": (change_argument("embedding_", "token_ids", target="adapters"), "'adapters'"),
    "a variable that is not there": (change_grid(0, "adapters"), "a variable 'adapters'"),
    "an operator that is not there": (change_grid(0, ["-", 1, 1]), "an operator '-'"),
    "a division by what varies": (change_grid(0, ["ceil_div", 1, "rows"]), "a ceil_div by what is no positive number"),
    "a huge number": (change_grid(0, 1 << 60), "the number 1152921504606846976"),
    "weights that are cut off": (
        lambda spec: spec["ranks"][0].update(weights_file_bytes=spec["ranks"][0]["weights_file_bytes"] + 1),
        "wanted a file of",
    ),
    "a crooked weight": (lambda spec: spec["ranks"][0]["weights"][0].update(offset=4100), "not on 64 bytes"),
    "logits that do not fit": (lambda spec: spec.update(max_rows=10_000), "The logits of 10000 rows do not fit"),
    **{
        f"{name} that do not fit": (lambda spec, name=name: put_into_nothing(spec, name), "What is drawn for 13 rows")
        for name in ("token", "logprob", "rank", "top_tokens", "top_logprobs")
    },
    "nothing listed": (lambda spec: spec["ranks"][0]["draws"].update(top=0), "What is drawn for 13 rows does not fit"),
    "too much listed": (lambda spec: spec["ranks"][0]["draws"].update(top=21), "What is drawn for 13 rows does not"),
    "no slots": (lambda spec: spec["ranks"][0]["draws"].update(edit_slots=0), "What is drawn for 13 rows does not fit"),
    "a buffer beyond the arena": (
        lambda spec: spec["ranks"][0]["buffers"][0].update(offset=1 << 40),
        "lies outside of the arena",
    ),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_refuses_to_load(llama: Path, damage: str) -> None:
    spec = copy.deepcopy(settings(llama).spec)
    change, message = REFUSED[damage]
    change(spec)
    with pytest.raises(EngineFormatError, match=message):
        _core.run_forward(spec, [], "cuda-null")


def test_after_a_failed_step_nothing_runs(llama: Path) -> None:
    made = settings(llama)
    core = Core({**made.spec, "isa": "fail_on=13"}, {**made.config, "manual_steps": True}, "cuda-null")
    for prompt in ([13], [14]):
        core.submit({"prompt_token_ids": prompt, "max_tokens": 3})
        core.step()
        (output,) = core.wait(0)
        assert output.finish_reason == "error"
        assert ("restart the server" in str(output.error)) == (prompt == [14])
    core.close()


SIZES = st.recursive(
    st.one_of(st.integers(0, 1 << 20), st.sampled_from(VARIABLES)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "*", "min", "max"]), inner, inner).map(list),
        st.tuples(st.sampled_from(["ceil_div", "round_up"]), inner, st.integers(1, 1000)).map(list),
    ),
    max_leaves=12,
)


@given(expression=SIZES)
@settings_of(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_expressions_are_those_of_the_compiler(llama: Path, expression: Any) -> None:
    """Seen in what the null device says of a grid that is too large."""
    spec = copy.deepcopy(settings(llama).spec)
    change_grid(0, ["+", expression, 1 << 31])(spec)
    variables = {"tokens": 75, "rows": 2, "sequences": 2, "decodes": 0, "tiles": 2}
    variables |= dict.fromkeys(("drawn", "edited", "ranked", "listed", "edits"), 0)
    variables["max_blocks"] = spec["cuda"]["max_blocks"]
    with pytest.raises(EngineryError) as caught:
        _core.run_forward(spec, STEPS[:1], "cuda-null")
    wanted = evaluate(["+", expression, 1 << 31], variables)
    said = int(str(caught.value).split("of its grid is ")[1].split(";")[0])
    assert said == wanted or min(said, wanted) > LARGEST
