"""Scenes of cut-out drawings with captions, as WebDataset tars: what the embedded model learns to draw from.

    python recipes/default/scenes.py --drawings ../shared/data/drawings/drawings-000.tar \
        --photos ../shared/data/photos --out runs/default/scenes --count 30000

Each drawing is an RGBA picture with a title (`docs/data/drawings.md` says where they come from). A scene shows one to
three of them on a plain, graded or photographic ground. The same arguments give the same bytes: scene ``i`` depends on
the seed, ``i`` and the drawings alone, so a longer set begins with the shorter one.

``--layout centred`` writes every drawing once, centred at one size on white; the language model reads these first.
``--layout colours`` writes every drawing in some colours that it does not have, also centred, so that the model learns
colour words. ``--held-out`` writes, in the same layout, the drawings that the other layouts leave out: one style of
some titles.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import itertools
import json
import random
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from v2flow_cli.cli.console import log, result
from v2flow_cli.cli.entry import run_script
from v2flow_cli.errors import DataError, foreign_errors
from v2flow_cli.runtime.publishing import TARS, publishing

SIZE = 256  # pixels, side of a scene
CENTRED_SHARE = 0.8  # of the side, that the longest side of a centred drawing covers
SHARD_IMAGES = 4000
HELD_OUT_TITLES = 0.25  # share of the titles with at least three drawings that lose one of them to judging

#: Hue in degrees, saturation and value of the colours that a drawing can be given, and RGB of a plain ground.
COLOURS = {
    "red": (2, 0.85, 0.85),
    "orange": (28, 0.9, 0.95),
    "yellow": (50, 0.85, 0.97),
    "green": (125, 0.65, 0.65),
    "turquoise": (178, 0.7, 0.8),
    "blue": (215, 0.8, 0.85),
    "purple": (278, 0.6, 0.75),
    "pink": (335, 0.45, 0.97),
    "brown": (22, 0.65, 0.5),
    "grey": (0, 0.0, 0.55),
    "black": (0, 0.0, 0.12),
    "white": (0, 0.0, 1.0),
}
#: What ``--common`` takes: categories of things, and how many drawings a title needs; and further titles.
COMMON_CATEGORIES = frozenset(
    (
        "activities",
        "animals",
        "animals and nature",
        "buildings",
        "clothing",
        "food",
        "food and drink",
        "nature and weather",
        "objects",
        "plants",
        "shapes",
        "space and geography",
        "travel and places",
        "vehicles",
    )
)
COMMON_STYLES = 3
ALSO_COMMON = frozenset(
    (
        "alien",
        "baby angel",
        "baby",
        "barn",
        "black crow",
        "blue igloo",
        "blue plate",
        "bone",
        "bowl of steaming soup",
        "boy",
        "brain",
        "clown face",
        "desert island with a palm tree",
        "ear",
        "eye",
        "fairy",
        "foot",
        "fried egg in a pan",
        "ghost",
        "girl",
        "gold necklace",
        "golf hole with a flag",
        "green apple",
        "grey pigeon",
        "hand",
        "harp",
        "king",
        "leg",
        "lighthouse",
        "lime",
        "love letter",
        "man",
        "mouth",
        "mug",
        "nose",
        "old man",
        "old woman",
        "orange hot air balloon",
        "orange pumpkin",
        "princess",
        "queen",
        "red desk lamp",
        "red drill",
        "red heart",
        "robot",
        "skull",
        "smiling face",
        "tooth",
        "vampire",
        "wizard",
        "woman",
        "wooden table",
        "yellow kettle",
        "zombie",
    )
)
#: Ways to ask for what a caption names, with its article.
PHRASES = ("{}", "a drawing of {}", "a picture of {}", "draw {}")
#: Other names of what a title shows, beside the noun of "COLOUR NOUN" and of "ANIMAL face".
ALIASES: dict[str, list[str]] = json.loads(Path(__file__).with_name("drawing_aliases.json").read_text("utf-8"))
NUMBERS = {2: "two", 3: "three"}
COLOURS_OF_A_DRAWING = 6  # of its ``--layout colours``, chosen by its key
LEAST_PAINTED = 0.2  # of a drawing's area, that takes another hue, or it is not written in other colours
#: Least and greatest value of what is painted in a colour without a hue.
TONES = {"black": (0.04, 0.3), "grey": (0.35, 0.7)}
#: Words before which a title takes no article.
UNCOUNTED = (
    "spaghetti",
    "rice",
    "bread",
    "water",
    "fire",
    "snow",
    "rain",
    "money",
    "hair",
    "cheese",
    "butter",
    "sushi",
)
NO_ARTICLE = ("the ", "a ", "an ", "two ", "three ", "four ", "five ")


@dataclass(frozen=True)
class Drawing:
    """One cut-out: its key, the bytes of an RGBA picture, its title, the title with its colour, and its colours."""

    key: str
    content: bytes
    title: str
    colour_title: str | None
    colours: tuple[str, ...]
    category: str
    kind: str

    def names(self) -> list[str]:
        """What one may call it: its title first; the noun alone; the title with its colour; other names."""
        names = [self.title, _without_colour(self.title)]
        if self.category.startswith("animals") and self.title.endswith(" face"):
            names.append(self.title.removesuffix(" face"))
        if self.colour_title:
            names.append(self.colour_title)
        return list(dict.fromkeys([*names, *ALIASES.get(self.title, ())]))

    def open(self) -> Image.Image:
        """RGBA, cropped to what is not transparent."""
        image = Image.open(io.BytesIO(self.content)).convert("RGBA")
        box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
        return image.crop(box) if box else image


def read_drawings(path: Path) -> list[Drawing]:
    """The drawings of a tar of ``KEY.webp`` and ``KEY.json``, by key."""
    pictures: dict[str, bytes] = {}
    facts: dict[str, dict] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                continue
            key, _, suffix = member.name.partition(".")
            if suffix == "json":
                facts[key] = json.loads(file.read())
            else:
                pictures[key] = file.read()
    return [
        Drawing(
            key,
            pictures[key],
            fact["title"],
            fact.get("colour_title"),
            tuple(fact["colours"]),
            fact["category"],
            fact["kind"],
        )
        for key, fact in sorted(facts.items())
        if key in pictures
    ]


def split_held_out(drawings: list[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """(to learn from, to judge by): one drawing of a quarter of the titles that have three or more, chosen by hash."""
    of_title: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        of_title[drawing.title].append(drawing)
    held = {
        min(group, key=lambda d: _hash(d.key)).key
        for title, group in of_title.items()
        if len(group) >= 3 and _hash(title) < HELD_OUT_TITLES * 2**64
    }
    return [d for d in drawings if d.key not in held], [d for d in drawings if d.key in held]


def first_of_titles(drawings: list[Drawing], count: int) -> list[Drawing]:
    """At most ``count`` drawings of a title, emoji before clip art: few hands draw a thing alike."""
    seen: Counter[str] = Counter()
    chosen = set()
    for drawing in sorted(drawings, key=lambda d: (d.kind != "emoji", d.key)):
        seen[drawing.title] += 1
        if seen[drawing.title] <= count:
            chosen.add(drawing.key)
    return [drawing for drawing in drawings if drawing.key in chosen]


def common_things(drawings: list[Drawing]) -> list[Drawing]:
    """The drawings of things that many hands have drawn: animals, food, vehicles, buildings, tools, toys."""
    count = Counter(drawing.title for drawing in drawings)
    return [
        d
        for d in drawings
        if d.title in ALSO_COMMON
        or (d.category in COMMON_CATEGORIES and count[d.title] >= COMMON_STYLES and len(d.title.split()) <= 4)
    ]


def own_names(drawings: list[Drawing]) -> dict[str, list[str]]:
    """Names of each drawing, by key: of several drawings that a name fits, one title alone has it.

    An LLM that learns several things under one name draws mixtures of them. The title itself comes first, then the
    titles in the order of ``ALIASES``, then the nouns of "COLOUR NOUN".
    """
    order = {title: place for place, title in enumerate(ALIASES)}

    def rank(name: str, drawing: Drawing) -> tuple[bool, bool, int, str]:
        named = name in ALIASES.get(drawing.title, ())
        return name != drawing.title, not named, order.get(drawing.title, 0) if named else 0, drawing.title

    owner: dict[str, Drawing] = {}
    for drawing in drawings:
        for name in drawing.names():
            if name not in owner or rank(name, drawing) < rank(name, owner[name]):
                owner[name] = drawing
    return {d.key: [name for name in d.names() if owner[name].title == d.title] for d in drawings}


def centred(drawing: Drawing, names: list[str]) -> tuple[Image.Image, list[str]]:
    """The drawing in the middle of a white ground, and captions with ``names``."""
    return _in_the_middle(drawing.open(), names)


def in_colours(drawing: Drawing, names: list[str]) -> list[tuple[str, Image.Image, list[str]]]:
    """(colour, picture, captions) of the drawing in colours that it does not have, centred; none where it is grey."""
    image, nouns = drawing.open(), list(dict.fromkeys(map(_without_colour, names)))
    alpha = np.asarray(image.getchannel("A"), np.float32) / 255
    if (_hued(image)[..., 0] * alpha).sum() < LEAST_PAINTED * alpha.sum():
        return []
    others = [c for c in COLOURS if c not in (*drawing.colours, "white")]  # white is invisible on the white ground
    others.sort(key=lambda colour: _hash(f"{drawing.key}/{colour}"))
    return [
        (colour, *_in_the_middle(_recolour(image, colour), [f"{colour} {noun}" for noun in nouns]))
        for colour in others[:COLOURS_OF_A_DRAWING]
    ]


def _in_the_middle(image: Image.Image, names: list[str]) -> tuple[Image.Image, list[str]]:
    scene = Image.new("RGB", (SIZE, SIZE), "white")
    image = _fit(image, round(CENTRED_SHARE * SIZE))
    scene.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2), image)
    return scene, [phrase.format(with_article(name)) for name in names for phrase in PHRASES] + names


def draw_scene(index: int, seed: int, drawings: list[Drawing], photos: list[bytes]) -> tuple[Image.Image, list[str]]:
    """Scene ``index``: one to three drawings on a ground, and captions of it."""
    rng = random.Random(f"{seed}/{index}")
    ground, ground_name = _ground(rng, photos)
    kind = rng.choices(("one", "count", "relation"), (0.7, 0.12, 0.18))[0]
    if kind == "one":
        image, names = _coloured(rng.choice(drawings), rng)
        size = rng.uniform(0.55, 0.92) * SIZE
        _paste(ground, _fit(image, round(size)), 0.5, 0.5, rng, jitter=1.0)
        subjects = [with_article(name) for name in names]
        if not 0.62 * SIZE < size < 0.85 * SIZE:
            subjects += [with_article(f"{'small' if size <= 0.62 * SIZE else 'big'} {name}") for name in names[:1]]
    elif kind == "count":
        number = rng.choice((2, 2, 3))
        image, names = _coloured(rng.choice(drawings), rng)
        image = _fit(image, round(SIZE * 0.9 / number))
        for k in range(number):
            _paste(ground, image, (k + 0.5) / number, rng.uniform(0.42, 0.58), rng, jitter=0.0)
        subjects = [f"{NUMBERS[number]} {plural(name)}" for name in names]
    else:
        relation = rng.choice(("left of", "right of", "above", "below"))
        (first, first_names), (second, second_names) = (_coloured(d, rng) for d in rng.sample(drawings, 2))
        across = relation in ("left of", "right of")
        near, far = (0.26, 0.74) if relation in ("left of", "above") else (0.74, 0.26)
        for image, place in ((first, near), (second, far)):
            image = _fit(image, round(SIZE * 0.46))
            _paste(ground, image, *((place, 0.5) if across else (0.5, place)), rng, jitter=0.15)
        pairs = zip(first_names, second_names)
        subjects = [f"{with_article(a)} {relation} {with_article(b)}" for a, b in pairs]
    if ground_name:
        return ground, [text for subject in subjects for text in (subject, f"{subject} on {ground_name}")]
    return ground, [phrase.format(subject) for subject in subjects for phrase in PHRASES]


def with_article(title: str) -> str:
    """``title`` with "a" or "an", unless it is plural or has one."""
    lower = title.lower()
    plural_noun = lower.endswith("s") and not lower.endswith(("ss", "us"))
    if lower.startswith(NO_ARTICLE) or plural_noun or lower.split()[-1] in UNCOUNTED:
        return title
    return f"{'an' if lower[0] in 'aeiou' else 'a'} {title}"


def plural(title: str) -> str:
    """The plural of a noun phrase: of its last word, or of the word before "of", "with" or "in"."""
    head, joint, rest = next((p for p in map(title.partition, (" of ", " with ", " in ")) if p[1]), (title, "", ""))
    return _plural_noun(head) + joint + rest


def _plural_noun(title: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", title):
        return f"{title}es" if not title.endswith("s") else title
    if re.search(r"[^aeiou]y$", title):
        return f"{title[:-1]}ies"
    return f"{title}s"


def _coloured(drawing: Drawing, rng: random.Random) -> tuple[Image.Image, list[str]]:
    """The drawing with its names, or in another colour, which its names then have."""
    image = drawing.open()
    if rng.random() > 0.25:
        return image, drawing.names()
    colour = rng.choice([c for c in COLOURS if c not in ("white", "black", "grey")])
    nouns = dict.fromkeys(_without_colour(name) for name in drawing.names())
    return _recolour(image, colour), [f"{colour} {noun}" for noun in nouns]


def _without_colour(name: str) -> str:
    first, _, rest = name.partition(" ")
    return rest if rest and first in COLOURS else name


def _hued(image: Image.Image) -> np.ndarray:
    """How much of a hue each pixel has, (h, w, 1) from 0 to 1; greys, outlines and whites have none."""
    rgb = np.asarray(image)[..., :3].astype(np.float32) / 255
    light = rgb.max(-1, keepdims=True)
    chroma = np.where(light > 0, (light - rgb.min(-1, keepdims=True)) / np.maximum(light, 1e-6), 0)
    return np.clip(chroma * 3, 0, 1)


def _recolour(image: Image.Image, colour: str) -> Image.Image:
    """Hue of ``colour`` for every pixel that has one, and part of its saturation; light and shade stay."""
    hue, saturation, value = COLOURS[colour]
    pixels = np.asarray(image).astype(np.float32) / 255
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    light = rgb.max(-1)
    weight = _hued(image)
    target = np.asarray(colorsys.hsv_to_rgb(hue / 360, saturation, 1.0), np.float32)
    bright = (0.35 + 0.65 * light) * value / max(float((light * alpha[..., 0]).max()), 0.3)
    if colour in TONES:
        least, most = TONES[colour]
        bright = least + (most - least) * light
    painted = np.clip(bright[..., None] * target, 0, 1)
    result = np.concatenate([weight * painted + (1 - weight) * rgb, alpha], -1)
    return Image.fromarray((result * 255).round().astype(np.uint8), "RGBA")


def _ground(rng: random.Random, photos: list[bytes]) -> tuple[Image.Image, str | None]:
    """A ground of SIZE x SIZE, and what captions call it: None for white."""
    kind = rng.choices(("white", "plain", "graded", "photo"), (0.3, 0.4, 0.18, 0.12 if photos else 0.0))[0]
    if kind == "white":
        return Image.new("RGB", (SIZE, SIZE), "white"), None
    if kind == "photo":
        with Image.open(io.BytesIO(rng.choice(photos))) as photo:
            image = photo.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(6, 14))), "a blurred photo"
    name = rng.choice(list(COLOURS))
    tone, title = _tone(name, rng), with_article(f"{name} background")
    if kind == "plain":
        return Image.new("RGB", (SIZE, SIZE), tone), title
    other = _tone(name, rng, lighter=0.55)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    ends = np.asarray([tone, other] if rng.random() < 0.5 else [other, tone], np.float32)
    rows = (1 - ramp) * ends[0] + ramp * ends[1]
    pixels = np.broadcast_to(rows, (SIZE, SIZE, 3)).round().astype(np.uint8)
    return Image.fromarray(pixels if rng.random() < 0.7 else pixels.transpose(1, 0, 2).copy()), title


def _tone(name: str, rng: random.Random, lighter: float = 0.0) -> tuple[int, int, int]:
    hue, saturation, value = COLOURS[name]
    saturation *= rng.uniform(0.6, 1.0) * (1 - lighter)
    value = min(1.0, value * rng.uniform(0.9, 1.1)) * (1 - lighter) + lighter
    red, green, blue = colorsys.hsv_to_rgb((hue + rng.uniform(-6, 6)) % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """``image`` with its longest side at ``side`` pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _paste(ground: Image.Image, image: Image.Image, x: float, y: float, rng: random.Random, jitter: float) -> None:
    """Paste ``image`` with its middle at shares (x, y) of the ground, moved by ``jitter`` of the room left."""
    left, top = x * SIZE - image.width / 2, y * SIZE - image.height / 2
    room_x, room_y = (SIZE - image.width) / 2 * jitter, (SIZE - image.height) / 2 * jitter
    left += rng.uniform(-room_x, room_x)
    top += rng.uniform(-room_y, room_y)
    ground.paste(image, (round(left), round(top)), image)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drawings", type=Path, required=True, help="tar of KEY.webp and KEY.json")
    parser.add_argument("--photos", type=Path, help="folder of photos, or of tars, whose blurred pictures are grounds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layout", choices=("scenes", "centred", "colours"), default="scenes")
    parser.add_argument("--per-title", type=int, help="centred, colours: at most so many drawings of a title")
    parser.add_argument(
        "--common",
        action="store_true",
        help="centred, colours: the commonest titles alone, and each name for one title",
    )
    parser.add_argument("--held-out", action="store_true", help="the drawings kept for judging, centred")
    parser.add_argument("--count", type=int, default=30_000, help="scenes to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with foreign_errors(f"{options.drawings}: not a tar of drawings", kind=DataError):
        drawings = read_drawings(options.drawings)
    learn, judge = split_held_out(common_things(drawings) if options.common else drawings)
    chosen = judge if options.held_out else first_of_titles(learn, options.per_title or len(learn))
    names = own_names(chosen) if options.common else {drawing.key: drawing.names() for drawing in chosen}
    if options.layout == "colours":
        pictures = ((f"{d.key}-{c}", image, texts) for d in chosen for c, image, texts in in_colours(d, names[d.key]))
    elif options.layout == "centred" or options.held_out:
        pictures = ((d.key, *centred(d, names[d.key])) for d in chosen)
    else:
        photos = [] if options.photos is None else _grounds(options.photos)
        scenes = (draw_scene(index, options.seed, learn, photos) for index in range(options.count))
        pictures = ((f"scene-{index:06d}", *scene) for index, scene in enumerate(scenes))
    total = 0
    with publishing(options.out, TARS, r"scenes-\d{3}\.tar") as folder:
        for number in itertools.count():
            path, written = folder / f"scenes-{number:03d}.tar", 0
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for key, image, captions in itertools.islice(pictures, SHARD_IMAGES):
                    content = io.BytesIO()
                    image.save(content, "WEBP", quality=90, method=2)
                    _add(tar, f"{key}.webp", content.getvalue())
                    _add(tar, f"{key}.txt", "\n".join(captions).encode())
                    written += 1
            if not written:
                path.unlink()
                break
            log(f"{options.out / path.name}: {written} pictures")
            total += written
    result(f"{options.out}: {total} pictures")


def _grounds(photos: Path, count: int = 400) -> list[bytes]:
    """Small copies of the first ``count`` photos, as JPEG; photos may lie in tars."""
    contents: list[bytes] = [p.read_bytes() for p in sorted(photos.glob("*.jpg"))[:count]]
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if len(contents) < count and member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    contents.append(file.read())
    grounds = []
    for content in contents:
        file = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").resize((128, 128)).save(file, "JPEG")
        grounds.append(file.getvalue())
    return grounds


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_script(main)
