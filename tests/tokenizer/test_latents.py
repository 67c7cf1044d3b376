"""One place for the scale, whatever the autoencoder."""

import diffusers
import pytest
import torch

from v2flow_cli.errors import ModelError
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoder, V2FlowAutoencoderConfig
from v2flow_cli.tokenizer.latents import Latents, load_autoencoder_spec

TINY = {"latent_channels": 4, "encoder_width": 16, "encoder_depth": 1, "decoder_width": 16, "decoder_depth": 1}


def tiny_diffusers(name: str):
    torch.manual_seed(0)
    if name == "AutoencoderKL":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.3, **blocks)
    if name == "AutoencoderTiny":
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        depth = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        return diffusers.AutoencoderTiny(**channels, **depth, scaling_factor=0.3)
    sides = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_out_channels"] = (8, 8)
        sides[f"{side}_layers_per_block"] = (1, 1)
        sides[f"{side}_block_types"] = "ResBlock"
        sides[f"{side}_qkv_multiscales"] = ((), ())
    return diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.3, **sides)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_the_scale_of_a_diffusers_autoencoder_is_its_own(name, tmp_path):
    model = tiny_diffusers(name).eval()
    model.save_pretrained(tmp_path)
    spec, weights = load_autoencoder_spec(str(tmp_path))
    latents = Latents(spec).eval()
    latents.autoencoder.load_state_dict(weights)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        raw = model.encode(image)
        raw = (
            raw.latent_dist.mode() if name == "AutoencoderKL" else getattr(raw, "latent", getattr(raw, "latents", None))
        )
        direct = model.decode(raw).sample.clamp(-1, 1)
    scaled = latents.encode(image)
    assert torch.allclose(scaled, 0.3 * raw, atol=1e-6)
    assert scaled.shape == (1, latents.channels, 32 // latents.downsampling, 32 // latents.downsampling)
    assert torch.allclose(latents.decode(scaled), direct, atol=1e-5)


def test_our_own_autoencoder_undoes_scale_and_shift(tmp_path):
    torch.manual_seed(0)
    model = V2FlowAutoencoder(V2FlowAutoencoderConfig(**TINY, scaling_factor=2.0, shift_factor=0.5)).eval()
    model.save_pretrained(tmp_path)
    spec, weights = load_autoencoder_spec(str(tmp_path))
    latents = Latents(spec).eval()
    latents.autoencoder.load_state_dict(weights)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(latents.encode(image), (model.encode(image) - 0.5) * 2.0, atol=1e-6)
    direct = model.decode(model.encode(image)).clamp(-1, 1)
    assert torch.allclose(latents.decode(latents.encode(image)), direct, atol=1e-5)


def test_pixels_are_their_own_latents():
    image = torch.rand(1, 3, 8, 8)
    latents = Latents(load_autoencoder_spec("pixels")[0])
    assert torch.equal(latents.decode(latents.encode(image)), image)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ModelError, match="class 'UNet2DModel'; expected V2FlowAutoencoder"):
        load_autoencoder_spec(str(tmp_path))
    with pytest.raises(ModelError, match="class 'os' is not known"):
        Latents({"class": "os"})
