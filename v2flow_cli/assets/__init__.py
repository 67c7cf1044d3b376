"""The embedded default model (``default/tokenizer``, ``default/llm``) and the sample photos (``photos``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOS = Path(__file__).resolve().parent / "photos"
SAMPLE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")


def sample_photos() -> list[tuple[str, Image]]:
    """(name, RGB image) of the five sample photos, in a fixed order."""
    from v2flow_cli.store.images import open_image

    return [(name.partition(".")[0], open_image(PHOTOS / name, name)) for name in SAMPLE_PHOTOS]
