"""The losses of a tokenizer: the flow loss of Eq. 3, with commitment, regression and word-entropy terms."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.recipe.schema import Registers, Resampler, TokenizerRecipe
from v2flow_cli.runtime.device import DTYPES
from v2flow_cli.store.llm_table import load_vocab_embeddings
from v2flow_cli.tokenizer.assembly import SECTIONS
from v2flow_cli.tokenizer.config import V2FlowConfig
from v2flow_cli.tokenizer.decoder import ImageLossPlan, StepPlan
from v2flow_cli.tokenizer.latents import load_autoencoder_spec
from v2flow_cli.tokenizer.other_decoders import DECODER, FAITHFUL
from v2flow_cli.tokenizer.v2flow import V2FlowTokenizer
from v2flow_cli.training.critic import AdversarialLosses, Critic
from v2flow_cli.training.objectives.objective import Objective
from v2flow_cli.training.perceptual import FeatureNetwork, Lpips, load_perceptual
from v2flow_cli.training.ssim import ssim

# Weights that ``save_dtype`` may round. The others determine ids: vectors are mixtures of thousands of words and differ
# by less than a hundredth of their length, so that in bf16 every second patch would choose another code.
ROUNDED = (*DECODER, "latents", "quantizer.codebook")

FLOOR_GRACE_STEPS = 1000  # after the codebook starts, before the usage floor counts


class ImageLosses(NamedTuple):
    """Means over the sampled images, each 0 if its weight is 0."""

    log_mse: Tensor  # natural log of the squared error
    ssim: Tensor
    perceptual: Tensor
    adversarial: AdversarialLosses


class TokenizerObjective(Objective):
    """The tokenizer of a recipe, with its frozen autoencoder and vocabulary loaded, or ``model``."""

    recipe: TokenizerRecipe

    def __init__(self, recipe: TokenizerRecipe, model: V2FlowTokenizer | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        if model is None:
            model = _continue(recipe) if recipe.init_from else _build(recipe)
        self.model = model
        if recipe.freeze_tokens:
            for name, part in model.named_children():
                if name not in DECODER:
                    part.requires_grad_(False)
        # In a tuple, so that it is no submodule: checkpoints, averages and optimizers must not contain it.
        networks = [load_perceptual(recipe.loss.features)] if recipe.loss.needs_features else []
        self._features: tuple[FeatureNetwork | Lpips, ...] = tuple(networks)
        # Beside the model, so that it is trained and resumed with it, and not exported.
        self.critic = Critic(networks[0]) if recipe.loss.adversarial else None

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        return self.model.size_multiple

    def train(self, mode: bool = True) -> TokenizerObjective:
        super().train(mode)
        self.model.latents.eval()
        if self.recipe.freeze_tokens:
            self.model.quantizer.eval()  # its codebook is frozen
        return self

    def plan(self, step: int, inputs: dict[str, Any], draw: random.Random, coarse: bool = False) -> dict[str, Any]:
        """Further inputs of ``forward``: the random parts of a step that the host draws, from ``draw``."""
        if "latents" in inputs:
            shape = inputs["latents"].shape
        else:
            batch, _, height, width = inputs["images"].shape
            side = self.model.latents.downsampling
            shape = torch.Size((batch, self.model.latents.channels, height // side, width // side))
        words = self.recipe.vocabulary
        ramp = min(1.0, step / words.gumbel_ramp_steps) if words.gumbel_ramp_steps else 1.0
        noise: float | Tensor = ramp * words.gumbel_noise
        if words.gumbel_noise and words.gumbel_ramp_steps:
            noise = torch.tensor(noise)  # a number would be compiled into the graph
        sampling = self.recipe.sampling
        return {"plan": self.model.plan_step(step, shape, self.recipe.loss, draw, noise, coarse, sampling)}

    def forward(
        self,
        images: Tensor | None = None,
        step: int = 0,
        latents: Tensor | None = None,
        plan: StepPlan | None = None,
        token_ids: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Loss terms of images (B, 3, S, S), or of their scaled latents; ``loss`` is the total.

        Without a ``plan`` this pass draws its own. With latents the images are for the losses in pixels; ``token_ids``
        are those of frozen tokens, one (B, n) for each rate of the resampler.
        """
        if plan is None:
            tensors = {"images": images} if latents is None else {"latents": latents}
            inputs = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            plan = self.plan(step, inputs, random.Random(int(torch.randint(2**62, ()))))["plan"]
        if latents is None:
            assert images is not None, "images or latents"
            latents = self.model.latents.encode(images)
        weights = self.recipe.loss
        out = self.model(latents, loss=weights, plan=plan, token_ids=token_ids[plan.rate] if token_ids else None)
        in_pixels = self._image_losses(images, out.latents)
        loss = (
            weights.flow * out.flow_loss
            + weights.regression * out.regression_loss
            + weights.commit * out.commit_loss
            + weights.pixels * in_pixels.log_mse
            + weights.ssim * (1 - in_pixels.ssim)
            + weights.perceptual * in_pixels.perceptual
            + weights.adversarial * in_pixels.adversarial.decoder
            + in_pixels.adversarial.critic
            - weights.batch_entropy * out.batch_entropy
        )
        figures = {}
        if weights.draws:
            figures["psnr_db"] = -10 / math.log(10) * in_pixels.log_mse.detach()
        if weights.ssim:
            figures["ssim"] = in_pixels.ssim.detach()
        if weights.perceptual:
            figures["perceptual_loss"] = in_pixels.perceptual.detach()
        if weights.adversarial:
            figures["adversarial_loss"] = in_pixels.adversarial.decoder.detach()
            figures["critic_loss"] = in_pixels.adversarial.critic.detach()
        return {
            "loss": loss,
            **figures,
            "flow_loss": out.flow_loss.detach(),
            "regression_loss": out.regression_loss.detach(),
            "commit_loss": out.commit_loss.detach(),
            "word_entropy": out.word_entropy.detach(),
            "batch_word_entropy": out.batch_entropy.detach(),
        }

    def _image_losses(self, images: Tensor | None, latents: Tensor) -> ImageLosses:
        """Losses of the last images of a batch, with predicted ``latents``. Pixels span 1 in the first two."""
        weights = self.recipe.loss
        zero = latents.new_zeros(())
        perceptual, adversarial = zero, AdversarialLosses(zero, zero)
        if images is None or not weights.draws:
            return ImageLosses(zero, zero, perceptual, adversarial)
        count = ImageLossPlan.of(weights, self.recipe.sampling, len(images)).count
        photos = images[-count:].float()
        drawn = self.model.latents.draw(latents[-count:].to(images.dtype), self.model.pixel_decoder).float()
        log_mse = (drawn / 2 - photos / 2).square().mean((1, 2, 3)).log().mean()
        similarity = ssim(drawn / 2 + 0.5, photos / 2 + 0.5) if weights.ssim else zero
        for network in self._features:
            network.to(drawn.device)
            ours, theirs = network.blocks(drawn), network.blocks(photos)
            if weights.perceptual:
                perceptual = network.distance(ours, theirs).mean()
            if self.critic is not None:
                adversarial = self.critic.losses(ours, theirs)
        return ImageLosses(log_mse, similarity, perceptual, adversarial)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to tokens and back, with the recipe's sampling; image i has seed i."""
        size = images.shape[-2:]
        return self.model.decode(self.model.encode(images), height=size[0], width=size[1])

    def no_decay(self) -> tuple[str, ...]:
        """Parameters without weight decay: the flow head, as in the official training."""
        return ("model.flow.",)

    def statistics(self, step: int) -> dict[str, Tensor]:
        """Codebook statistics for the log, each a tensor (), after ``step`` steps."""
        return self.model.quantizer.statistics() if step > self.recipe.quantizer.start_step else {}

    def check(self, step: int, figures: Mapping[str, float]) -> None:
        """Raises: V2FlowError if the codebook's usage in ``figures`` is under the recipe's floor."""
        settings = self.recipe.quantizer
        grace = settings.start_step + FLOOR_GRACE_STEPS
        usage = figures.get("codebook_usage", 1.0)
        if step > grace and usage < settings.usage_floor:
            raise V2FlowError(
                f"step {step}: only {usage:.1%} of the codebook is in use; the recipe's floor is "
                f"quantizer.usage_floor = {settings.usage_floor:.1%}. Lower vocabulary.logit_scale or gumbel_noise, or "
                "raise quantizer.revive_after."
            )

    def export(self, folder: Path) -> None:
        """Save the model folder that ``V2FlowTokenizer.from_pretrained`` loads.

        ``save_dtype`` applies to ``ROUNDED``; the other weights stay float32.
        """
        dtype = DTYPES[self.recipe.train.save_dtype]
        for name, tensor in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if tensor.is_floating_point() and name.startswith(ROUNDED):
                tensor.data = tensor.data.to(dtype)
        self.model.save_pretrained(folder)


