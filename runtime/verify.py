"""`enginery verify`: everything that can be known of an engine without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..engines.errors import EngineryError, RequestError
from ..engines.sizes import format_bytes
from ..engines.targets import TARGETS, best_target, missing_features
from .config import EngineConfig
from .files import EngineFiles, open_engine
from .integrity import verify_weights
from .loader import CoreSettings, Rank, read_ranks
from .model import load_tokenizer, read_model
from .prepare import prepare_core

TEMPLATE = "template"
TEMPLATE_REMEDY = "It is the checkpoint's own, and all but chats works: mend it there, and build the engine again."
# Kernels are bound for sequences of this length: their state is then small on every machine.
_SHORT_MODEL_LEN = 256


@dataclass(frozen=True)
class CheckResult:
    """One check. passed: None where it could not be made here."""

    name: str
    passed: bool | None
    detail: str


def verify_engine(directory: Path) -> Iterator[CheckResult]:
    """Every check of the engine at `directory`, in order; those that need a failed one are left out."""
    try:
        files = open_engine(directory)
    except EngineryError as error:
        yield CheckResult("files", False, str(error))
        return
    manifest = files.manifest
    size = format_bytes(manifest.total_bytes())
    yield CheckResult("manifest", True, f"{manifest.model.architecture} {manifest.precision} for {manifest.target}")
    yield CheckResult("files", True, f"{len(manifest.files)} files, {size}, each of its size")
    yield _check("hashes", lambda: _hash_small_files(files))
    yield _check("tokenizer", lambda: _load_tokenizer(files))
    yield _check("model", lambda: _read_model(files))
    yield _check(TEMPLATE, lambda: _compile_template(files))
    ranks: list[Rank] = []
    yield (result := _check("plans", lambda: _read_ranks(files, ranks)))
    if result.passed:
        yield from _check_plans(files, ranks)
    yield _check("weights", lambda: _verify_weights(files))


def _check(name: str, run: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, run())
    except EngineryError as error:
        return CheckResult(name, False, str(error))


def _hash_small_files(files: EngineFiles) -> str:
    names = [name for name, entry in files.manifest.files.items() if entry.role != "weights"]
    for name in names:
        files.read(name)
    return f"{len(names)} files other than weights are as they were built"


def _load_tokenizer(files: EngineFiles) -> str:
    tokenizer = load_tokenizer(files)
    tokenizer.encode("Once upon a time")
    return f"reads text; {len(tokenizer.special_ids)} special tokens"


def _read_model(files: EngineFiles) -> str:
    model = read_model(files, files.manifest.default_max_model_len)
    ends = ", ".join(map(str, model.stop_token_ids)) or "none"
    return f"end tokens {ends}; context {model.max_model_len} tokens"


def _compile_template(files: EngineFiles) -> str:
    template = read_model(files, files.manifest.default_max_model_len).chat_template
    if template is None:
        return "none: the engine completes text alone"
    try:
        template.compile()
    except RequestError as error:
        raise EngineryError(f"{error} {TEMPLATE_REMEDY}") from None
    finally:
        template.close()
    return "compiles"


def _read_ranks(files: EngineFiles, ranks: list[Rank]) -> str:
    ranks += read_ranks(files)
    calls = sum(len(rank.plan.instructions) for rank in ranks)
    tensors = sum(len(rank.weights.placed) for rank in ranks)
    return f"{len(ranks)} rank{'s' if len(ranks) > 1 else ''}, {calls} calls, {tensors} tensors"


def _check_plans(files: EngineFiles, ranks: list[Rank]) -> Iterator[CheckResult]:
    prepared: list[CoreSettings] = []

    def check_bounds() -> str:
        target = TARGETS.get(files.manifest.target)
        if target is None:
            raise EngineryError(f"target {files.manifest.target} is not known to this runtime. Upgrade enginery.")
        length = min(_SHORT_MODEL_LEN, files.manifest.model.max_model_len)
        prepared.append(prepare_core(files, ranks, target, EngineConfig(max_model_len=length)))
        return "every operand lies within its buffer, tensor or state"

    yield (result := _check("bounds", check_bounds))
    if result.passed:
        yield _check_kernels(files, prepared[0])


def _check_kernels(files: EngineFiles, settings: CoreSettings) -> CheckResult:
    from ._core import cpu_features

    features, target = cpu_features(), TARGETS[files.manifest.target]
    if missing := missing_features(target, features):
        try:
            here = best_target(features).name
        except EngineryError:
            here = "none of the CPU targets"
        return CheckResult("kernels", None, f"not checked: this machine is {here} and lacks {', '.join(missing)}")

    def bind() -> str:
        from .engine import make_core

        make_core(settings).close()
        if target.is_cuda:
            return "every kernel is whole machine code, and every launch has what it takes; none was run"
        return "this runtime has every kernel, and they accept their operands"

    return _check("kernels", bind)


def _verify_weights(files: EngineFiles) -> str:
    verify_weights(files)
    chunks = sum(max(1, len(entry.chunks)) for entry in files.manifest.files.values() if entry.role == "weights")
    return f"{chunks} chunk{'s' if chunks > 1 else ''} as they were built"
