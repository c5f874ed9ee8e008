"""Little stories written by a grammar: a child, a toy, an animal and one event.

Every sentence of a story draws on the same scene, so names, things and colours stay the same from start to end.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


def words(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


BOYS = words("Tom Ben Max Sam Leo Jack Finn Noah Oscar Hugo Omar Ravi Ivan Luca")
GIRLS = words("Lily Mia Anna Zoe Ella Ruby Nora Ada Iris Maya Lena Aisha Yuki Rosa")
ANIMALS = words("fox rabbit owl bear duck mouse turtle hedgehog squirrel goat")
COLOURS = words("red blue green yellow orange purple white brown")
THINGS = words("kite ball drum boat lantern hat key bell map cup book wagon umbrella basket")
SIZES = words("small big tiny huge old new shiny heavy")
PLACES = ["the forest", "the river", "the old mill", "the garden", "the hill", "the market", "the lake", "the barn",
          "the bridge", "the beach"]  # fmt: skip
FOODS = words("bread soup apples cake honey cheese pears pancakes berries")
WEATHERS = words("sunny windy foggy cold warm")
GLAD = words("happy proud excited surprised grateful")


def article(noun: str) -> str:
    """`noun` with the article that fits it: "a red kite", "an owl"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalize(text: str) -> str:
    """`text` with its first letter, and only that, in upper case."""
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Scene:
    """Who and what a story is about; every sentence of the story draws on the same scene."""

    name: str
    he: str
    him: str
    his: str
    child: str
    friend: str
    animal: str
    thing: str
    colour: str
    size: str
    place: str
    home: str
    food: str
    weather: str
    glad: str


def draw_scene(rng: random.Random) -> Scene:
    """A scene with everything drawn at random."""
    boy = rng.random() < 0.5
    name = rng.choice(BOYS if boy else GIRLS)
    place, home = rng.sample(PLACES, 2)
    return Scene(
        name=name,
        he="he" if boy else "she",
        him="him" if boy else "her",
        his="his" if boy else "her",
        child="boy" if boy else "girl",
        friend=rng.choice([other for other in BOYS + GIRLS if other != name]),
        animal=rng.choice(ANIMALS),
        thing=rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        size=rng.choice(SIZES),
        place=place,
        home=home,
        food=rng.choice(FOODS),
        weather=rng.choice(WEATHERS),
        glad=rng.choice(GLAD),
    )


def opening(rng: random.Random, s: Scene) -> str:
    """The first paragraph: the child, and the thing it owns."""
    child = rng.choice([
        f"Once upon a time, there was a {s.child} named {s.name}. {capitalize(s.he)} lived near {s.home}.",
        f"Once upon a time, a {s.child} named {s.name} lived near {s.home}.",
        f"{s.name} was a little {s.child} who lived near {s.home}.",
        f"Near {s.home} there lived a {s.child} named {s.name}.",
    ])  # fmt: skip
    thing = rng.choice([
        f"{s.name} had {article(s.size)} {s.colour} {s.thing}.",
        f"{capitalize(s.his)} favourite thing was {article(s.colour)} {s.thing}.",
        f"{s.name} loved {s.his} {s.colour} {s.thing} more than anything.",
    ])  # fmt: skip
    return f"{child} {thing}"


def outing(rng: random.Random, s: Scene) -> str:
    """How the child and the thing came to the place where it happened."""
    return rng.choice([
        f"One {s.weather} day, {s.name} took the {s.thing} to {s.place}.",
        f"One day {s.he} walked to {s.place} with the {s.thing}.",
        f"It was a {s.weather} morning, so {s.name} carried the {s.thing} to {s.place}.",
    ])  # fmt: skip


def sharing(rng: random.Random, s: Scene) -> tuple[str, str]:
    """An animal wants to play, and the child shares."""
    hello = rng.choice(["Hello", "Good morning", "Hi there"])
    wish = rng.choice([f"May I hold your {s.thing}?", f"Can I play with your {s.thing}?", "Will you play with me?"])
    manner = rng.choice(["thought for a moment", "smiled", "nodded slowly"])
    answer = rng.choice(["Yes, if you are careful.", "Of course. We can share it.", "Yes! Let us play together."])
    middle = f'There {s.he} met {article(s.animal)}. "{hello}, {s.name}," said the {s.animal}. "{wish}"\n\n'
    middle += f'{s.name} {manner} and said, "{answer}"'
    end = f"They played with the {s.thing} until the sun went down. Then the {s.animal} gave {s.name} some {s.food}. "
    end += f"{s.name} was very {s.glad} and went home with {s.his} {s.colour} {s.thing}."
    return middle, end


def losing(rng: random.Random, s: Scene) -> tuple[str, str]:
    """The thing is lost, and an animal finds it."""
    mood = rng.choice(["sad", "worried", "upset"])
    where = rng.choice(["under a rock", "behind a wall", "in the tall grass", "under the bushes"])
    search = rng.choice(["looked around", "ran off", "thought about it"])
    middle = f"But soon the {s.thing} was gone! {s.name} was very {mood}. {capitalize(s.he)} looked {where}, but it "
    middle += f'was not there. Then {article(s.animal)} came and asked, "Why are you so {mood}?"\n\n'
    middle += f'"I lost my {s.colour} {s.thing}," said {s.name}. "I will help you," said the {s.animal}.'
    end = f'The {s.animal} {search} and soon came back with the {s.thing}. "Thank you!" said {s.name}. '
    end += f"{capitalize(s.he)} shared {s.his} {s.food} with the {s.animal}, and from that day they were friends."
    return middle, end


