"""Whether a picture shows the things of its prompt: by nearest neighbours among titled pictures, and by its pixels.

Pictures here are arrays (H, W, 3) uint8.
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
from v2flow_cli.bench.objects import CANVAS_SHARE, PictureObject, cut_out, find_objects, halves, whole
from v2flow_cli.bench.prompts import NUMBERS, OPPOSITES, Prompt, Thing, plural, prompt_for
from v2flow_cli.bench.references import Reference

NEIGHBOURS = 5  # references per object; the nearest is the answer
BATCH = 32  # pictures at a time through the network
ACROSS = ("left of", "right of")
SCENE = 256  # pixels a side of a scene that is composed of cut-outs


@dataclass(frozen=True)
class Verdict:
    """The judge's result for one picture.

    answers: for each object, the indices of the nearest references. right: "noun", "noun_in_5", "colour", "count",
    "place", those that the prompt names, and "all" of them without noun_in_5. distance: of the whole foreground to the
    nearest reference, 1 - cosine.
    """

    answers: tuple[tuple[int, ...], ...]
    colour: str
    count: int
    right: dict[str, bool]
    distance: float


class Judge:
    """Neighbours among ``references`` in ``space``, of the foreground of each picture on white."""

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
        regions = []
        for prompt, picture in pairs:
            objects = find_objects(picture)
            regions.append((whole(picture), objects, _single_objects(prompt, picture, objects)))
        vectors = self.embed(
            cut_out(picture, region)
            for (_, picture), (everything, _, singles) in zip(pairs, regions)
            for region in (everything, *singles)
        )
        verdicts, start = [], 0
        for (prompt, picture), (everything, objects, singles) in zip(pairs, regions):
            rows = vectors[start : start + 1 + len(singles)]
            start += len(rows)
            answers = (rows @ self.vectors.T).topk(min(NEIGHBOURS, len(self.references))).indices.tolist()
            distance = float(self.distances(rows[:1]))
            answers = answers[1:] or answers  # the whole foreground is no answer if there are single objects
            verdict = self._verdict(prompt, picture, singles or [everything], len(objects), answers, distance)
            verdicts.append(verdict)
            tick(1)
        return verdicts

    def _verdict(
        self,
        prompt: Prompt,
        picture: np.ndarray,
        objects: Sequence[PictureObject],
        count: int,
        answers: Sequence[Sequence[int]],
        distance: float,
    ) -> Verdict:
        top, left, bottom, right = objects[0].box
        colour = main_colour(picture[top:bottom, left:right][objects[0].mask])
        verdict: dict[str, bool] = {}
        if prompt.kind == "relation":
            # The names of both objects, or of one, decide which is which; without any the place is wrong.
            orders = ((0, 1), (1, 0)) if len(objects) > 1 else ()
            matches = {order: self._matches(prompt, answers, order, 1) for order in orders}
            best = max(matches.values(), default=0)
            verdict["noun"] = best == 2
            verdict["noun_in_5"] = any(self._matches(prompt, answers, order, NEIGHBOURS) == 2 for order in orders)
            likely = [order for order in orders if best and matches[order] == best]
            verdict["place"] = any(_has_relation(prompt.relation, objects[a], objects[b]) for a, b in likely)
        elif prompt.things:
            verdict["noun"] = self._matches(prompt, answers, (0,), 1) == 1
            verdict["noun_in_5"] = self._matches(prompt, answers, (0,), NEIGHBOURS) == 1
        if prompt.kind != "relation" and prompt.things and prompt.things[0].colour:
            verdict["colour"] = colour == prompt.things[0].colour
        if prompt.kind == "count":
            verdict["count"] = count == prompt.count
        if verdict:
            verdict["all"] = all(value for key, value in verdict.items() if key != "noun_in_5")
        return Verdict(tuple(map(tuple, answers)), colour, count, verdict, distance)

    def _matches(self, prompt: Prompt, answers: Sequence[Sequence[int]], order: Sequence[int], among: int) -> int:
        """How many things of the prompt are a name of one of the ``among`` nearest references of their object."""
        return sum(
            any(thing.noun in self.references[i].names for i in answers[k][:among])
            for thing, k in zip(prompt.things, order)
        )


def _single_objects(prompt: Prompt, picture: np.ndarray, objects: Sequence[PictureObject]) -> list[PictureObject]:
    """The objects to name one by one; empty if the foreground is named as a whole."""
    if prompt.kind == "count":
        return list(objects[:1])
    if prompt.kind == "relation":
        return list(objects[:2]) if len(objects) > 1 else halves(picture, prompt.relation in ACROSS)
    return []


def _has_relation(relation: str, a: PictureObject, b: PictureObject) -> bool:
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
    """Prompts and real pictures that show them, from ``held_out``, to measure the judge.

    There are at most ``per_kind`` of each of ``prompts.KINDS``; counts and relations are composed of cut-outs on white.
    """
    rng, known = random.Random(seed), [r for r in held_out if r.noun in set(nouns)]
    rng.shuffle(known)
    pairs = [(prompt_for("object", [Thing(r.noun)]), r.pixels()) for r in known[:per_kind]]
    coloured = [r for r in known if r.colour][:per_kind]
    pairs += [(prompt_for("colour", [Thing(r.noun, r.colour)]), r.pixels()) for r in coloured]
    for reference in [r for r in known if plural(r.noun) != r.noun][:per_kind]:
        count = rng.choice(list(NUMBERS))
        cut, side = whole_object(reference.pixels()), 0.9 / count
        centres = [((k + 0.5) / count, 0.5) for k in range(count)]
        pairs.append((prompt_for("count", [Thing(reference.noun)], count), _compose([cut] * count, centres, side)))
    for _ in range(per_kind if len({r.noun for r in known}) > 1 else 0):
        first, second = rng.sample(known, 2)
        if first.noun == second.noun:
            continue
        relation = rng.choice(list(OPPOSITES))
        near, far = (0.26, 0.74) if relation in ("left of", "above") else (0.74, 0.26)
        centres = [(at, 0.5) if relation in ACROSS else (0.5, at) for at in (near, far)]
        cuts = [whole_object(r.pixels()) for r in (first, second)]
        prompt = prompt_for("relation", [Thing(first.noun), Thing(second.noun)], relation=relation)
        pairs.append((prompt, _compose(cuts, centres, 0.46)))
    return pairs


def _compose(cuts: Sequence[np.ndarray], centres: Sequence[tuple[float, float]], side: float) -> np.ndarray:
    """Cut-outs on white at ``centres``, with longest sides of ``side`` times the scene's."""
    scene = Image.new("RGB", (SCENE, SCENE), "white")
    pixels = round(side * SCENE / CANVAS_SHARE)
    for cut, (x, y) in zip(cuts, centres):
        image = Image.fromarray(cut).resize((pixels, pixels), Image.Resampling.LANCZOS)
        left, top = round(x * SCENE - pixels / 2), round(y * SCENE - pixels / 2)
        mask = Image.fromarray(np.where((np.asarray(image) < 250).any(2), 255, 0).astype(np.uint8))
        scene.paste(image, (left, top), mask)
    return np.asarray(scene)
