"""Train the demo model: a tiny Qwen3 that tells little stories, from a synthetic corpus and TinyStories.

    python examples/tiny-stories/train.py --stories ../shared/data/text/tinystories_train_4M.txt --out model

Whole documents are packed into rows and none attends to another, so no story is cut or mixed with its neighbours. The
seeds and the number of steps are fixed: the same machine and the same versions give the same model.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import Dialogue, Document, documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IGNORED = -100  # the label that cross_entropy leaves out
WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\nYou may call these tools: ' }}
    {%- for tool in tools %}
        {%- if not loop.first %}{{- ', ' }}{%- endif %}
        {{- tool.function.name }}
    {%- endfor %}
    {{- '.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content %}
        {{- message.content }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}
                {{- call.function.arguments }}
            {%- else %}
                {{- call.function.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the trained model is, apart from the texts."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 512
    batch_rows: int = 4
    steps: int = 4400
    peak_lr: float = 2.5e-3
    weight_decay: float = 0.1
    synthetic_characters: int = 12_000_000
    seed: int = 0


@dataclass(frozen=True)
class Texts:
    """The documents to learn from, and two sets that are held out."""

    train: list[Document]
    valid_stories: list[Document]
    valid_synthetic: list[Document]


def read_texts(stories_file: Path, settings: Settings) -> Texts:
    """TinyStories (the last 2 % held out) and the synthetic corpus (validation drawn from another seed)."""
    text = stories_file.read_text(encoding="utf-8")
    stories: list[Document] = [story.strip() for story in text.split(END_OF_TEXT) if story.strip()]
    held_out = len(stories) // 50
    synthetic = list(documents(settings.seed, settings.synthetic_characters))
    return Texts(
        train=stories[:-held_out] + synthetic,
        valid_stories=stories[-held_out:],
        valid_synthetic=list(documents(settings.seed + 1, 80_000)),
    )


def build_tokenizer(texts: Iterable[Document], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((plain for text in texts for plain in plain_texts(text)), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=settings.context,
        chat_template=CHAT_TEMPLATE.lstrip(),
        clean_up_tokenization_spaces=False,
    )


def plain_texts(document: Document) -> Iterator[str]:
    """The texts of a document, as the tokenizer's training sees them."""
    if isinstance(document, str):
        yield document
    else:
        for message in document:
            yield message["role"] + "\n" + message["content"]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Document]) -> list[list[int]]:
    """Token ids of each document, closed by the end-of-text token; dialogues go through the chat template."""
    rendered = [text if isinstance(text, str) else render(tokenizer, text) for text in texts]
    end = token_id(tokenizer, END_OF_TEXT)
    return [[*ids, end] for ids in tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]]


def render(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> str:
    """A dialogue as the chat template writes it, without the line break behind the last turn."""
    return str(tokenizer.apply_chat_template(dialogue, tokenize=False)).removesuffix("\n")


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def pack_rows(encoded: list[list[int]], row_length: int, seed: int) -> torch.Tensor:
    """Pack whole documents into rows, first fit over a few open rows -> [num_rows, row_length], padded with IGNORED.

    Documents that are longer than a row are left out.
    """
    order = [ids for ids in encoded if len(ids) <= row_length]
    random.Random(seed).shuffle(order)
    done: list[list[int]] = []
    open_rows: list[list[int]] = []
    for ids in order:
        row = next((row for row in open_rows if len(row) + len(ids) <= row_length), None)
        if row is None:
            row = []
            open_rows.append(row)
            if len(open_rows) > 32:
                done.append(open_rows.pop(0))
        row += ids
    done += open_rows
    rows = np.full((len(done), row_length), IGNORED, dtype=np.int64)
    for target, row in zip(rows, done, strict=True):
        target[: len(row)] = row
    np.random.default_rng(seed).shuffle(rows)
    return torch.from_numpy(rows)


def build_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Qwen3ForCausalLM:
    """A Qwen3 with fresh weights; generation ends at the end of the text and at the end of a turn."""
    ends = [token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, TURN_END)]
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = ends[0]
    return model


def document_positions(inputs: torch.Tensor, end: int) -> torch.Tensor:
    """The position of each token of inputs [batch, length] in its own document, which begins behind an `end`."""
    index = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    is_start = inputs.roll(1, dims=1) == end
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def next_token_loss(model: Qwen3ForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of every next token in rows [batch, row_length], padding left out; matrix products in bf16.

    transformers sees from the positions where a document begins, and lets none attend to another.
    """
    inputs, labels = rows[:, :-1].clamp(min=0), rows[:, 1:]
    end = model.config.pad_token_id
    assert end is not None
    positions = document_positions(inputs, end)
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def validation_loss(model: Qwen3ForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss per token, in nats, over all rows."""
    total = 0.0
    for start in range(0, len(rows), 8):
        total += next_token_loss(model, rows[start : start + 8], "sum").item()
    return total / int((rows[:, 1:] != IGNORED).sum())


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over the first 2 % of the steps, then a cosine down to 2 % of the peak."""
    progress = step / settings.steps
    if progress < 0.02:
        return settings.peak_lr * (progress / 0.02 + 0.01)
    return settings.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def row_batches(rows: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Endless batches [batch_rows, row_length]; every epoch in a new order."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows), settings.batch_rows):
            yield rows[order[start : start + settings.batch_rows]]


def build_optimizer(model: Qwen3ForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    norms = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.95), fused=True)


def train(
    model: Qwen3ForCausalLM, train_rows: torch.Tensor, valid_rows: dict[str, torch.Tensor], settings: Settings
) -> Iterator[dict[str, float]]:
    """Train for `settings.steps` steps; yields a report at every twentieth part of the way."""
    optimizer = build_optimizer(model, settings)
    every = max(1, settings.steps // 20)
    started, train_loss = time.monotonic(), 0.0
    for step, batch in enumerate(row_batches(train_rows, settings), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = next_token_loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train_loss += loss.item() / every
        if step % every == 0 or step == settings.steps:
            report = {"step": step, "minutes": round((time.monotonic() - started) / 60, 2), "train": train_loss}
            yield report | {name: validation_loss(model, rows) for name, rows in valid_rows.items()}
            train_loss = 0.0
        if step == settings.steps:
            return


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face directory, weights in bf16."""
    copy = Qwen3ForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions of transformers know, too
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tiny-stories demo model.")
    parser.add_argument("--stories", type=Path, required=True, help="TinyStories text, stories parted by <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--log", type=Path, help="JSON file for the settings and the losses")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, and save with every report."""
    arguments = parse_arguments()
    settings = Settings(steps=arguments.steps)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(settings.seed)
    texts = read_texts(arguments.stories, settings)
    tokenizer = build_tokenizer(texts.train, settings)
    row_length = settings.context + 1
    train_rows = pack_rows(encode(tokenizer, texts.train), row_length, settings.seed)
    valid_rows = {
        "valid_stories": pack_rows(encode(tokenizer, texts.valid_stories), row_length, settings.seed),
        "valid_synthetic": pack_rows(encode(tokenizer, texts.valid_synthetic), row_length, settings.seed),
    }
    model = build_model(tokenizer, settings)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    num_tokens = int((train_rows != IGNORED).sum())
    print(f"{num_parameters} parameters, {len(train_rows)} rows, {num_tokens} tokens", flush=True)
    reports = []
    for report in train(model, train_rows, valid_rows, settings):
        print(json.dumps(report), flush=True)
        reports.append(report)
        save(model, tokenizer, arguments.out)
    if arguments.log:
        summary = {"settings": asdict(settings), "parameters": num_parameters, "tokens": num_tokens, "reports": reports}
        arguments.log.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
