"""The interface of every decoder: its losses in training, its sampling in ``decode``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Sampling, TokenizerLoss
from v2flow_cli.runtime.device import draw_noise


@dataclass(frozen=True)
class Layout:
    """Coordinates of tokens (B, n, 2) and patches (B, N, 2), and the index of each patch's token (B, N).

    ``part_index`` (B, N) numbers the patches of one token; ``rate`` is the resampler's.
    """

    tokens: Tensor
    patches: Tensor
    token_index: Tensor
    part_index: Tensor
    rate: int = 0


@dataclass(frozen=True)
class TokenInput:
    """The code vectors (B, n, D) of a batch and their layout.

    ``lengths`` (B,) is the number of tokens of an ordered sequence that each image keeps; None: all of them.
    """

    vectors: Tensor
    lengths: Tensor | None
    layout: Layout


@dataclass(frozen=True)
class ImageLossPlan:
    """How many images of a training batch, its last ones, are sampled for the losses in pixels, and how.

    The default is one step without noise: the conditional mean.
    """

    count: int = 0
    noise_temperature: float = 0.0
    num_flow_steps: int = 1
    solver: str = "euler"

    @classmethod
    def of(cls, loss: TokenizerLoss, sampling: Sampling, batch: int) -> ImageLossPlan:
        """The plan of ``batch`` images under ``loss``. Images with the dummy D come first, so few are among them."""
        if not loss.draws:
            return cls()
        count = max(1, round(loss.pixel_share * batch))
        if loss.pictures == "one_step":
            return cls(count)
        return cls(count, sampling.noise_temperature, sampling.num_flow_steps, sampling.solver)

    def noise_like(self, data: Tensor) -> Tensor:
        """The initial noise, from torch's generator; zeros draw no random number."""
        return self.noise_temperature * draw_noise(data) if self.noise_temperature else torch.zeros_like(data)


@dataclass(frozen=True)
class StepPlan:
    """The sizes of a training step's tensors, and what changes from step to step.

    Drawn on the host before the step: reading a number back from a tensor inside it would make the host wait for the
    GPU and break the compiled graph.
    """

    hidden: int = 0  # hidden patches of each image; only for the masked decoder
    dropped: int = 0  # images that see the dummy D, the first ones of the batch
    rate: int = 0  # of the resampler
    quantizer_step: int = 0  # the first step at which the quantizer does the same as at this one
    noise_scale: float | Tensor = 0.0  # factor on the Gumbel noise; a tensor () if it changes from step to step
    image_losses: ImageLossPlan = field(default_factory=ImageLossPlan)


class DecoderLosses(NamedTuple):
    """Flow loss of Eq. 3 and regression loss, both scalars, and the predicted data: patches (B, N, P)."""

    flow: Tensor
    regression: Tensor
    patches: Tensor  # visible patches are returned unchanged


class Decoder(Protocol):
    """Code vectors (B, n, D) to latent patches (B, N, P)."""

    def plan(
        self, u: float, v: float, batch: int, positions: int, loss: TokenizerLoss, sampling: Sampling, coarse: bool
    ) -> tuple[int, int]:
        """(hidden patches of each image, images that see D) of a step, from two numbers drawn from [0, 1).

        ``coarse`` allows only few numbers of hidden patches, so that a compiled step is reused.
        """
        ...

    def losses(self, patches: Tensor, inputs: TokenInput, loss: TokenizerLoss, plan: StepPlan) -> DecoderLosses:
        """Losses of one pass; the first ``plan.dropped`` images see D (Eq. 7)."""
        ...

    def sample(self, inputs: TokenInput, noise: Tensor, seeds: Sequence[int], settings: Sampling) -> Tensor:
        """Patches from ``noise`` (B, N, P); all other randomness comes from each image's own seed."""
        ...


def count_dropped(share: float, batch: int, u: float) -> int:
    """How many images of a batch see D: ``share`` of them on average over ``u``, uniform in [0, 1)."""
    return min(batch, int(share * batch + u))
