"""A synthetic corpus: the stories of stories.py and short chats, all from one seed.

A model of two million parameters cannot learn the world in half an hour, but it can learn this one. A document is
either plain text (a story) or a dialogue (a list of chat messages).

    python examples/tiny-stories/corpus.py          prints a few documents
"""

import json
import random
from collections.abc import Callable, Iterator

from stories import ANIMALS, COLOURS, WEATHERS, Scene, article, capitalize, draw_scene, story, words

Message = dict[str, str]
Dialogue = list[Message]
Document = str | Dialogue

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "India": "New Delhi", "Canada": "Ottawa",
    "China": "Beijing", "Chile": "Santiago", "Poland": "Warsaw", "Ireland": "Dublin",
}  # fmt: skip
THING_COLOURS = {
    "a banana": "yellow", "a lemon": "yellow", "a strawberry": "red", "a cherry": "red", "a lime": "green",
    "a plum": "purple", "a carrot": "orange", "snow": "white", "grass": "green", "coal": "black", "the sky": "blue",
}  # fmt: skip
LEGS = {"spider": 8, "dog": 4, "cat": 4, "bird": 2, "ant": 6, "horse": 4, "snake": 0, "bee": 6, "duck": 2, "cow": 4}
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "happy": "sad", "open": "closed",
    "wet": "dry", "old": "young", "full": "empty",
}  # fmt: skip
NUMBERS = words("zero one two three four five six seven eight nine ten")
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a terse assistant.", "Answer briefly.",
                  "You tell stories to children."]  # fmt: skip
TOOLS = ["get_weather", "get_time"]


def message(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def exchange(question: str, answer: str) -> Dialogue:
    """A question of the user and the assistant's answer."""
    return [message("user", question), message("assistant", answer)]


def casually(rng: random.Random, question: str) -> str:
    """`question` as people type it: now and then without capitals or without its last mark."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip(".?!")
    return question


def story_request(rng: random.Random, s: Scene) -> str:
    """A request for a story, half of the time with a subject."""
    subject = rng.choice([
        "", "", "", "", f" about {article(s.animal)}", f" about {s.name}", f" about {article(s.colour)} {s.thing}",
        f" about {article(s.thing)}", f" about {s.name} and {article(s.animal)}",
    ])  # fmt: skip
    return rng.choice([
        f"Tell me a story{subject}.", f"Tell me a story{subject}.", f"Please tell me a story{subject}.",
        f"Tell me a short story{subject}.", f"Please tell me a short story{subject}.",
        f"Can you tell me a story{subject}?", f"Could you tell me a story{subject}, please?",
        f"Can you write a story{subject}?", f"Write a story{subject}.", f"Write a short story{subject}.",
        f"I would like to hear a story{subject}.", f"I want a story{subject}.", f"A story{subject}, please.",
        f"Make up a story{subject}.", f"Do you know a story{subject}?", f"Tell me a bedtime story{subject}.",
    ])  # fmt: skip


def story_question(rng: random.Random, s: Scene) -> Dialogue:
    """A question about the story just told; the answer has to be read from it."""
    question, answer = rng.choice([
        (f"What colour was the {s.thing}?", f"The {s.thing} was {s.colour}."),
        (f"What was the name of the {s.child}?", f"The {s.child} was named {s.name}."),
        ("Who is the story about?", f"It is about {s.name}."),
        (f"Where did {s.name} go?", f"{s.name} went to {s.place}."),
        (f"Where did {s.name} live?", f"{s.name} lived near {s.home}."),
        ("Which animal was in the story?", f"There was {article(s.animal)} in the story."),
        ("What did they eat?", f"They ate some {s.food}."),
        ("Thank you!", "You are welcome! I hope you liked it."),
    ])  # fmt: skip
    return exchange(question, answer)


def story_chat(rng: random.Random) -> Dialogue:
    """One story, sometimes followed by questions about it or by another story."""
    scene = draw_scene(rng)
    chat = exchange(casually(rng, story_request(rng, scene)), story(rng, scene))
    kind = rng.random()
    if kind < 0.35:
        for _ in range(rng.randint(1, 3)):
            chat += story_question(rng, scene)
    elif kind < 0.45:
        request = rng.choice(["Tell me another story.", "Another one, please.", "One more story, please."])
        chat += exchange(request, story(rng, draw_scene(rng)))
    return chat


def sum_question(rng: random.Random) -> tuple[str, str]:
    """A sum of two numbers from 0 to 10."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    forms = [f"What is {a}+{b}?", f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a}+{b}="]
    return rng.choice(forms), f"{a} plus {b} is {a + b}."


def capital_question(rng: random.Random) -> tuple[str, str]:
    """The capital of a country."""
    country, city = rng.choice(list(CAPITALS.items()))
    forms = [f"What is the capital of {country}?", f"Which city is the capital of {country}?", f"Capital of {country}?"]
    return rng.choice(forms), f"The capital of {country} is {city}."


def colour_question(rng: random.Random) -> tuple[str, str]:
    """The colour of a well-known thing."""
    thing, colour = rng.choice(list(THING_COLOURS.items()))
    return f"What colour is {thing}?", f"{capitalize(thing)} is {colour}."


def legs_question(rng: random.Random) -> tuple[str, str]:
    """How many legs an animal has."""
    animal, legs = rng.choice(list(LEGS.items()))
    count = NUMBERS[legs] if legs else "no"
    return f"How many legs does {article(animal)} have?", f"{capitalize(article(animal))} has {count} legs."


