"""Images <-> scaled autoencoder latents. The latent scale is applied only here."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from v2flow_cli.errors import ModelError, foreign_errors
from v2flow_cli.runtime.extras import extra
from v2flow_cli.tokenizer.autoencoder import V2FlowAutoencoder, V2FlowAutoencoderConfig
from v2flow_cli.tokenizer.embedded import autoencoder_weights, tokenizer_folder

DIFFUSERS_CLASSES = ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny")
PIXELS = "pixels"  # no autoencoder: the "latents" are the image itself


class Latents(nn.Module):
    """A frozen autoencoder behind one interface: latents have zero mean and about unit variance.

    Departs (D3): the tokenizer works on latents, as in the official code; ``pixels`` is the paper's text.

    Args:    spec, the autoencoder's own config with its ``class`` name: ``V2FlowAutoencoder``, one of
             ``DIFFUSERS_CLASSES``, or ``pixels``.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        spec = dict(spec)
        self.kind = spec.pop("class", None)
        self.autoencoder: Any = _build(self.kind, spec)  # each class of diffusers has its own encode
        self.channels, self.downsampling, self.scale, self.shift = _geometry(self.kind, self.autoencoder)
        self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; the mean of a stochastic encoder."""
        if self.kind == PIXELS:
            return images
        raw = self.autoencoder.encode(images)
        if self.kind != "V2FlowAutoencoder":
            if hasattr(raw, "latent_dist"):
                raw = raw.latent_dist.mode()
            else:
                raw = raw.latent if hasattr(raw, "latent") else raw.latents
        return (raw - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, pixel_decoder: nn.Module | None = None) -> Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1], of scaled latents."""
        return self.draw(latents, pixel_decoder).clamp(-1, 1)

    def draw(self, latents: Tensor, pixel_decoder: nn.Module | None = None) -> Tensor:
        """Images (B, 3, H, W), not clamped, of scaled latents, with gradients.

        ``pixel_decoder``, of ``copy_decoder``, is used in place of the autoencoder's.
        """
        if self.kind == PIXELS:
            return latents
        raw = latents / self.scale + self.shift
        if pixel_decoder is not None:
            return pixel_decoder(raw.contiguous(memory_format=torch.channels_last))
        images = self.autoencoder.decode(raw)
        return images if self.kind == "V2FlowAutoencoder" else images.sample

    def copy_decoder(self) -> nn.Module:
        """A trainable copy of the autoencoder's decoder.  Raises: ModelError for an autoencoder of another class.

        Departs (D16): the paper has one decoder and the autoencoder's pixels. A decoder with its own copy can be
        trained to pixels while the token ids, and what other decoders make of them, stay the same.
        """
        if self.kind != "V2FlowAutoencoder":
            raise ModelError(
                f"pixel_decoder is a copy of the decoder of a V2FlowAutoencoder, and the autoencoder is {self.kind}. "
                "Use pixel_decoder: false."
            )
        return copy.deepcopy(self.autoencoder.decoder).requires_grad_(True)


def autoencoder_spec(config: V2FlowAutoencoderConfig) -> dict[str, Any]:
    """What ``Latents`` takes to build an autoencoder of ``config``."""
    sizes = ("latent_channels", "encoder_width", "encoder_depth", "decoder_width", "decoder_depth")
    keys = (*sizes, "latent_noise", "scaling_factor", "shift_factor")
    return {"class": "V2FlowAutoencoder", **{key: getattr(config, key) for key in keys}}


def load_autoencoder_spec(path_or_id: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(spec, weights) of an autoencoder folder or hub id, for ``Latents(spec)`` and its ``autoencoder``.

    From a v2flow tokenizer, also an embedded one by its name, it is the tokenizer's autoencoder.

    Raises:  ModelError for a folder that holds no autoencoder of a known class.
    """
    if path_or_id == PIXELS:
        return {"class": PIXELS}, {}
    from transformers import PretrainedConfig

    folder = tokenizer_folder(path_or_id)
    with foreign_errors(f"{path_or_id}: not an autoencoder folder or hub id"):
        config, _ = PretrainedConfig.get_config_dict(folder)
    if config.get("model_type") == V2FlowAutoencoderConfig.model_type:
        model: Any = V2FlowAutoencoder.from_pretrained(folder, dtype=torch.float32)
        return autoencoder_spec(model.config), model.state_dict()
    if config.get("model_type") == "v2flow":
        weights = autoencoder_weights(folder, config)
        return config["autoencoder"], {name: tensor.float() for name, tensor in weights.items()}
    name = config.get("_class_name")
    if name not in DIFFUSERS_CLASSES:
        raise ModelError(
            f"{path_or_id}: an autoencoder of class {name!r}; expected V2FlowAutoencoder, "
            f"{', '.join(DIFFUSERS_CLASSES)}, or the word pixels."
        )
    model = _diffusers_class(name).from_pretrained(folder)
    spec = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    return {"class": name, **spec}, model.state_dict()


def _build(kind: str | None, spec: dict[str, Any]) -> nn.Module:
    if kind == PIXELS:
        return nn.Identity()
    if kind == "V2FlowAutoencoder":
        return V2FlowAutoencoder(V2FlowAutoencoderConfig(**spec))
    if kind in DIFFUSERS_CLASSES:
        return _diffusers_class(kind).from_config(spec)
    raise ModelError(
        f"An autoencoder of class {kind!r} is not known; expected V2FlowAutoencoder or {', '.join(DIFFUSERS_CLASSES)}."
    )


def _diffusers_class(name: str) -> Any:
    """Imported only for an autoencoder of diffusers; V2FlowAutoencoder does not need the package."""
    with extra("diffusers", "diffusers", f"an autoencoder of class {name}"):
        import diffusers

    return getattr(diffusers, name)


def _geometry(kind: str | None, model: Any) -> tuple[int, int, float, float]:
    """(channels, pixels per latent position, scale, shift) from the autoencoder's own config."""
    if kind == PIXELS:
        return 3, 1, 1.0, 0.0
    config = model.config
    if kind == "V2FlowAutoencoder":
        return config.latent_channels, model.downsampling, config.scaling_factor, config.shift_factor
    blocks = config.block_out_channels if kind == "AutoencoderKL" else config.encoder_block_out_channels
    downsampling = 2 ** (len(blocks) - 1)
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor", None)
    return config.latent_channels, downsampling, float(scale or 1.0), float(shift or 0.0)