def build_config(recipe: TokenizerRecipe, autoencoder: dict, vocab_shape: tuple[int, int]) -> V2FlowConfig:
    """The model config of a recipe with its autoencoder's spec and the shape of its vocabulary."""
    parts = {name: getattr(recipe, name) for name in SECTIONS}
    sections: dict[str, Any] = {
        name: None if part is None else dataclasses.asdict(part) for name, part in parts.items()
    }
    return V2FlowConfig(
        image_size=recipe.image_size,
        patch_size=recipe.latents.patch_size,
        autoencoder=autoencoder,
        vocab_shape=vocab_shape,
        pixel_decoder=recipe.pixel_decoder,
        refine_steps=recipe.refine_steps,
        **sections,
    )


def _build(recipe: TokenizerRecipe) -> V2FlowTokenizer:
    spec, weights = load_autoencoder_spec(recipe.latents.autoencoder)
    table = None if recipe.vocabulary.llm == "none" else load_vocab_embeddings(recipe.vocabulary.llm)
    shape = (0, 0) if table is None else (table.shape[0], table.shape[1])
    model = V2FlowTokenizer(build_config(recipe, spec, shape))
    if weights:
        model.latents.autoencoder.load_state_dict(weights)
        if model.pixel_decoder is not None:
            model.pixel_decoder.load_state_dict(model.latents.autoencoder.decoder.state_dict())
    if table is not None and model.vocabulary is not None:
        model.vocabulary.set_table(table)
    return model


