"""Captions of drawn scenes, each with the facts it asserts.

Five captions a scene, from the whole to the vague. Words are drawn apart from the facts: a thing is
a "disc" or a "circle", and "B is right of A" says that A is left of B. A number of like things is
asserted as "at least so many", the number of all things exactly.
"""

import random
from dataclasses import dataclass, field

from pipeline.sources.drawn.scenes import Scene, Thing

Mention = tuple[str | None, str | None, str | None, str | None]  # shape, colour, size, texture


@dataclass
class Caption:
    """A sentence and what it says: mentions of distinct things, a relation of the first two, …"""

    text: str
    mentions: list[Mention] = field(default_factory=list)
    relation: str | None = None  # "left" or "above": what the first mention is of the second
    number: int | None = None  # of all things
    ground: str | None = None


NOUNS = {
    "circle": ("circle", "disc", "circle"), "square": ("square", "square", "box"),
    "triangle": ("triangle",), "star": ("star",), "heart": ("heart",),
    "diamond": ("diamond", "rhombus"), "ring": ("ring", "hoop"),
    "moon": ("moon", "crescent moon", "crescent"), "flower": ("flower", "blossom"),
    "house": ("house", "cottage"), "fish": ("fish",), "boat": ("boat", "sailing boat"),
    None: ("shape", "object", "thing"),
}  # fmt: skip
PLURALS = {"fish": "fish", "box": "boxes", "rhombus": "rhombuses"}
Words = dict[str, tuple[str, ...]]
COLOUR_WORDS: Words = {"red": ("red", "red", "scarlet"), "purple": ("purple", "purple", "violet")}
SIZE_WORDS: Words = {
    "small": ("small", "little", "tiny"), "medium": ("medium-sized",), "large": ("large", "big"),
}  # fmt: skip
TEXTURE_WORDS: Words = {
    "plain": ("plain",), "striped": ("striped",), "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
}  # fmt: skip
TEXTURE_TAILS = {
    "striped": ("with stripes",), "dotted": ("with dots", "with polka dots"),
    "checked": ("with checks", "in a checked pattern"),
}  # fmt: skip
WHERE = {
    "grass": ("on the grass", "on a green lawn", "in a meadow"),
    "sand": ("on the sand", "on a sandy beach", "in the desert sand"),
    "snow": ("in the snow", "on snowy ground", "in fresh snow"),
    "sea": ("in the sea", "on the water", "on the waves"),
    "night": ("in the night sky", "in a starry night", "in the dark sky at night"),
    "sky": ("in a blue sky", "among the clouds", "in the cloudy sky"),
    "bricks": ("on a brick wall", "in front of a brick wall", "against a brick wall"),
    "wood": ("on a wooden floor", "on wooden boards", "on a wooden table"),
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five")
RELATIONS = {  # how it is said of the first and the second thing, and the other way round
    "left": (
        ("to the left of", "left of", "on the left side of"),
        ("to the right of", "right of", "on the right side of"),
    ),
    "above": (("above", "over", "higher up than"), ("below", "under", "beneath")),
}  # fmt: skip


def captions(scene: Scene, rng: random.Random) -> list[Caption]:
    """Five true captions of the scene: the whole, a relation, a number, one thing, a hint."""
    return [write(scene, rng) for write in (_whole, _related, _counted, _closeup, _hint)]


def _whole(scene: Scene, rng: random.Random) -> Caption:
    kinds = _kinds(scene.things)
    kinds = rng.sample(kinds, min(len(kinds), rng.choice((2, 3, 3))))
    phrases, mentions = [], []
    for things in kinds:
        mention = _mention(rng, things, shape=1, colour=1, size=0.25, texture=0.25)
        phrases.append(_noun_phrase(rng, mention, len(things)))
        mentions += [mention] * len(things)
    listed, where = _listed(phrases), rng.choice(WHERE[scene.ground])
    be = "is" if len(kinds[0]) == 1 else "are"
    text = rng.choice((
        f"{listed} {where}", f"{where} there {be} {listed}", f"there {be} {listed} {where}",
        f"a picture of {listed} {where}", f"{where}, {listed}", f"we see {listed} {where}",
    ))  # fmt: skip
    return Caption(_sentence(text), mentions, ground=scene.ground)


def _related(scene: Scene, rng: random.Random) -> Caption:
    one, other = rng.sample(scene.things, 2)
    relation = "left" if abs(one.x - other.x) > abs(one.y - other.y) else "above"
    if not (one.left_of(other) if relation == "left" else one.above(other)):
        one, other = other, one
    chances = {"shape": 1, "colour": 0.85, "size": 0.2, "texture": 0.2}
    mentions = [_mention(rng, [thing], **chances) for thing in (one, other)]
    first, second = (_noun_phrase(rng, mention) for mention in mentions)
    forward, backward = RELATIONS[relation]
    relate = rng.choice(forward)
    if rng.random() < 0.5:
        first, second, relate = second, first, rng.choice(backward)
    if mentions[0] == mentions[1]:
        second = "another " + first.split(" ", 1)[1]
    where, ground = _maybe_where(rng, scene, 0.35)
    text = rng.choice((
        f"{first} is {relate} {second}{where}", f"{first} {relate} {second}{where}",
        f"there is {first} {relate} {second}{where}",
        f"{first} can be seen {relate} {second}{where}",
        f"a drawing of {first} {relate} {second}{where}",
    ))  # fmt: skip
    return Caption(_sentence(text), mentions, relation, ground=ground)


def _counted(scene: Scene, rng: random.Random) -> Caption:
    things = rng.choice(_kinds(scene.things))
    mention = _mention(rng, things, shape=1, colour=0.8, size=0.2, texture=0.2)
    if rng.random() < 0.3:  # by colour alone
        mention = (None, things[0].colour, None, None)
    things = [thing for thing in scene.things if _fits(thing, mention)]
    where, ground = _maybe_where(rng, scene, 0.4)
    phrase = _noun_phrase(rng, mention, len(things))
    number, noun = NUMBERS[len(scene.things)], rng.choice(("shapes", "objects", "things"))
    if len(things) == len(scene.things):
        texts: tuple[str, ...] = (
            f"only {phrase}{where}",
            f"{phrase}{where} and nothing else",
            f"there is nothing but {phrase}{where}",
        )
    else:
        colour = _word(rng, COLOUR_WORDS, mention[1]) if mention[1] else None
        part = phrase if mention[0] else f"{NUMBERS[len(things)]} of them {colour}"
        joint = rng.choice(("including ", "among them ")) if mention[0] else ""
        texts = (
            f"{number} {noun}{where}, {joint}{part}",
            f"there are {number} {noun}{where}, {joint}{part}",
            f"a group of {number} {noun}{where}, {joint}{part}",
            f"just {number} {noun}{where}, {joint}{part}",
        )
    text = rng.choice(texts)
    return Caption(_sentence(text), [mention] * len(things), None, len(scene.things), ground)


def _closeup(scene: Scene, rng: random.Random) -> Caption:
    thing = rng.choice(scene.things)
    mention = _mention(rng, [thing], shape=1, colour=1, size=0.75, texture=0.75)
    phrase = _noun_phrase(rng, mention)
    where, ground = _maybe_where(rng, scene, 0.5)
    text = rng.choice((
        f"{phrase}{where}", f"there is {phrase}{where}", f"the picture shows {phrase}{where}",
        f"a drawing of {phrase}{where}", f"{phrase} stands out{where}", f"look at {phrase}{where}",
    ))  # fmt: skip
    return Caption(_sentence(text), [mention], ground=ground)


def _hint(scene: Scene, rng: random.Random) -> Caption:
    mentions: list[Mention] = []
    for thing in rng.sample(scene.things, 2):
        by_shape = rng.random() < 0.6
        look = (thing.shape, None) if by_shape else (None, thing.colour)
        mentions.append((*look, None, None))
    where, ground = _maybe_where(rng, scene, 0.65)
    if mentions[0] == mentions[1]:
        like = [thing for thing in scene.things if _fits(thing, mentions[0])]
        mentions = mentions[:1] * len(like)
        text = _noun_phrase(rng, mentions[0], len(like)) + where
    else:
        one, other = (_hint_phrase(rng, mention) for mention in mentions)
        text = rng.choice((
            f"{one} and {other}{where}", f"{one} with {other}{where}",
            f"{one} together with {other}{where}",
        ))  # fmt: skip
    return Caption(_sentence(text), mentions, ground=ground)


# ---- phrases -----------------------------------------------------------------------------------


def _kinds(things: tuple[Thing, ...]) -> list[list[Thing]]:
    """The things grouped by shape and colour, in order of appearance."""
    kinds: dict[tuple[str, str], list[Thing]] = {}
    for thing in things:
        kinds.setdefault((thing.shape, thing.colour), []).append(thing)
    return list(kinds.values())


def _fits(thing: Thing, mention: Mention) -> bool:
    look = (thing.shape, thing.colour, thing.size, thing.texture)
    return all(said in (None, is_so) for said, is_so in zip(mention, look, strict=True))


def _mention(rng: random.Random, things: list[Thing], **chances: float) -> Mention:
    """The attributes to speak of, each with its chance, where all of the things share them."""
    said = []
    for attribute, chance in chances.items():
        values = {getattr(thing, attribute) for thing in things}
        spoken = rng.random() < chance and len(values) == 1
        said.append(values.pop() if spoken else None)
    return tuple(said)


def _noun_phrase(rng: random.Random, mention: Mention, number: int = 1) -> str:
    """'a small striped red circle', 'two big stars with dots'."""
    shape, colour, size, texture = mention
    noun, tail = rng.choice(NOUNS[shape]), None
    words = [_word(rng, SIZE_WORDS, size)] if size else []
    if texture in TEXTURE_TAILS and rng.random() < 0.4:
        tail = rng.choice(TEXTURE_TAILS[texture])
    elif texture:
        words.append(_word(rng, TEXTURE_WORDS, texture))
    words += [_word(rng, COLOUR_WORDS, colour)] if colour else []
    words.append(noun if number == 1 else PLURALS.get(noun, noun + "s"))
    article = ("an" if words[0][0] in "aeiou" else "a") if number == 1 else NUMBERS[number]
    return " ".join([article, *words, *([tail] if tail else [])])


def _hint_phrase(rng: random.Random, mention: Mention) -> str:
    if mention[0]:
        return _noun_phrase(rng, mention)
    colour = _word(rng, COLOUR_WORDS, mention[1])
    return f"something {colour}" if rng.random() < 0.6 else _noun_phrase(rng, mention)


def _word(rng: random.Random, words: Words, value: str) -> str:
    return rng.choice(words.get(value, (value,)))


def _maybe_where(rng: random.Random, scene: Scene, chance: float) -> tuple[str, str | None]:
    if rng.random() >= chance:
        return "", None
    return " " + rng.choice(WHERE[scene.ground]), scene.ground


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