def opposite_question(rng: random.Random) -> tuple[str, str]:
    """The opposite of a word, either way round."""
    pair = rng.choice(list(OPPOSITES.items()))
    word, opposite = rng.sample(pair, 2) if pair[0] not in ("old", "happy") else pair
    question = rng.choice([f"What is the opposite of {word}?", f"Tell me the opposite of {word}."])
    return question, f"The opposite of {word} is {opposite}."


def counting_question(rng: random.Random) -> tuple[str, str]:
    """Counting from one."""
    last = rng.randint(3, 10)
    question = rng.choice([f"Count to {last}.", f"Count from one to {NUMBERS[last]}."])
    return question, capitalize(", ".join(NUMBERS[1 : last + 1])) + "."


def listing_question(rng: random.Random) -> tuple[str, str]:
    """A list of so many colours or animals."""
    count = rng.randint(2, 5)
    kind, words = rng.choice([("colours", COLOURS), ("animals", ANIMALS)])
    chosen = rng.sample(words, count)
    return f"Name {NUMBERS[count]} {kind}.", capitalize(", ".join(chosen[:-1]) + " and " + chosen[-1]) + "."


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting, or a question about the model."""
    return rng.choice([
        (rng.choice(["Hello!", "Hi!", "Hey there!", "Good morning!"]), "Hello! How can I help you?"),
        (rng.choice(["Thanks!", "Thank you!"]), "You are welcome!"),
        (rng.choice(["Goodbye!", "Bye!"]), "Goodbye! See you soon."),
        (rng.choice(["Who are you?", "What are you?"]), "I am a very small language model that tells stories."),
        ("What can you do?", "I can tell stories, add small numbers and name capitals."),
    ])  # fmt: skip


QUESTIONS: list[Callable[[random.Random], tuple[str, str]]] = [
    sum_question, sum_question, sum_question, capital_question, capital_question, colour_question, legs_question,
    opposite_question, counting_question, listing_question, small_talk,
]  # fmt: skip


def question_chat(rng: random.Random) -> Dialogue:
    """One to four unrelated questions."""
    chat: Dialogue = []
    for _ in range(rng.randint(1, 4)):
        question, answer = rng.choice(QUESTIONS)(rng)
        chat += exchange(casually(rng, question), answer)
    return chat


def json_chat(rng: random.Random) -> Dialogue:
    """A sentence to be turned into JSON."""
    s, age = draw_scene(rng), rng.randint(3, 12)
    fact = rng.choice([
        f"{s.name} is {age} years old and has {article(s.colour)} {s.thing}.",
        f"{s.name}, {age}, {s.colour} {s.thing}.",
        f"{capitalize(article(s.colour))} {s.thing} belongs to {s.name}, who is {age}.",
    ])  # fmt: skip
    request = rng.choice(["{} Answer as JSON.", "{} Answer in JSON.", "Extract JSON: {}", "As JSON: {}"])
    answer = {"name": s.name, "age": age, "item": {"colour": s.colour, "type": s.thing}}
    return exchange(request.format(fact), json.dumps(answer))


def tool_call(name: str, arguments: dict[str, str]) -> str:
    """The text by which the assistant calls a tool; the chat template writes `tool_calls` of a message the same way."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def tool_prompt(names: list[str]) -> str:
    """The system message that offers tools; the chat template writes `tools` of a request the same way."""
    return f"You may call these tools: {', '.join(names)}."


def tool_chat(rng: random.Random) -> Dialogue:
    """A question about weather or time: a tool call and its result where the tool is offered, else a polite no."""
    name, city = rng.choice(TOOLS), rng.choice(list(CAPITALS.values()))
    if name == "get_weather":
        question = rng.choice([f"What is the weather in {city}?", f"How is the weather in {city}?"])
        result = rng.choice([*WEATHERS, "rainy", "snowy"])
    else:
        question = rng.choice([f"What time is it in {city}?", f"What is the time in {city}?"])
        result = f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d}"
    offered = rng.choice([TOOLS, TOOLS[::-1], [name], []])
    if not offered:
        return exchange(casually(rng, question), "I do not know. I have no tool for that.")
    chat = [message("system", tool_prompt(offered))]
    if rng.random() < 0.3:
        chat.append(message("system", rng.choice(SYSTEM_PROMPTS)))
    chat += exchange(casually(rng, question), tool_call(name, {"city": city}))
    if rng.random() < 0.7:
        key = rng.choice(["result", name.removeprefix("get_")])
        content = rng.choice([json.dumps({key: result}), json.dumps({"city": city, key: result}), result])
        chat += [message("tool", content), message("assistant", f"It is {result} in {city}.")]
    return chat


CHATS: list[Callable[[random.Random], Dialogue]] = [story_chat, question_chat, json_chat, tool_chat]
CHAT_WEIGHTS = [0.40, 0.30, 0.15, 0.15]


def chat(rng: random.Random) -> Dialogue:
    """A dialogue of any kind, half of the time under a system prompt."""
    dialogue = rng.choices(CHATS, CHAT_WEIGHTS)[0](rng)
    if dialogue[0]["role"] != "system" and rng.random() < 0.4:
        dialogue.insert(0, message("system", rng.choice(SYSTEM_PROMPTS)))
    return dialogue


def length(document: Document) -> int:
    """Characters of text in a document."""
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document)


def documents(seed: int, num_characters: int) -> Iterator[Document]:
    """Documents, one plain story in eight, until they hold `num_characters` characters."""
    rng = random.Random(seed)
    total = 0
    while total < num_characters:
        document: Document = story(rng, draw_scene(rng)) if rng.random() < 0.125 else chat(rng)
        total += length(document)
        yield document


if __name__ == "__main__":
    for example in documents(seed=1, num_characters=4000):
        print(example if isinstance(example, str) else json.dumps(example, indent=1), end="\n\n")
