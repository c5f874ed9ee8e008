"""Loads engines that mean harm, in a process of its own: `python -m tests.attacks.victim ENGINE BATCH PART PARTS`.

A line with the attack's name goes out before each attack, so that a crash is that attack's; then what came of it. The
last line is the largest memory of the process, in bytes. PART of PARTS: the attacks whose number leaves PART.
"""

from __future__ import annotations

import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import enginery
from enginery.engines.errors import EngineryError
from enginery.engines.targets import Target
from enginery.runtime import gpus
from enginery.runtime.config import EngineConfig
from enginery.runtime.files import EngineFiles
from enginery.runtime.verify import verify_engine

from .batches import BATCHES, GPU_BATCHES
from .forge import Forge

GREEDY = enginery.SamplingParams(temperature=0, max_tokens=3)
DRAWN = enginery.SamplingParams(temperature=1, seed=1, frequency_penalty=0.5, logprobs=2, max_tokens=3)
# Two prompts of unequal length, one of which fills several blocks: steps of several shapes.
PROMPTS = [[5, 6, 7], list(range(3, 83))]


def outcome_of(name: str, run: object) -> str:
    """ "ok", or "refused" where that is an EngineryError; else what escaped."""
    try:
        run()  # type: ignore[operator]
    except EngineryError as error:
        return "refused" if len(str(error)) < 1 << 16 else f"an error of {len(str(error))} characters"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "ok"


def answer(directory: Path) -> None:
    is_for_gpus = any(directory.glob("*.cubin"))
    memory = {"kv_cache_memory_bytes": 1 << 20} if is_for_gpus else {}
    with enginery.Engine.load(directory, max_model_len=128, max_num_seqs=4, num_threads=2, **memory) as engine:
        engine.generate(["Once", *PROMPTS], GREEDY)
        if is_for_gpus:
            engine.generate(PROMPTS, DRAWN)


def verify(directory: Path) -> None:
    if not all(result.passed for result in verify_engine(directory)):
        raise EngineryError("verify says so")


def find_null_gpus(files: EngineFiles, target: Target, config: EngineConfig) -> list[gpus.Gpu]:
    """GPUs that check every launch and compute nothing."""
    return gpus.null_gpus(target, files.manifest.tensor_parallel_size)


def main() -> None:
    gpus.find_gpus = find_null_gpus
    engine, batch, part, parts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with tempfile.TemporaryDirectory() as scratch:
        forge = Forge(engine, Path(scratch) / "engine")
        for attack in itertools.islice((BATCHES | GPU_BATCHES)[batch](forge), part, None, parts):
            print(f"attack {attack.name}", flush=True)
            forge.restore()
            attack.apply(forge)
            start = time.monotonic()
            loaded = outcome_of(attack.name, lambda: answer(forge.directory))
            verified = outcome_of(attack.name, lambda: verify(forge.directory))
            print(f"result {time.monotonic() - start:.3f} {loaded} | {verified}", flush=True)
    print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}")


if __name__ == "__main__":
    main()
