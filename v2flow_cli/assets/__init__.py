"""The embedded default model (``default/tokenizer``, ``default/llm``) and the sample photos.

The photos are those that scikit-image carries, so none is stored here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_right")


def sample_photos() -> list[tuple[str, Image]]:
    """(name, RGB image) of the five photos in the installed scikit-image, in a fixed order."""
    from importlib.resources import files

    from v2flow_cli.store.images import open_image

    folder = files("skimage") / "data"
    found = []
    for name in SAMPLE_PHOTOS:
        file = next(file for suffix in (".png", ".jpg") if (file := folder / f"{name}{suffix}").is_file())
        found.append((name, open_image(file.read_bytes(), name=file.name)))
    return found
