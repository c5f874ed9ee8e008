"""Show what the demo model answers, greedily, and count how often it is right.

    python examples/tiny-stories/sample.py examples/tiny-stories/model

The answers come from transformers: they are what an engine built from the model has to say, too.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus import (
    Dialogue,
    capital_question,
    colour_question,
    counting_question,
    exchange,
    json_chat,
    legs_question,
    message,
    opposite_question,
    story_question,
    story_request,
    sum_question,
    tool_chat,
)
from stories import ANIMALS, BOYS, COLOURS, GIRLS, THINGS, article, draw_scene, story
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    "Tell me a story.", "Can you tell me a short story?", "Tell me a story about an owl.",
    "Write a story about Mia and a fox.", "What is the capital of Peru?", "What is 3+4?", "What colour is the sky?",
    "How many legs does a spider have?", "Count to 5.", "Lily is 7 years old and has a red kite. Answer as JSON.",
    "Who are you?", "What is the weather in Rome?",
]  # fmt: skip
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Chat:
    """A model with its tokenizer; `answer` is greedy."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def answer(self, messages: Dialogue, tools: list[dict[str, Any]] | None = None) -> str:
        """The assistant's next turn, with the special token that ends it."""
        prompt = self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        return self.complete(prompt)

    def complete(self, prompt: str) -> str:
        """The text that follows `prompt`."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        room = self.model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, max_new_tokens=room, do_sample=False)[0]
        return str(self.tokenizer.decode(output[inputs["input_ids"].shape[1] :]))


def show(chat: Chat) -> None:
    """Print the answers to fixed prompts."""
    for question in QUESTIONS:
        print(f"user: {question}\nassistant: {chat.answer([message('user', question)])}\n")
    dialogue = [message("user", "Tell me a story about Leo.")]
    for question in ["Which animal was in the story?", "What did they eat?", "Where did Leo go?"]:
        dialogue.append(message("assistant", chat.answer(dialogue).removesuffix("<|im_end|>")))
        dialogue.append(message("user", question))
    dialogue.append(message("assistant", chat.answer(dialogue).removesuffix("<|im_end|>")))
    for turn in dialogue:
        print(f"{turn['role']}: {turn['content']}")
    weather = [message("user", "What is the weather in Rome?")]
    weather.append(message("assistant", chat.answer(weather, [WEATHER_TOOL]).removesuffix("<|im_end|>")))
    weather.append(message("tool", '{"result": "sunny"}'))
    weather.append(message("assistant", chat.answer(weather, [WEATHER_TOOL])))
    print("\nwith the tool get_weather:")
    for turn in weather:
        print(f"{turn['role']}: {turn['content']}")
    print(f"\nOnce upon a time{chat.complete('Once upon a time')}\n")


def accuracy(chat: Chat, draw: Callable[[random.Random], Dialogue], count: int) -> float:
    """The share of `count` fresh dialogues whose last turn the model gives word for word."""
    rng = random.Random(12345)
    right = 0
    for _ in range(count):
        dialogue = draw(rng)
        right += chat.answer(dialogue[:-1]) == dialogue[-1]["content"] + "<|im_end|>"
    return right / count


def story_reading(rng: random.Random) -> Dialogue:
    """A story of the grammar and a question about it."""
    scene = draw_scene(rng)
    return exchange(story_request(rng, scene), story(rng, scene)) + story_question(rng, scene)


def subject_share(chat: Chat, subjects: list[str], count: int) -> float:
    """The share of `count` stories that hold the subject they were asked to be about."""
    rng = random.Random(12345)
    kept = 0
    for _ in range(count):
        subject = rng.choice(subjects)
        request = f"Tell me a story about {subject if subject[0].isupper() else article(subject)}."
        kept += subject in chat.answer([message("user", request)])
    return kept / count


def is_coherent(text: str) -> bool:
    """Whether a story keeps to one child (two in a quarrel), one animal, one colour and one thing, and ends."""
    found = set(re.findall(r"\w+", text))
    num_children = 2 if " was there too." in text else 1
    wanted = [(BOYS + GIRLS, num_children), (ANIMALS, 1), (COLOURS, 1), (THINGS, 1)]
    return text.endswith("<|im_end|>") and all(len(found & set(kind)) == count for kind, count in wanted)


def coherence(chat: Chat, count: int) -> float:
    """The share of `count` fresh requests for a story that a coherent story answers."""
    rng = random.Random(12345)
    requests = [story_request(rng, draw_scene(rng)) for _ in range(count)]
    return sum(is_coherent(chat.answer([message("user", request)])) for request in requests) / count


def json_fields(chat: Chat, count: int) -> dict[str, float]:
    """The share of `count` JSON answers that are valid, and of right names, ages, colours and types among them all."""
    rng = random.Random(12345)
    right = dict.fromkeys(["valid", "name", "age", "colour", "type"], 0.0)
    for _ in range(count):
        dialogue = json_chat(rng)
        wanted = json.loads(dialogue[-1]["content"])
        try:
            got = json.loads(chat.answer(dialogue[:-1]).removesuffix("<|im_end|>"))
        except json.JSONDecodeError:
            continue
        right["valid"] += 1 / count
        for key in ("name", "age"):
            right[key] += (got.get(key) == wanted[key]) / count
        for key in ("colour", "type"):
            right[key] += (got.get("item", {}).get(key) == wanted["item"][key]) / count
    return right


def measure(chat: Chat, count: int) -> None:
    """Print the accuracy on every kind of question that has one right answer."""
    for ask in (sum_question, capital_question, colour_question, legs_question, opposite_question, counting_question):
        share = accuracy(chat, lambda rng, ask=ask: exchange(*ask(rng)), count)  # type: ignore[misc]
        print(f"{ask.__name__}: {share:.0%}")
    print(f"tool_chat: {accuracy(chat, tool_chat, count):.0%}")
    print("json_chat:", ", ".join(f"{field} {share:.0%}" for field, share in json_fields(chat, count).items()))
    print(f"story_question: {accuracy(chat, story_reading, count):.0%}")
    print(f"stories about the child asked for: {subject_share(chat, BOYS + GIRLS, count):.0%}")
    print(f"stories about the animal asked for: {subject_share(chat, ANIMALS, count):.0%}")
    print(f"stories about the thing asked for: {subject_share(chat, THINGS, count):.0%}")
    print(f"coherent stories: {coherence(chat, count):.0%}")


def main() -> None:
    """Samples first, then counts."""
    parser = argparse.ArgumentParser(description="Show what the demo model answers.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--count", type=int, default=100, help="questions of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chat = Chat(arguments.model, getattr(torch, arguments.dtype))
    show(chat)
    measure(chat, arguments.count)


if __name__ == "__main__":
    main()
