"""What each engine's quantization costs a trained model: its perplexity against that of fp32, on the same tokens.

    python -m benchmarks.cpu.quality [--classes 8-bit 4-bit] [--json FILE]
    python -m benchmarks.cpu.quality --model CHECKPOINT --text FILE [--calibrate FILE]

By default the repository's own model on stories that it has not been trained on. Every engine gets the checkpoint in
bf16 and the same windows of tokens, and is configured as where its speed is measured. <|endoftext|> in a text parts its
documents; before each comes the beginning-of-sequence token where the model has one. Calibrated engines are built of
the checkpoint itself, whose tokenizer the text needs. Behind ± the standard error, by the differences of windows.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..checkpoints import TOKENIZER
from ..machine import save
from .drive import Failed, Task, ask
from .engines import CLASSES, ENGINES, OURS
from .models import convert
from .setup import WORK, Unavailable, run, say, set_up, version
from .tokenizer import write_tokenizer

WINDOW = 256
_STORIES = 400
_DEADLINE = 1800.0


def main() -> None:
    """Prints a line for each class and engine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=TOKENIZER, help="a checkpoint of one file")
    parser.add_argument("--text", type=Path, help="default: stories of examples/tiny-stories")
    parser.add_argument("--windows", type=int, default=100, help=f"of {WINDOW} tokens")
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=["8-bit", "4-bit"], metavar="CLASS")
    parser.add_argument("--engines", nargs="+", choices=[engine.folder for engine in ENGINES], metavar="ENGINE")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="measures enginery calibrated with this too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokens = tokens_of(arguments.model, arguments.text.read_text() if arguments.text else stories())
    windows = [tokens[begin : begin + WINDOW] for begin in range(0, len(tokens) - WINDOW + 1, WINDOW)]
    windows = windows[: arguments.windows]
    work = WORK / "quality" / arguments.model.resolve().name
    shutil.rmtree(work, ignore_errors=True)
    checkpoint = copy_in_bf16(arguments.model, work / "checkpoint")
    ours = next(engine for engine in ENGINES if engine.name == OURS)
    exact = logprobs(Task(ours, convert(ours, checkpoint, work / "fp32", "fp32"), "fp32", 0, 2, _DEADLINE), windows)
    perplexity = float(np.exp(-exact.mean()))
    print(f"{len(windows)} windows of {WINDOW} tokens: perplexity in fp32 {perplexity:.4f}", flush=True)
    changes: dict[str, dict[str, list[float]]] = {}
    for precision_class in arguments.classes:
        for engine in ENGINES:
            if arguments.engines and engine.folder not in arguments.engines:
                continue
            if precision_class not in engine.precisions:
                continue
            precision = engine.precisions[precision_class]
            try:
                set_up(engine)
                models = {"": convert(engine, checkpoint, work / f"{engine.folder}.{precision}", precision)}
                if engine.name == OURS and arguments.calibrate:
                    options = ["--precision", precision, "--calibrate", str(arguments.calibrate)]
                    models[", calibrated"] = work / f"calibrated.{precision}"
                    build([str(arguments.model), "-o", str(models[", calibrated"]), *options])
                for how, model in models.items():
                    got = logprobs(Task(engine, model, precision, 0, 2, _DEADLINE), windows)
                    change, error = change_percent(exact, got)
                    name = f"{engine.name}{how}"
                    changes.setdefault(precision_class, {})[f"{name} {version(engine)}"] = [change, error]
                    print(f"{precision_class:8}{name:24}{precision:10}{change:+8.3f} ± {error:.3f} %", flush=True)
            except (Unavailable, Failed) as reason:
                say(f"{engine.name}, {precision_class}: {reason}")
    save(arguments.json, {"windows": len(windows), "perplexity_fp32": perplexity, "change_percent": changes})


def build(arguments: list[str]) -> None:
    """An engine by the user's command. Raises Unavailable."""
    command = [Path(sys.executable).parent / "build-engine", *arguments]
    run(command, WORK / "logs" / "quality.build-engine.log")


def tokens_of(model: Path, text: str) -> list[int]:
    """Of all documents, one after the other."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    begin = json.loads((model / "config.json").read_text()).get("bos_token_id")
    tokens: list[int] = []
    for document in filter(None, (part.strip() for part in text.split("<|endoftext|>"))):
        tokens += [begin] if isinstance(begin, int) else []
        tokens += tokenizer.encode(document, add_special_tokens=False).ids
    return tokens


def stories() -> str:
    """Of the generator that the repository's model has learned from, from a seed of their own."""
    sys.path.insert(0, str(TOKENIZER.parent))
    from stories import draw_scene, story

    draw = random.Random("quality")
    return "<|endoftext|>".join(story(draw, draw_scene(draw)) for _ in range(_STORIES))


def logprobs(task: Task, windows: list[list[int]]) -> NDArray[np.float64]:
    """[windows]: the mean over all tokens but a window's first. Raises Failed."""
    options = json.dumps({"precision": task.precision, "vocab_size": 700, "context": 2 * WINDOW, "sequences": 16})
    answer = ask(task, options, {"kind": "logprobs", "prompts": windows})
    if "error" in answer:
        raise Failed(answer["error"])
    return np.array(answer["value"])


def change_percent(exact: NDArray[np.float64], got: NDArray[np.float64]) -> tuple[float, float]:
    """Of the perplexity, by both sides' logprobs [windows], and its standard error."""
    lost = exact - got
    factor = float(np.exp(lost.mean()))
    return round(100 * (factor - 1), 3), round(100 * factor * float(lost.std(ddof=1)) / len(lost) ** 0.5, 3)


def copy_in_bf16(checkpoint: Path, to: Path) -> Path:
    """With a tokenizer that every converter takes, and a config that all of them read."""
    to.mkdir(parents=True)
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= {"torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config.pop("dtype", None)
    (to / "config.json").write_text(json.dumps(config, indent=1))
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    write_tokenizer(to, config["vocab_size"])
    data = np.fromfile(checkpoint / "model.safetensors", np.uint8)
    begin = 8 + int(data[:8].view(np.uint64)[0])
    entries = json.loads(data[8:begin].tobytes())
    entries.pop("__metadata__", None)
    parts, position = [], 0
    for entry in entries.values():
        first, last = entry["data_offsets"]
        part = data[begin + first : begin + last]
        if entry["dtype"] == "F32":
            bits = part.view(np.uint32).astype(np.uint64)
            part = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
        entry |= {"dtype": "BF16", "data_offsets": [position, position + len(part)]}
        parts.append(part)
        position += len(part)
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    with open(to / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(part.tobytes())
    return to


if __name__ == "__main__":
    main()
