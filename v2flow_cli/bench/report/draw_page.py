"""The sheet of ``bench draw``: every prompt with its picture, what the judge recognized in it, and the figures.

One self-contained page, like that of ``page.py``; markup and style are in ``draw.html``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from v2flow_cli.bench.draw import PARTS, Copies, KindFigures, Share
from v2flow_cli.bench.judge import Verdict
from v2flow_cli.bench.prompts import Prompt
from v2flow_cli.bench.references import Reference
from v2flow_cli.bench.report.templates import fill

SIDE, SMALL_SIDE = 192, 68  # pixels of a picture and of its neighbour on the sheet
TITLES = {
    "object": "One object",
    "colour": "An object with a colour",
    "count": "Several objects of one kind",
    "relation": "Two objects and their positions",
    "other": "Not judged: no object of these prompts is a title of the references",
}
HEADS = {
    "all": "all right",
    "noun": "object",
    "noun_in_5": "object among the nearest 5",
    "colour": "colour",
    "count": "number",
    "place": "position",
}


@dataclass(frozen=True)
class DrawSheet:
    """The content of the sheet: pictures (H, W, 3) uint8 with their prompts and verdicts, and the figures of all."""

    pictures: Sequence[tuple[Prompt, np.ndarray, Verdict]]
    figures: Sequence[KindFigures]
    copies: Copies | None
    references: Sequence[Reference]
    facts: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class Card:
    """A picture of the sheet.  answer: the judge's, from the picture ``nearest``; right: None if it was not judged."""

    prompt: str
    picture: np.ndarray
    nearest: np.ndarray
    answer: str
    right: bool | None


def render(sheet: DrawSheet) -> str:
    """The page as one HTML text."""
    cards = {kind: [_card(*p, sheet.references) for p in sheet.pictures if p[0].kind == kind] for kind in TITLES}
    return fill(
        "draw.html",
        sheet=sheet,
        figures_table=table_rows(sheet.figures),
        copies_table=copy_rows(sheet.copies) if sheet.copies else None,
        copies_note=copies_note(sheet.copies) if sheet.copies else "",
        sections=[(TITLES[kind], cards[kind]) for kind in TITLES if cards[kind]],
    )


def percent(share: Share) -> str:
    """A share with its interval, in percent."""
    return f"{share.share:.0%} ({share.low:.0%} to {share.high:.0%})"


def table_rows(figures: Sequence[KindFigures]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table of figures: for each kind the drawn pictures, then the judge on real ones."""
    parts = [part for part in PARTS if any(part in kind.drawn for kind in figures)]
    lines = []
    for kind in figures:
        rows = (
            (f"{kind.kind}: {kind.prompts} prompts, {kind.pictures} pictures drawn", kind.drawn),
            ("  the judge, on real pictures", kind.real),
            ("  the judge, on real pictures through the tokenizer", kind.real_tokens),
        )
        for label, shares in rows:
            if shares:
                cells = [percent(shares[part]) if part in shares else "" for part in parts]
                lines.append([label, *cells, str(max(share.trials for share in shares.values()))])
    return ["judged right (95% interval)", *(HEADS[part] for part in parts), "trials"], lines


def copy_rows(copies: Copies) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table of distances."""
    rows = {
        "drawn": copies.drawn,
        "held out, through the tokenizer": copies.held_out_tokens,
        "held out": copies.held_out,
        "training pictures, through the tokenizer (copies)": copies.copies,
    }
    heads = ["distance to the nearest training picture", "5th percentile", "median", "95th percentile", "pictures"]
    lines = [
        [name, f"{s.percentile_5:.3f}", f"{s.median:.3f}", f"{s.percentile_95:.3f}", str(s.count)]
        for name, s in rows.items()
    ]
    return heads, lines


def copies_note(copies: Copies) -> str:
    """One sentence on the share of drawn pictures that lie near a training picture."""
    return (
        f"{percent(copies.nearer)} of the drawn pictures are nearer to a training picture than 95% of the held-out "
        "pictures (through the tokenizer); for pictures that copy nothing, 5% is expected."
    )


def _card(prompt: Prompt, picture: np.ndarray, verdict: Verdict, references: Sequence[Reference]) -> Card:
    answer = " and ".join(references[answers[0]].names[0] for answers in verdict.answers)
    if "count" in verdict.right:
        answer = f"{verdict.count} × {answer}"
    if "colour" in verdict.right:
        answer += f", {verdict.colour}"
    nearest = _thumbnail(references[verdict.answers[0][0]].pixels(), SMALL_SIDE)
    return Card(prompt.text, _thumbnail(picture, SIDE), nearest, answer, verdict.right.get("all"))


def _thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)