def load_start(recipe: TokenizerRecipe) -> V2FlowTokenizer:
    """The tokenizer that ``init_from`` names.  Raises: ModelError if it is none, or has other shapes."""
    start = V2FlowTokenizer.from_pretrained(recipe.init_from, decoder=FAITHFUL)
    _check_same_shapes(start.config, recipe)
    return start


def _continue(recipe: TokenizerRecipe) -> V2FlowTokenizer:
    """The weights of ``init_from`` with the settings of the recipe: a new stage, not a resume.

    A deeper model starts as the same function: its additional blocks are the identity at first (arXiv 1511.05641).
    For registers that start from a grid see ``_as_registers``.
    """
    start = load_start(recipe)
    vocab_size, code_size = start.config.vocab_shape
    config = build_config(recipe, start.config.autoencoder or {}, (vocab_size, code_size))
    if recipe.freeze_tokens:
        _keep_encoder_settings(config, start.config, recipe.init_from)
    model = V2FlowTokenizer(config)
    weights = start.state_dict()
    if start.config.section("resampler").kind != recipe.resampler.kind:
        weights = _as_registers(weights, model)
    weights |= _new_blocks(model, weights)
    if model.pixel_decoder is not None and start.pixel_decoder is None:
        first = start.latents.copy_decoder().state_dict()
        weights |= {f"pixel_decoder.{name}": value for name, value in first.items()}
    other = sorted(set(weights) ^ set(model.state_dict()))
    if other:
        raise ModelError(f"{recipe.init_from}: its weights do not fit the recipe; only one of them has {other[0]}.")
    model.load_state_dict(weights)
    return model


