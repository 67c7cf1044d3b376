"""Guidance against the dummy D: Eq. 7, or adaptive projected guidance (arXiv 2410.02416), for both decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from v2flow_cli.recipe.schema import Sampling


class Joinable(Protocol):
    """A velocity network's condition, of which two batches can be joined into one."""

    def joined(self, other: Self, /) -> Self: ...


C = TypeVar("C", bound=Joinable)


class Guided(Generic[C]):
    """Predicted data under guidance, both branches in one batch: Eq. 7 is w psi(V2) + (1 - w) psi(D).

    The velocity is affine in the predicted data, so guidance of one is guidance of the other. With the linear schedule
    w grows from 1 with the share of the sampling that is done; with the constant one it is ``guidance_scale``.

    Args:    network, (z_t (B, M, P), t (B,), condition) -> predicted data; condition and dummy, its inputs with the
             tokens and with D (None: no guidance); start and end, the shares of the sampling before and
             after this solve.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, C], Tensor],
        condition: C,
        dummy: C | None,
        settings: Sampling,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        self.network, self.guided, self.settings = network, dummy is not None, settings
        self.start, self.end = start, end
        self.condition = condition if dummy is None else condition.joined(dummy)
        self.push: Tensor | float = 0.0  # apg: the running guidance

    def __call__(self, z_t: Tensor, t: float) -> Tensor:
        times = torch.full((len(z_t),), t, device=z_t.device)
        if not self.guided:
            return self.network(z_t, times, self.condition)
        both = self.network(torch.cat([z_t, z_t]), torch.cat([times, times]), self.condition)
        data, dummy = both.chunk(2)
        w = self.settings.guidance_scale
        if self.settings.guidance_schedule == "linear":
            w = 1 + (w - 1) * (self.start + (self.end - self.start) * (1 - t))
        if self.settings.guidance == "cfg":
            return w * data + (1 - w) * dummy
        return data + (w - 1) * self._projected(data, data - dummy)

    def _projected(self, data: Tensor, push: Tensor) -> Tensor:
        """The difference to D with momentum, limited in size, and with its component along ``data`` scaled down.

        Departs (F6): the limit is on the root mean square, not on the norm, so that it does not depend on the size.
        """
        settings = self.settings
        self.push = push = push + settings.apg_momentum * self.push
        if settings.apg_threshold:
            size = push.square().mean((1, 2), keepdim=True).sqrt()
            push = push * (settings.apg_threshold / size.clamp_min(1e-12)).clamp_max(1)
        share = (push * data).sum((1, 2), keepdim=True) / data.square().sum((1, 2), keepdim=True).clamp_min(1e-12)
        return push - (1 - settings.apg_parallel) * share * data
