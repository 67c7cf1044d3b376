"""Prompts of drawings: things, colours, numbers and places, written as sentences and parsed from them.

Standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

COLOURS = tuple("black white grey red orange yellow green turquoise blue purple pink brown beige".split())
NUMBERS = {2: "two", 3: "three"}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("object", "colour", "count", "relation")
#: Words before a caption that name no thing.
_OPENINGS = re.compile(
    r"^(please )?(draw |paint |show )?(me )?((an? |the )?(drawing|picture|photo|photograph|image|painting) of )?"
)
_GROUND = re.compile(r" (on|against|before|in front of) (an? |the )?[\w ]*\b(background|ground|photo)$")
_RELATION = re.compile(r" (?:to the )?(left of|right of|above|below) ")
_ARTICLE = re.compile(r"^(an?|the|some|one) ")
_SIZE = re.compile(r"^(small|little|big|large) ")
# Nouns without an article; plurals have none either.
_UNCOUNTED = tuple("spaghetti rice bread water fire snow rain money hair cheese butter sushi".split())


@dataclass(frozen=True)
class Thing:
    """A noun phrase without article, such as "fox" or "hot dog", and its colour, or ""."""

    noun: str
    colour: str = ""


@dataclass(frozen=True)
class Prompt:
    """A sentence and its content: one thing ``count`` times, or a first thing ``relation`` a second.

    kind: one of ``KINDS``, or "other" for a sentence that could not be parsed, which has no things.
    """

    text: str
    kind: str
    things: tuple[Thing, ...] = ()
    count: int = 1
    relation: str = ""


def prompt_for(kind: str, things: Sequence[Thing], count: int = 1, relation: str = "") -> Prompt:
    """The prompt for this content."""
    phrases = [f"{thing.colour} {thing.noun}".strip() for thing in things]
    if kind == "count":
        text = f"{NUMBERS[count]} {plural(phrases[0])}"
    elif kind == "relation":
        text = f"{with_article(phrases[0])} {relation} {with_article(phrases[1])}"
    else:
        text = with_article(phrases[0])
    return Prompt(text, kind, tuple(things), count, relation)


def make_prompts(names: Mapping[str, Collection[str]], per_kind: int, seed: int) -> list[Prompt]:
    """At most ``per_kind`` prompts of each of ``KINDS``, chosen by ``seed``; no two are equal.

    Args:    names, the possible nouns, each with its possible colours.
    """
    rng, nouns = random.Random(seed), sorted(names)
    coloured = [(noun, colour) for noun in nouns for colour in sorted(names[noun]) if colour in COLOURS]
    some = rng.sample(nouns, min(per_kind, len(nouns)))
    prompts = [prompt_for("object", [Thing(noun)]) for noun in some]
    prompts += [prompt_for("colour", [Thing(*pair)]) for pair in rng.sample(coloured, min(per_kind, len(coloured)))]
    prompts += [
        prompt_for("count", [Thing(noun)], count=rng.choice(list(NUMBERS)))
        for noun in rng.sample(nouns, min(per_kind, len(nouns)))
        if plural(noun) != noun
    ]
    if len(nouns) > 1:
        pairs = [tuple(rng.sample(nouns, 2)) for _ in range(per_kind)]
        prompts += [
            prompt_for("relation", [Thing(a), Thing(b)], relation=rng.choice(list(OPPOSITES)))
            for a, b in dict.fromkeys(pairs)
        ]
    return list({prompt.text: prompt for prompt in prompts}.values())


def parse_prompts(lines: Iterable[str], nouns: Collection[str]) -> list[Prompt]:
    """The content of each different line in terms of ``nouns`` (singular, lower case)."""
    plurals = {plural(noun): noun for noun in nouns}
    return [_read(line, nouns, plurals) for line in dict.fromkeys(" ".join(line.split()) for line in lines) if line]


def _read(text: str, nouns: Collection[str], plurals: Mapping[str, str]) -> Prompt:
    words = _GROUND.sub("", _OPENINGS.sub("", text.lower().strip(" .!?\"'")))
    parts = _RELATION.split(words)
    if len(parts) == 3:
        things = [_thing(part, nouns) for part in (parts[0], parts[2])]
        if all(things):
            return Prompt(text, "relation", tuple(thing for thing in things if thing), relation=parts[1])
    for count, word in NUMBERS.items():
        if words.startswith(f"{word} "):
            colour, rest = _colour(words.removeprefix(f"{word} "))
            for noun, before in ((words.removeprefix(f"{word} "), ""), (rest, colour)):
                if noun in plurals:
                    return Prompt(text, "count", (Thing(plurals[noun], before),), count)
    thing = _thing(words, nouns)
    if thing is None:
        return Prompt(text, "other")
    return Prompt(text, "colour" if thing.colour else "object", (thing,))


def _thing(words: str, nouns: Collection[str]) -> Thing | None:
    """The thing that ``words`` name.  A known noun that includes a colour word, "orange juice", is that noun."""
    while True:
        if words in nouns:
            return Thing(words)
        colour, rest = _colour(words)
        if colour and rest in nouns:
            return Thing(rest, colour)
        shorter = _ARTICLE.sub("", words) if _ARTICLE.match(words) else _SIZE.sub("", words)
        if shorter == words:
            return None
        words = shorter


def _colour(words: str) -> tuple[str, str]:
    """(colour, the rest); ("", words) if the first word is no colour."""
    first, _, rest = words.partition(" ")
    first = {"gray": "grey"}.get(first, first)
    return (first, rest) if rest and first in COLOURS else ("", words)


def phrase_of(text: str) -> str:
    """The noun phrase of a caption such as "a drawing of a red apple", in lower case: "red apple"."""
    words = _OPENINGS.sub("", " ".join(text.lower().split()).strip(" .!?\"'"))
    return _ARTICLE.sub("", words)


def without_colour(name: str) -> str:
    """``name`` without a colour word at its start."""
    return _colour(name)[1]


def with_article(name: str) -> str:
    """``name`` with "a" or "an", unless it is plural or uncounted, or has one."""
    lower = name.lower()
    is_plural = lower.endswith("s") and not lower.endswith(("ss", "us"))
    if is_plural or _ARTICLE.match(lower) or lower.split()[-1] in _UNCOUNTED:
        return name
    return f"{'an' if lower[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """The plural of a noun phrase: of its last word, or of the word before "of", "with" or "in"."""
    head, joint, rest = next((p for p in map(name.partition, (" of ", " with ", " in ")) if p[1]), (name, "", ""))
    if re.search(r"[^aeiou]y$", head):
        return f"{head[:-1]}ies{joint}{rest}"
    if head.endswith("s") and not head.endswith("ss"):
        return name
    return f"{head}{'es' if re.search(r'(ss|x|z|ch|sh)$', head) else 's'}{joint}{rest}"
