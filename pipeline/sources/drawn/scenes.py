"""Drawn scenes: what is in one, and its picture.

A scene is a pure function of (seed, split, index): two to five things, each with a shape, a colour,
a size, a texture and a place, on a ground. Things often share a shape or a colour with another
thing of their scene, so that knowing which words occur is not enough to tell scenes apart.
"""

import functools
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "diamond",
    "ring", "moon", "flower", "house", "fish", "boat",
)  # fmt: skip
Colour = tuple[int, ...]  # RGB
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted", "checked")
GROUNDS = ("grass", "sand", "snow", "sea", "night", "sky", "bricks", "wood")

MOST_THINGS = 5
RADIUS = {"small": 0.1, "medium": 0.145, "large": 0.2}  # of the scene's side
APART = 0.15  # along an axis, from which a thing is left of, or above, another (sides)


@dataclass(frozen=True)
class Thing:
    """One of the things in a scene."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float  # centre, in sides from the left
    y: float  # centre, in sides from the top

    def left_of(self, other: "Thing") -> bool:
        return other.x - self.x >= APART

    def above(self, other: "Thing") -> bool:
        return other.y - self.y >= APART


@dataclass(frozen=True)
class Scene:
    """Things that do not touch, on a ground."""

    things: tuple[Thing, ...]
    ground: str


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of that index, whatever the process: a text seeds `Random` through SHA-512."""
    rng = random.Random(f"scene {seed}/{split}/{index}")
    ground = rng.choice(GROUNDS)
    number = rng.choices((2, 3, 4, 5), weights=(3, 4, 3, 2))[0]
    while True:
        looks = _looks(rng, number)
        places = _places(rng, [RADIUS[size] for _, _, size, _ in looks])
        if places:  # else they did not fit: draw others
            pairs = zip(looks, places, strict=True)
            return Scene(tuple(Thing(*look, *place) for look, place in pairs), ground)


def _looks(rng: random.Random, number: int) -> list[tuple[str, str, str, str]]:
    looks = []
    for _ in range(number):
        shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        if looks and rng.random() < 0.5:  # a near-miss of an earlier thing, or its twin
            twin = rng.choice(looks)
            kept = rng.choice(("shape", "colour", "colour", "both"))
            shape = twin[0] if kept != "colour" else shape
            colour = twin[1] if kept != "shape" else colour
        texture = rng.choices(TEXTURES, weights=(3, 2, 2, 1))[0]
        looks.append((shape, colour, rng.choice(SIZES), texture))
    return looks


def _places(rng: random.Random, radii: list[float]) -> list[tuple[float, float]] | None:
    """Centres at which circles of these radii do not touch; None if they were not found."""
    places = []
    for radius in radii:
        for _ in range(30):
            low, high = radius + 0.02, 0.98 - radius
            x, y = round(rng.uniform(low, high), 3), round(rng.uniform(low, high), 3)
            taken = zip(places, radii, strict=False)
            if all(math.dist((x, y), place) > radius + other + 0.02 for place, other in taken):
                places.append((x, y))
                break
        else:
            return None
    return places


# ---- the picture -------------------------------------------------------------------------------

