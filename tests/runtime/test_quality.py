"""What int8 and int4 cost on a trained checkpoint: perplexity, KL and top-1 agreement against the fp32 engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import enginery
import numpy as np
import pytest
from enginery import SamplingParams
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.compiler.calibration.calibrate import CalibrationRequest, calibrate
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = SHARED / "models" / "stories260K"
TEXT = SHARED / "text" / "eval_tinystories.txt"
TRAINING_TEXT = SHARED / "text" / "tinystories_train_4M.txt"
WINDOW = 256
NUM_WINDOWS = 234
BOS = 1
DISTRIBUTION_STRIDE = 12

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(
    not MODEL.exists(), reason="needs the trained checkpoint stories260K beside the checkout"
)


def windows() -> list[list[int]]:
    """BOS and stripped story, one after the other: the first 60,000 tokens in windows of 256."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stories = [story.strip() for story in TEXT.read_text().split("<|endoftext|>")]
    tokens: list[int] = []
    for story in filter(None, stories):
        tokens += [BOS, *tokenizer.encode(story, add_special_tokens=False).ids]
    return [tokens[index * WINDOW : (index + 1) * WINDOW] for index in range(NUM_WINDOWS)]


class Measured:
    """An engine's logprobs of the text: of every token [windows, 255], and whole distributions for some windows."""

    def __init__(self, directory: Path, texts: list[list[int]], model: Path = MODEL, **options: Any) -> None:
        with prepare(BuildRequest(str(model), directory, **options)) as prepared:
            engine = build(prepared)
            vocab = prepared.config.vocab_size
        with enginery.Engine.load(engine, max_num_batched_tokens=256, max_num_seqs=64) as loaded:
            self.targets = self._logprobs(loaded, texts, 0)
            sample = texts[::DISTRIBUTION_STRIDE]
            self.distributions = self._logprobs(loaded, sample, vocab)

    @staticmethod
    def _logprobs(loaded: enginery.Engine, texts: list[list[int]], count: int) -> Array:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=count, detokenize=False)
        rows = []
        for output, text in zip(loaded.generate(texts, params), texts, strict=True):
            assert output.prompt_logprobs is not None
            entries = [entry for entry in output.prompt_logprobs if entry is not None]
            tokens = [[token] if count == 0 else range(count) for token in text[1:]]
            rows.append([[e[t].logprob for t in wanted] for e, wanted in zip(entries, tokens, strict=True)])
        return np.array(rows)

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.targets.mean()))


# Of each precision the most that it may cost: perplexity in percent, mean KL divergence; and what agrees of top-1.
BOUNDS: dict[str, tuple[dict[str, Any], float, float, float]] = {
    "bf16": ({"precision": "bf16"}, 0.08, 0.0012, 0.97),
    "int8": ({"precision": "int8"}, 0.25, 0.0025, 0.97),
    "int4": ({"precision": "int4"}, 16.0, 0.16, 0.79),
    "int4, zero points": ({"precision": "int4", "zero_points": True}, 9.6, 0.11, 0.83),
    "int4, the head too": ({"precision": "int4", "layer_precisions": ("lm_head=int4",)}, 16.0, 0.16, 0.79),
    "int4, groups of 128": ({"precision": "int4", "group_size": 128}, 20.0, 0.19, 0.77),
}
CALIBRATED: dict[str, tuple[dict[str, Any], float, float, float]] = {
    "int8": ({"precision": "int8"}, 0.25, 0.0025, 0.97),
    "int4": ({"precision": "int4"}, 7.5, 0.08, 0.85),
    "int4, zero points": ({"precision": "int4", "zero_points": True}, 7.5, 0.08, 0.85),
    "int4, the head too": ({"precision": "int4", "layer_precisions": ("lm_head=int4",)}, 8.0, 0.09, 0.84),
}
# With channels of every norm ten to a hundred times as large.
OUTLIERS: dict[str, tuple[dict[str, Any], float, float, float]] = {
    "int8, outliers": ({"precision": "int8"}, 0.5, 0.0025, 0.97),
    "int4, outliers": ({"precision": "int4"}, 7.5, 0.08, 0.85),
}


def test_precisions_stay_near_fp32(tmp_path: Path) -> None:
    texts = windows()
    exact = Measured(tmp_path / "fp32", texts, precision="fp32")
    assert exact.perplexity == pytest.approx(4.6252, rel=1e-3)
    hold(exact, MODEL, tmp_path, BOUNDS)


@pytest.mark.heavy
def test_calibrated_precisions_stay_nearer(tmp_path: Path) -> None:
    exact = Measured(tmp_path / "fp32", windows(), precision="fp32")
    hold(exact, MODEL, tmp_path, CALIBRATED, calibration=calibrated(MODEL, tmp_path))


@pytest.mark.heavy
def test_calibrated_precisions_bear_outliers(tmp_path: Path) -> None:
    exact = Measured(tmp_path / "fp32", windows(), precision="fp32")
    model = with_outliers(tmp_path / "model")
    hold(exact, model, tmp_path, OUTLIERS, calibration=calibrated(model, tmp_path))
    worse = Measured(tmp_path / "nearest", windows(), model=model, precision="int8")
    assert worse.perplexity > 1.2 * exact.perplexity


def calibrated(model: Path, tmp_path: Path) -> Path:
    """A calibration with stories of the same kind that are not those it is measured with."""
    return calibrate(CalibrationRequest(str(model), TRAINING_TEXT, tmp_path / "calibration"))


def with_outliers(directory: Path) -> Path:
    """The model with channels of its norms scaled up and the columns that read them down: the same function."""
    directory.mkdir()
    for path in MODEL.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.copy() for name, tensor in load_file(MODEL / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    for layer in range(5):
        prefix = f"model.layers.{layer}"
        for norm, readers in (("input", "self_attn.q self_attn.k self_attn.v"), ("post_attention", "mlp.gate mlp.up")):
            channels = rng.choice(64, 4, replace=False)
            factors = rng.choice([10, 30, 50, 100], 4).astype(np.float32)
            tensors[f"{prefix}.{norm}_layernorm.weight"][channels] *= factors
            for reader in readers.split():
                tensors[f"{prefix}.{reader}_proj.weight"][:, channels] /= factors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def hold(
    exact: Measured,
    model: Path,
    tmp_path: Path,
    bounds: dict[str, tuple[dict[str, Any], float, float, float]],
    **common: Any,
) -> None:
    """Fails where an engine of `model` is farther from `exact` than its bounds allow."""
    texts = windows()
    for precision, (options, bound, divergence, agreement) in bounds.items():
        got = Measured(tmp_path / precision, texts, model=model, **options, **common)
        change = 100 * (got.perplexity / exact.perplexity - 1)
        fine, coarse = exact.distributions, got.distributions
        kl = float((np.exp(fine) * (fine - coarse)).sum(-1).mean())
        top1 = float((fine.argmax(-1) == coarse.argmax(-1)).mean())
        print(f"{precision}: perplexity {change:+.3f} %, mean KL {kl:.5f}, top-1 {top1:.4f}")
        assert change <= bound
        assert kl <= divergence
        assert top1 >= agreement
        # Far below what the scheme costs, it would not be quantizing what it says.
        assert kl > divergence / 20