def quarrel(rng: random.Random, s: Scene) -> tuple[str, str]:
    """Another child grabs the thing, and learns to ask."""
    mood = rng.choice(["bad", "ashamed", "sorry"])
    feeling = rng.choice(["smiled", "was not angry any more", "was glad"])
    middle = f'{s.friend} was there too. {s.friend} wanted the {s.thing} and tried to take it. "That is not kind," '
    middle += f'said {s.name}. "You have to ask first."\n\n{s.friend} felt {mood}. "I am sorry," said {s.friend}. '
    middle += f'"May I please use your {s.thing}?"'
    end = f"{s.name} {feeling} and gave {s.friend} the {s.thing}. They took turns all day, and {article(s.animal)} "
    end += f"came to watch them. In the evening they ate some {s.food} together. "
    end += f"{s.friend} learned that it is better to ask."
    return middle, end


def storm(rng: random.Random, s: Scene) -> tuple[str, str]:
    """Bad weather, and an animal that opens its door."""
    mood = rng.choice(["cold", "afraid", "worried"])
    weather = rng.choice(["rain", "snow"])
    house = rng.choice(["a little house", "a hollow tree", "a small cave"])
    middle = f"Then it began to {weather}, and {s.name} was {mood}. {capitalize(s.he)} saw a light in {house} and "
    middle += f'walked towards it. {capitalize(article(s.animal))} looked out. "Come in, {s.name}," said the '
    middle += f'{s.animal}. "You can have some {s.food}."'
    end = f"{s.name} ate the {s.food} and told the {s.animal} about the {s.colour} {s.thing}. When the {weather} "
    end += f"stopped, {s.he} went home. {capitalize(s.his)} mother was {s.glad} to see {s.him}."
    return middle, end


def rescue(rng: random.Random, s: Scene) -> tuple[str, str]:
    """An animal is stuck, and the child helps it."""
    trouble = rng.choice(["My foot is stuck under a stone", "I am stuck in the mud", "I fell into a hole"])
    pull = rng.choice(["pulled and pulled", "pulled with both hands", "pulled as hard as " + s.he + " could"])
    middle = f'Suddenly {s.he} heard a voice. "Help! {trouble}!" It was {article(s.animal)}. {s.name} put down the '
    middle += f"{s.thing} and ran to help. {capitalize(s.he)} {pull}, and at last the {s.animal} was free."
    end = f'"Thank you, {s.name}," said the {s.animal}. "You are very brave." The {s.animal} gave {s.him} some '
    end += f"{s.food}, and {s.name} let the {s.animal} play with the {s.colour} {s.thing}. They were both {s.glad}."
    return middle, end


def birthday(rng: random.Random, s: Scene) -> tuple[str, str]:
    """The child gives the thing away."""
    lonely = rng.choice(["But nobody came.", "But I have no presents.", "But I am all alone."])
    thought = rng.choice(["thought about it", "was quiet for a while", "looked at the " + s.thing])
    middle = f'There {s.he} saw {article(s.animal)} sitting all alone. "Today is my birthday," said the {s.animal}. '
    middle += f'"{lonely}"\n\n{s.name} {thought}. Then {s.he} said, "This {s.thing} is for you. Happy birthday!"'
    end = f"The {s.animal} was so {s.glad}! They ate some {s.food} and played with the {s.colour} {s.thing} all day. "
    end += f"{s.name} had no {s.thing} any more, but {s.he} had a new friend."
    return middle, end


def mending(rng: random.Random, s: Scene) -> tuple[str, str]:
    """The thing breaks, and is mended with patience."""
    mood = rng.choice(["sad", "upset"])
    tool = rng.choice(["some string", "a little glue", "some wood"])
    middle = f"But the {s.thing} fell down and broke. {s.name} was {mood} and began to cry. "
    middle += f'{capitalize(article(s.animal))} heard {s.him}. "Do not cry," said the {s.animal}. "I '
    middle += f'have {tool}. We can fix it."'
    end = f"They worked together, and soon the {s.colour} {s.thing} was as good as new. {s.name} was very {s.glad}. "
    end += f'{capitalize(s.he)} gave the {s.animal} some {s.food} and said, "You are a good friend."'
    return middle, end


PLOTS: list[Callable[[random.Random, Scene], tuple[str, str]]] = [
    sharing, losing, quarrel, storm, rescue, birthday, mending,
]  # fmt: skip


def story(rng: random.Random, scene: Scene) -> str:
    """A whole story of three or four short paragraphs, about 150 tokens."""
    middle, end = rng.choice(PLOTS)(rng, scene)
    return f"{opening(rng, scene)}\n\n{outing(rng, scene)} {middle}\n\n{end}{rng.choice(['', ' The end.'])}"
