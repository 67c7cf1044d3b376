"""What every decoder offers: losses in training, sampling in ``decode``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Sampling, TokenizerLoss


@dataclass(frozen=True)
class Places:
    """Where everything is: coordinates of tokens (B, n, 2) and patches (B, N, 2), and each patch's token (B, N).

    ``parts`` (B, N) numbers the patches of one token; ``rate`` is the resampler's.
    """

    tokens: Tensor
    patches: Tensor
    cells: Tensor
    parts: Tensor
    rate: int = 0


@dataclass(frozen=True)
class Drawn:
    """How many images of a training batch, its last ones, are drawn for the losses of pictures, and how.

    The default is one step without noise: the conditional mean.
    """

    count: int = 0
    noise_temperature: float = 0.0
    num_flow_steps: int = 1
    solver: str = "euler"

    @classmethod
    def of(cls, loss: TokenizerLoss, sampling: Sampling, batch: int) -> Drawn:
        """What ``loss`` asks of ``batch`` images; images that saw the dummy D come first, so few never have them."""
        if not loss.draws:
            return cls()
        count = max(1, round(loss.pixel_share * batch))
        if loss.pictures == "one_step":
            return cls(count)
        return cls(count, sampling.noise_temperature, sampling.num_flow_steps, sampling.solver)

    def noise_like(self, data: Tensor) -> Tensor:
        """The initial noise, from torch's generator; zeros draw no random number."""
        return self.noise_temperature * torch.randn_like(data) if self.noise_temperature else torch.zeros_like(data)


@dataclass(frozen=True)
class StepPlan:
    """What sets the shapes of a training step, and what changes with the step.

    Drawn on the host before the step: inside it a number read back from a tensor would make the host wait for the GPU
    and cut the compiled graph.
    """

    hidden: int = 0  # patches of each image that are hidden; only for the masked decoder
    dropped: int = 0  # images that see the dummy D, the first ones of the batch
    rate: int = 0  # of the resampler
    quantizer_step: int = 0  # a step in which the quantizer does the same
    noise_scale: float | Tensor = 0.0  # factor on the Gumbel noise; a tensor () where it changes from step to step
    drawn: Drawn = field(default_factory=Drawn)


class DecoderLosses(NamedTuple):
    """Flow loss of Eq. 3 and regression loss, both scalars, and the predicted data: patches (B, N, P)."""

    flow: Tensor
    regression: Tensor
    patches: Tensor  # a visible one is given back as it came


class Decoder(Protocol):
    """What turns code vectors (B, n, D) into latent patches (B, N, P).

    ``lengths`` (B,) says how many tokens of an ordered sequence each image keeps; None: all of them.
    """

    def losses(
        self,
        patches: Tensor,
        tokens: Tensor,
        lengths: Tensor | None,
        places: Places,
        loss: TokenizerLoss,
        plan: StepPlan,
    ) -> DecoderLosses:
        """Of one pass; the first ``plan.dropped`` images see D (Eq. 7)."""
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


def count_dropped(share: float, batch: int, u: float) -> int:
    """How many images of a batch see D, ``share`` of them on average over ``u``, uniform in [0, 1)."""
    return min(batch, int(share * batch + u))
