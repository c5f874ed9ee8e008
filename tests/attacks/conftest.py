"""Small sound engines, to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

# Several state groups; int8 in two ranks; longrope in bf16. All for the least target, which every machine runs.
_ENGINES = {
    "windows": ("gemma3_text-softcap", "fp32", 1),
    "ranks": ("llama", "int8", 2),
    "longrope": ("phi3-longrope", "bf16", 1),
}


@pytest.fixture(scope="session")
def sound_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines by name."""
    from enginery.compiler.build import BuildRequest, build, prepare

    from ..tiny import make_checkpoint

    engines = {}
    for name, (case, precision, ranks) in _ENGINES.items():
        checkpoint = tmp_path_factory.mktemp("checkpoint")
        make_checkpoint(case, checkpoint)
        output = tmp_path_factory.mktemp("sound") / name
        request = BuildRequest(
            str(checkpoint), output, target="cpu-avx2", precision=precision, tensor_parallel_size=ranks
        )
        with prepare(request) as prepared:
            engines[name] = build(prepared)
    return engines


@pytest.fixture(scope="session")
def sound_gpu_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of kernels without code, for the null device, by the batch of attacks on them."""
    from enginery.plugins.all_reduce import cuda as all_reduce

    from ..runtime.cuda_engines import build_shell

    engines = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_reduce, "_LIBRARY_BYTES", 1)  # sums of two rows are a library's
        for batch, ranks in (("plan drawing", 1), ("plan collectives", 2)):
            directory = tmp_path_factory.mktemp("gpu")
            engines[batch] = build_shell("llama", directory, precision="bf16", tensor_parallel_size=ranks)
    return engines