FINER = 4  # drawn this many times larger, then averaged down: smooth edges
PALETTE = {
    "red": (222, 74, 74), "orange": (240, 148, 66), "yellow": (247, 212, 84),
    "green": (86, 172, 104), "blue": (76, 128, 214), "purple": (142, 96, 190),
    "pink": (240, 150, 184), "white": (246, 243, 236),
}  # fmt: skip
INK = (52, 48, 66)
SHADOW = [value // 4 for value in range(256)]  # a mask's values, made faint


def _ellipse(x=0.0, y=0.0, rx=1.0, ry=1.0, start=0, stop=360) -> list[tuple[float, float]]:
    turns = map(math.radians, range(start, stop + 1, 10))
    return [(x + rx * math.cos(turn), y + ry * math.sin(turn)) for turn in turns]


def _star(points=5, inner=0.46) -> list[tuple[float, float]]:
    corners = [(1.08 if k % 2 == 0 else inner, math.pi * (k / points - 0.5)) for k in range(10)]
    return [(r * math.cos(turn), r * math.sin(turn) + 0.06) for r, turn in corners]


def _heart() -> list[tuple[float, float]]:
    turns = [math.radians(degree) for degree in range(0, 360, 8)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


SIXTHS = [math.radians(degree) for degree in range(0, 360, 60)]
PETALS = [_ellipse(0.58 * math.cos(t), 0.58 * math.sin(t), 0.42, 0.42) for t in SIXTHS]
# Polygons in units of the radius: those filled with colour and texture, then details on top
# ("hole" shows the ground, "light" and "ink" are plain).
FORMS: dict[str, tuple[list, list[tuple[str, list]]]] = {
    "circle": ([_ellipse(rx=0.95, ry=0.95)], []),
    "square": ([[(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]], []),
    "triangle": ([[(0, -0.98), (1.0, 0.78), (-1.0, 0.78)]], []),
    "star": ([_star()], []),
    "heart": ([_heart()], []),
    "diamond": ([[(0, -1.08), (0.74, 0), (0, 1.08), (-0.74, 0)]], []),
    "ring": ([_ellipse()], [("hole", _ellipse(rx=0.48, ry=0.48))]),
    "moon": ([_ellipse(0.15, start=50, stop=310) + _ellipse(0.5, 0, 0.72, 0.78)[27:9:-1]], []),
    "flower": ([*PETALS, _ellipse(rx=0.5, ry=0.5)], [("light", _ellipse(rx=0.34, ry=0.34))]),
    "house": (
        [
            [(-0.72, -0.15), (0.72, -0.15), (0.72, 0.9), (-0.72, 0.9)],
            [(0, -1.05), (1.02, -0.1), (-1.02, -0.1)],
        ],
        [("ink", [(-0.2, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.2, 0.9)])],
    ),
    "fish": (
        [_ellipse(-0.2, 0, 0.8, 0.56), [(0.42, 0), (1.05, -0.55), (0.9, 0), (1.05, 0.55)]],
        [("ink", _ellipse(-0.62, -0.12, 0.11, 0.11))],
    ),
    "boat": (
        [
            [(-1.05, 0.32), (1.05, 0.32), (0.66, 0.9), (-0.66, 0.9)],
            [(0.02, -1.05), (0.8, 0.14), (0.02, 0.14)],
            [(-0.12, -0.75), (-0.12, 0.14), (-0.66, 0.14)],
        ],
        [],
    ),
}


def picture(scene: Scene, size: int, name: str) -> bytes:
    """The scene as JPEG bytes, size × size pixels; `name` seeds what no caption speaks of."""
    rng = random.Random(f"picture {name}")
    side = size * FINER
    paint, top, bottom = GROUND_PAINTERS[scene.ground]
    canvas = Image.composite(
        Image.new("RGB", (side, side), bottom),
        Image.new("RGB", (side, side), top),
        Image.linear_gradient("L").resize((side, side)),
    )
    paint(ImageDraw.Draw(canvas), rng, side)
    for thing in scene.things:
        _paint_thing(canvas, thing, rng)
    file = io.BytesIO()
    canvas.reduce(FINER).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def _paint_thing(canvas: Image.Image, thing: Thing, rng: random.Random) -> None:
    radius = RADIUS[thing.size] * canvas.width
    half = int(radius * 1.3)
    turn = math.radians(rng.uniform(-14, 14))

    def placed(polygon):
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        return [
            (round(half + x * cos - y * sin), round(half + x * sin + y * cos)) for x, y in polygon
        ]

    filled, details = FORMS[thing.shape]
    line = max(2, canvas.width // 85)
    body, edge = (Image.new("L", (2 * half, 2 * half)) for _ in range(2))
    holes = [polygon for tone, polygon in details if tone == "hole"]
    for corners, mask in [*((f, 255) for f in filled), *((hole, 0) for hole in holes)]:
        polygon = placed(corners)
        ImageDraw.Draw(body).polygon(polygon, fill=mask)
        ImageDraw.Draw(edge).polygon(polygon, fill=mask)
        ImageDraw.Draw(edge).line([*polygon, *polygon[:2]], fill=255, width=line, joint="curve")

    x, y = round(thing.x * canvas.width) - half, round(thing.y * canvas.width) - half
    cloth = _texture(thing, 2 * half, canvas.width)
    drop = canvas.width // 64
    canvas.paste(INK, (x + drop, y + drop), edge.point(SHADOW))  # soft shadow
    canvas.paste(INK, (x, y), edge)
    for tone, polygon in details:
        if tone != "hole":
            fill = INK if tone == "ink" else (255, 244, 214)
            ImageDraw.Draw(cloth).polygon(placed(polygon), fill=fill, outline=INK)
    canvas.paste(cloth, (x, y), body)


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def _texture(thing: Thing, side: int, canvas_side: int) -> Image.Image:
    colour = PALETTE[thing.colour]
    second = _mix(colour, (150, 150, 170) if thing.colour == "white" else (255, 255, 255), 0.62)
    cloth = Image.new("RGB", (side, side), colour)
    draw = ImageDraw.Draw(cloth)
    step = canvas_side // 14
    if thing.texture == "striped":
        for x in range(-side, side, step):
            draw.line([(x, side), (x + side, 0)], fill=second, width=step * 2 // 5)
    elif thing.texture == "dotted":
        for row, y in enumerate(range(0, side + step, step)):
            for x in range(step // 2 * (row % 2), side + step, step):
                draw.ellipse([x - step // 4, y - step // 4, x + step // 4, y + step // 4], second)
    elif thing.texture == "checked":
        cell = step * 3 // 4
        for row, y in enumerate(range(0, side, cell)):
            for x in range(cell * (row % 2), side, 2 * cell):
                draw.rectangle([x, y, x + cell - 1, y + cell - 1], fill=second)
    return cloth


def _spots(rng: random.Random, side: int, number: int):
    return [(rng.randrange(side), rng.randrange(side)) for _ in range(number)]


def _grass(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    tall = side // 22
    for x, y in _spots(rng, side, 70):
        for lean in (-tall // 2, 0, tall // 2):
            draw.line([(x, y), (x + lean, y - tall)], fill=(118, 168, 92), width=side // 110)


def _dots(draw: ImageDraw.ImageDraw, rng: random.Random, side: int, *, number: int, fill) -> None:
    for x, y in _spots(rng, side, number):
        r = rng.randrange(1, side // 90 + 2)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def _snow(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    for x, y in _spots(rng, side, 26):
        r = side // 45
        for dx, dy in ((r, 0), (r // 2, r), (-r // 2, r)):
            draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=(176, 198, 218), width=side // 128)


def _sea(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    wave = side // 8
    for row, y in enumerate(range(side // 16, side + wave, side // 9)):
        for x in range(-wave * (row % 2) // 2 - rng.randrange(wave // 3 + 1), side, wave):
            draw.arc([x, y, x + wave, y + wave // 2], 200, 340, (196, 234, 236), side // 90)


def _sky(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    for x, y in _spots(rng, side, 5):
        for dx, r in ((-side // 10, side // 16), (0, side // 11), (side // 10, side // 18)):
            draw.ellipse([x + dx - r, y - r * 2 // 3, x + dx + r, y + r * 2 // 3], (250, 252, 255))


def _bricks(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    high, wide, gap = side // 10, side // 5, side // 80
    for row, y in enumerate(range(0, side, high)):
        for x in range(-wide // 2 * (row % 2), side, wide):
            tone = _mix((196, 132, 112), (214, 156, 134), rng.random())
            draw.rectangle([x, y, x + wide - gap, y + high - gap], fill=tone)


def _wood(draw: ImageDraw.ImageDraw, rng: random.Random, side: int) -> None:
    high = side // 6
    for y in range(0, side, high):
        tone = _mix((196, 152, 110), (174, 128, 88), rng.random())
        draw.rectangle([0, y, side, y + high - side // 90], fill=tone)
        for _ in range(3):
            x, dy = rng.randrange(side), rng.randrange(2, max(3, high - 4))
            end = x + rng.randrange(side // 5, side // 2)
            grain = _mix(tone, (110, 76, 50), 0.5)
            draw.line([(x, y + dy), (end, y + dy)], fill=grain, width=side // 128)


_sand = functools.partial(_dots, number=150, fill=(212, 178, 122))
_night = functools.partial(_dots, number=55, fill=(250, 240, 196))
# What paints on the ground, which goes from one colour at the top to another at the bottom.
GROUND_PAINTERS: dict[str, tuple[Callable, Colour, Colour]] = {
    "grass": (_grass, (186, 214, 146), (150, 192, 116)),
    "sand": (_sand, (244, 226, 182), (232, 204, 150)),
    "snow": (_snow, (222, 232, 240), (246, 249, 252)),
    "sea": (_sea, (134, 206, 214), (70, 158, 186)),
    "night": (_night, (30, 32, 66), (66, 62, 112)),
    "sky": (_sky, (142, 194, 240), (206, 230, 250)),
    "bricks": (_bricks, (226, 208, 196), (226, 208, 196)),
    "wood": (_wood, (132, 94, 64), (132, 94, 64)),
}
