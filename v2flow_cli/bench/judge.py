"""Whether a picture shows what was asked for: its objects' nearest neighbours among titled pictures, and its pixels.

Pictures here are arrays (H, W, 3) uint8. Nothing in this file knows where a picture comes from.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from v2flow_cli.bench.colours import main_colour
from v2flow_cli.bench.features import FeatureSpace
from v2flow_cli.bench.objects import CANVAS_SHARE, Found, cut_out, find_objects, halves, whole
from v2flow_cli.bench.prompts import NUMBERS, OPPOSITES, Prompt, Thing, asked, plural
from v2flow_cli.bench.references import Reference

NEIGHBOURS = 5  # of which the nearest gives the answer
BATCH = 32  # pictures at a time through the network
ACROSS = ("left of", "right of")
SCENE = 256  # pixels a side of a scene that is laid out from cut-outs


@dataclass(frozen=True)
class Verdict:
    """What the judge found in one picture.

    answers: for each object looked at, the nearest references, by number. right: "noun", "noun_in_5", "colour",
    "count", "place", as far as the prompt asks for it, and "all" of it but noun_in_5. distance: of the whole
    foreground to the nearest reference, 1 - cosine.
    """

    answers: tuple[tuple[int, ...], ...]
    colour: str
    count: int
    right: dict[str, bool]
    distance: float


class Judge:
    """Neighbours among ``references`` in ``space``; each picture is cut out and laid on white first."""

    def __init__(
        self, space: FeatureSpace, references: Sequence[Reference], tick: Callable[[int], None] = lambda n: None
    ) -> None:
        """Raises:  DataError for a picture that cannot be decoded."""
        self.space, self.references = space, list(references)
        self.vectors = self.embed((whole_object(r.pixels()) for r in self.references), tick)

    def embed(self, cuts: Iterator[np.ndarray], tick: Callable[[int], None] = lambda n: None) -> Tensor:
        """Unit vectors (N, D) of cut-outs."""
        parts = []
        while batch := list(itertools.islice(cuts, BATCH)):
            parts.append(self.space(torch.from_numpy(np.stack(batch))))
            tick(len(batch))
        return torch.cat(parts) if parts else torch.empty(0, 1)

    def distances(self, vectors: Tensor) -> Tensor:
        """1 - cosine of each of ``vectors`` (N, D) to its nearest reference, (N,)."""
        return 1 - (vectors @ self.vectors.T).max(1).values

    def verdicts(
        self, pairs: Sequence[tuple[Prompt, np.ndarray]], tick: Callable[[int], None] = lambda n: None
    ) -> list[Verdict]:
        """A verdict for each prompt and its picture."""
        given = []
        for prompt, picture in pairs:
            objects = find_objects(picture)
            given.append((whole(picture), objects, _looked_at(prompt, picture, objects)))
        vectors = self.embed(
            cut_out(picture, one)
            for (_, picture), (everything, _, looked_at) in zip(pairs, given)
            for one in (everything, *looked_at)
        )
        verdicts, start = [], 0
        for (prompt, picture), (everything, objects, looked_at) in zip(pairs, given):
            rows = vectors[start : start + 1 + len(looked_at)]
            start += len(rows)
            answers = (rows @ self.vectors.T).topk(min(NEIGHBOURS, len(self.references))).indices.tolist()
            distance = float(self.distances(rows[:1]))
            answers = answers[1:] or answers  # of several objects the foreground as a whole is none
            found = looked_at or [everything]
            verdicts.append(self._verdict(prompt, picture, found, len(objects), answers, distance))
            tick(1)
        return verdicts

    def _verdict(
        self,
        prompt: Prompt,
        picture: np.ndarray,
        found: Sequence[Found],
        count: int,
        answers: Sequence[Sequence[int]],
        distance: float,
    ) -> Verdict:
        top, left, bottom, right = found[0].box
        colour = main_colour(picture[top:bottom, left:right][found[0].mask])
        verdict: dict[str, bool] = {}
        if prompt.kind == "relation":
            # Which object is which is told by the names of both, or of one; with neither, no place is right.
            orders = ((0, 1), (1, 0)) if len(found) > 1 else ()
            named = {order: self._named(prompt, answers, order, 1) for order in orders}
            best = max(named.values(), default=0)
            verdict["noun"] = best == 2
            verdict["noun_in_5"] = any(self._named(prompt, answers, order, NEIGHBOURS) == 2 for order in orders)
            likely = [order for order in orders if best and named[order] == best]
            verdict["place"] = any(_lies(prompt.relation, found[a], found[b]) for a, b in likely)
        elif prompt.things:
            verdict["noun"] = self._named(prompt, answers, (0,), 1) == 1
            verdict["noun_in_5"] = self._named(prompt, answers, (0,), NEIGHBOURS) == 1
        if prompt.kind != "relation" and prompt.things and prompt.things[0].colour:
            verdict["colour"] = colour == prompt.things[0].colour
        if prompt.kind == "count":
            verdict["count"] = count == prompt.count
        if verdict:
            verdict["all"] = all(value for key, value in verdict.items() if key != "noun_in_5")
        return Verdict(tuple(map(tuple, answers)), colour, count, verdict, distance)

    def _named(self, prompt: Prompt, answers: Sequence[Sequence[int]], order: Sequence[int], among: int) -> int:
        """How many things of the prompt are a name of one of the ``among`` nearest of the object at their place."""
        return sum(
            any(thing.noun in self.references[i].names for i in answers[place][:among])
            for thing, place in zip(prompt.things, order)
        )


def _looked_at(prompt: Prompt, picture: np.ndarray, objects: Sequence[Found]) -> list[Found]:
    """The objects that are named one by one; none where the foreground as a whole is."""
    if prompt.kind == "count":
        return list(objects[:1])
    if prompt.kind == "relation":
        return list(objects[:2]) if len(objects) > 1 else halves(picture, prompt.relation in ACROSS)
    return []


def _lies(relation: str, a: Found, b: Found) -> bool:
    (ax, ay), (bx, by) = a.centre, b.centre
    across = abs(ax - bx) >= abs(ay - by)
    if relation in ACROSS:
        return across and (ax < bx) == (relation == "left of")
    return not across and (ay < by) == (relation == "above")


def whole_object(picture: np.ndarray) -> np.ndarray:
    """The foreground of a picture, cut out."""
    return cut_out(picture, whole(picture))


def real_pictures(
    held_out: Sequence[Reference], nouns: Sequence[str], per_kind: int, seed: int
) -> list[tuple[Prompt, np.ndarray]]:
    """Prompts and real pictures that show just that, from ``held_out``: how often the judge is right about them.

    Of each of ``prompts.KINDS`` at most ``per_kind``; counts and relations are laid out on white from cut-outs.
    """
    rng, known = random.Random(seed), [r for r in held_out if r.noun in set(nouns)]
    rng.shuffle(known)
    pairs = [(asked("object", [Thing(r.noun)]), r.pixels()) for r in known[:per_kind]]
    coloured = [r for r in known if r.colour][:per_kind]
    pairs += [(asked("colour", [Thing(r.noun, r.colour)]), r.pixels()) for r in coloured]
    for reference in [r for r in known if plural(r.noun) != r.noun][:per_kind]:
        count = rng.choice(list(NUMBERS))
        cut, side = whole_object(reference.pixels()), 0.9 / count
        places = [((k + 0.5) / count, 0.5) for k in range(count)]
        pairs.append((asked("count", [Thing(reference.noun)], count), _laid_out([cut] * count, places, side)))
    for _ in range(per_kind if len({r.noun for r in known}) > 1 else 0):
        first, second = rng.sample(known, 2)
        if first.noun == second.noun:
            continue
        relation = rng.choice(list(OPPOSITES))
        near, far = (0.26, 0.74) if relation in ("left of", "above") else (0.74, 0.26)
        places = [(at, 0.5) if relation in ACROSS else (0.5, at) for at in (near, far)]
        cuts = [whole_object(r.pixels()) for r in (first, second)]
        prompt = asked("relation", [Thing(first.noun), Thing(second.noun)], relation=relation)
        pairs.append((prompt, _laid_out(cuts, places, 0.46)))
    return pairs


def _laid_out(cuts: Sequence[np.ndarray], places: Sequence[tuple[float, float]], side: float) -> np.ndarray:
    """Cut-outs on white with their middles at ``places``, their longest sides ``side`` of the scene's."""
    scene = Image.new("RGB", (SCENE, SCENE), "white")
    pixels = round(side * SCENE / CANVAS_SHARE)
    for cut, (x, y) in zip(cuts, places):
        image = Image.fromarray(cut).resize((pixels, pixels), Image.Resampling.LANCZOS)
        left, top = round(x * SCENE - pixels / 2), round(y * SCENE - pixels / 2)
        mask = Image.fromarray(np.where((np.asarray(image) < 250).any(2), 255, 0).astype(np.uint8))
        scene.paste(image, (left, top), mask)
    return np.asarray(scene)
