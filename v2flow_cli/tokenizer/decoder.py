"""The decoder's seam, and the paper's decoder behind it: masked transformer and per-patch flow (section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Context, Flow, Sampling, TokenizerLoss
from v2flow_cli.tokenizer.context import MaskedTransformer
from v2flow_cli.tokenizer.decoder_masked import Places, sample_patches
from v2flow_cli.tokenizer.flow import VelocityNetwork
from v2flow_cli.tokenizer.masking import gather, random_orders, sample_mask_ratio, seeded_orders


class DecoderLosses(NamedTuple):
    """Flow loss of Eq. 3 and regression loss, both scalars, and the data as foretold: patches (B, N, P)."""

    flow: Tensor
    regression: Tensor
    patches: Tensor  # a visible one is given back as it came


class Decoder(Protocol):
    """What turns code vectors (B, n, D) into latent patches (B, N, P).

    ``lengths`` (B,) says how many tokens of an ordered sequence each image keeps; None: all of them.
    """

    def losses(
        self, patches: Tensor, tokens: Tensor, lengths: Tensor | None, places: Places, loss: TokenizerLoss
    ) -> DecoderLosses:
        """Of one pass; a share ``loss.guidance_dropout`` of the images, the first ones, sees D (Eq. 7)."""
        ...

    def sample(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        places: Places,
        noise: Tensor,
        seeds: Sequence[int],
        settings: Sampling,
    ) -> Tensor:
        """Patches from ``noise`` (B, N, P); whatever else is random comes from each image's own seed."""
        ...


class MaskedDecoder:
    """Masked autoregressive flow: context of the hidden patches, then a flow on each of them."""

    def __init__(self, context: MaskedTransformer, flow: VelocityNetwork, masked: Context, settings: Flow) -> None:
        self.context, self.flow, self.masked, self.settings = context, flow, masked, settings

    def losses(
        self, patches: Tensor, tokens: Tensor, lengths: Tensor | None, places: Places, loss: TokenizerLoss
    ) -> DecoderLosses:
        """Source: section 2.3."""
        batch, positions, _ = patches.shape
        ratio = sample_mask_ratio(self.masked.mask_ratio_min, self.masked.mask_ratio_std)
        order = random_orders(batch, positions, patches.device)
        hidden_count = max(1, math.ceil(ratio * positions))
        hidden, seen = order[:, :hidden_count], order[:, hidden_count:]
        visible, visible_at = gather(patches, seen), gather(places.patches, seen)
        hidden_at, hidden_cells = gather(places.patches, hidden), places.cells.gather(1, hidden)
        # D is one token, not n copies, so the images that see it form a batch of their own.
        dropped = count_dropped(loss.guidance_dropout, batch)
        contexts = []
        for part, known in ((slice(0, dropped), False), (slice(dropped, batch), True)):
            if part.start < part.stop:
                given = (tokens[part], places.tokens[part]) if known else (None, None)
                rest = (visible, visible_at, hidden_at, hidden_cells)
                kept = None if lengths is None else lengths[part]
                contexts.append(self.context(*given, *(x[part] for x in rest), kept))
        # Losses in pixels judge what ``decode`` shows by default, so that they train the whole way to it.
        drawn = bool(loss.pixels or loss.ssim)
        asked = gather(patches, hidden)
        flow, regression, foretold = self.flow.loss(asked, torch.cat(contexts), self.settings, drawn)
        places_of = hidden[..., None].expand(-1, -1, patches.shape[-1])
        return DecoderLosses(flow, regression, patches.scatter(1, places_of, foretold.to(patches.dtype)))

    def sample(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        places: Places,
        noise: Tensor,
        seeds: Sequence[int],
        settings: Sampling,
    ) -> Tensor:
        """Source: Algorithm 1."""
        orders = seeded_orders(seeds, noise.shape[1], noise.device)
        return sample_patches(
            self.context, self.flow, places, tokens, noise=noise, orders=orders, settings=settings, lengths=lengths
        )


def count_dropped(share: float, batch: int) -> int:
    """How many images of a batch see D: ``share`` of them on average."""
    return min(batch, int(share * batch + torch.rand(()).item()))