def _as_registers(weights: Mapping[str, Tensor], model: V2FlowTokenizer) -> dict[str, Tensor]:
    """Weights for ``model``, whose resampler has registers, from those of a tokenizer with a grid.

    The grid's resampler becomes the stem, if the registers have one. The parameters for other lengths are left out.
    The parameters that only registers have, and the order and mask token of their decoder, keep the initial values of
    ``model``.
    """
    initial = model.state_dict()
    renamed = {name.replace("resampler.", "resampler.grid.", 1): value for name, value in weights.items()}
    new = ("resampler.", "context.embed_token.order", "context.embed_token.mask_token")
    first = {name: value for name, value in initial.items() if name.startswith(new)}
    other_lengths = ("resampler.grid.other_downsample.", "context.rate_embedding", "context.split.")
    unused = other_lengths if "resampler.grid.stem.weight" in initial else (*other_lengths, "resampler.grid.")
    return first | {name: value for name, value in renamed.items() if not name.startswith(unused)}


def _new_blocks(model: V2FlowTokenizer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the blocks of ``model`` that a model of less depth, with ``weights``, does not have: they add nothing.

    In a flow transformer the new rows of ``modulate`` make their gates 0; the last layers of the other blocks are 0.
    """
    ours = model.state_dict()
    new = {name: value for name, value in ours.items() if name.startswith(STACKS) and name not in weights}
    gated = any(name.startswith("flow.") for name in new)
    for name, value in new.items():
        if name.endswith(LAST_LAYERS) and not name.startswith("flow."):
            value.zero_()
    for name in ("flow.modulate.weight", "flow.modulate.bias") if gated else ():
        old, after = weights[name], 2 * model.config.section("flow").hidden_size  # shift and scale after the blocks
        added = old.new_zeros(len(ours[name]) - len(old), *old.shape[1:])
        new[name] = torch.cat([old[:-after], added, old[-after:]])
    return new


def _keep_encoder_settings(config: V2FlowConfig, start: V2FlowConfig, where: str) -> None:
    """Copy the encoder's sections from the config ``start``, so that the tokens' digest stays the same."""
    for name in SECTIONS:
        if name in (*DECODER, "sampling"):
            continue
        ours, theirs = config.section(name), start.section(name)
        if ours != theirs:
            key = next(
                f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name, None)
            )
            raise ModelError(
                f"{where}: {name}.{key} is {getattr(theirs, key, None)}, but the recipe says {getattr(ours, key)}, and "
                "freeze_tokens keeps the encoder as it is. Use the value of the model."
            )
        setattr(config, name, getattr(start, name))


def _check_same_shapes(config: V2FlowConfig, recipe: TokenizerRecipe) -> None:
    for name in ("resampler", "quantizer", "context", "flow"):
        ours, theirs = getattr(recipe, name), config.section(name)
        ordered = isinstance(ours, Registers) and isinstance(theirs, Resampler)
        if ordered and recipe.freeze_tokens:
            raise ModelError(
                f"{recipe.init_from}: its tokens lie on a grid, and registers make other ones; freeze_tokens cannot "
                "keep them. Use freeze_tokens: false."
            )
        for key in SHAPES:
            old, new = getattr(theirs, key, None), getattr(ours, key, None)
            if ordered and key == "depth":  # the grid's blocks become the stem's
                key, new = "stem", ours.stem or old
            elif ordered and key != "hidden_size":
                continue
            deeper = key in DEPTHS.get(getattr(ours, "kind", name), ()) and (new or 0) > (old or 0) > 0
            if old != new and not deeper:
                raise ModelError(
                    f"{recipe.init_from}: {name}.{key} is {old}, but the recipe says {new}. "
                    "Use the recipe saved beside that model, or drop init_from."
                )


# Depths that may be larger than those of ``init_from``, by kind of section.
DEPTHS = {"context": ("encoder_depth", "decoder_depth"), "registers": ("depth",), "transformer": ("depth",)}

# The blocks that they count, and the layers of a block whose sums are its output.
STACKS = ("context.encoder.", "context.decoder.", "resampler.blocks.", "flow.blocks.")
LAST_LAYERS = (".out.weight", ".out.bias", ".mlp.2.weight", ".mlp.2.bias")

# Keys of a section that determine the shapes of its weights.
SHAPES = (
    "kind hidden_size depth codebook_size levels encoder_depth decoder_depth token_depth tokens_per_256px "
    "other_tokens_per_256px max_tokens patch_size"
).split()
