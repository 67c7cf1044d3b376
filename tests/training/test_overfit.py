"""Eight photos learned by heart: what the decoder gives back is what the autoencoder would have."""

import pytest

from v2flow_cli.recipe import load_recipe
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.embedded import EMBEDDED_MODEL
from v2flow_cli.training.loop import train

from ..conftest import RECIPES


def eight_squares(photos, size):
    """Two opposite corners of each photo, two thirds of its short side wide; the first eight."""
    for corner in (0, 1):
        for photo in photos:
            side = min(photo.size) * 2 // 3
            left, top = (photo.width - side) * corner, (photo.height - side) * corner
            yield photo.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))


@pytest.mark.slow
def test_eight_photos_are_overfitted(tmp_path, sample_images):
    (tmp_path / "photos").mkdir()
    named = [
        f"data.sources=[{tmp_path / 'photos'}]",
        f"latents.autoencoder={EMBEDDED_MODEL}",
        f"vocabulary.llm={EMBEDDED_MODEL.parent / 'llm'}",
        f"output={tmp_path}/run",
    ]
    recipe = load_recipe(RECIPES / "tiny" / "overfit.yaml", named)
    photos = list(eight_squares(sample_images, recipe.image_size))[:8]
    for i, photo in enumerate(photos):
        photo.save(tmp_path / "photos" / f"{i}.png")
    done = train(recipe, resume=False, log=print)
    assert done.seconds < 300

    model = V2FlowTokenizer.from_pretrained(done.folder)
    images = model.image_processor.preprocess(photos)["pixel_values"]
    token_ids = model.encode(images)
    error = (model.decode(token_ids, seeds=range(8)) - model.autoencode(images)) / 2
    psnr = -10 * error.square().mean((1, 2, 3)).log10()
    assert psnr.min() > 30
    assert len(token_ids.unique()) > 0.5 * recipe.quantizer.codebook_size
