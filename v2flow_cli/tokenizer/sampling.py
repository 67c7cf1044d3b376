"""Tokens -> patches: rounds of context and flow (Algorithm 1, Eq. 6), guided against the dummy D (Eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Sampling
from v2flow_cli.tokenizer.context import MaskedTransformer
from v2flow_cli.tokenizer.flow import Condition, VelocityNetwork, solve
from v2flow_cli.tokenizer.masking import gather, reveal_schedule


@dataclass(frozen=True)
class Places:
    """Where everything is: coordinates of tokens (B, n, 2) and patches (B, N, 2), and each patch's token (B, N)."""

    tokens: Tensor
    patches: Tensor
    cells: Tensor


@torch.no_grad()
def sample_patches(
    context: MaskedTransformer,
    flow: VelocityNetwork,
    places: Places,
    tokens: Tensor,
    *,
    noise: Tensor,
    orders: Tensor,
    settings: Sampling,
) -> Tensor:
    """Patches (B, N, P) of tokens (B, n, D), revealed in ``orders`` (B, N) from ``noise`` (B, N, P)."""
    positions = noise.shape[1]
    patches = torch.zeros_like(noise)
    done = 0
    for count in reveal_schedule(positions, settings.num_mask_steps):
        seen, now = orders[:, :done], orders[:, done : done + count]
        visible, visible_at = gather(patches, seen), gather(places.patches, seen)
        asked = (gather(places.patches, now), places.cells.gather(1, now))
        given = flow.condition(context(tokens, places.tokens, visible, visible_at, *asked))
        dummy = None
        if settings.guidance_scale != 1:  # at 1 the dummy branch is not computed at all
            dummy = flow.condition(context(None, None, visible, visible_at, *asked))
        predict = Guided(flow, given, dummy, settings, done / positions, (done + count) / positions)
        found = solve(predict, gather(noise, now), flow.path, settings.num_flow_steps, settings.solver)
        found = found.to(patches.dtype)  # under autocast the network answers in bf16
        patches = patches.scatter(1, now[..., None].expand_as(found), found)
        done += count
    return patches


class Guided:
    """Predicted data under guidance: w psi(V2) + (1 - w) psi(D), Eq. 7, both branches in one batch.

    The velocity is affine in the predicted data, so guiding one is guiding the other. With the linear schedule
    w grows from 1 with the share of the sampling that is done; with the constant one it is ``guidance_scale``.
    """

    def __init__(
        self,
        flow: VelocityNetwork,
        given: Condition,
        dummy: Condition | None,
        settings: Sampling,
        start: float,
        end: float,
    ) -> None:
        self.flow, self.guided, self.settings = flow, dummy is not None, settings
        self.start, self.end = start, end
        self.condition = given
        if dummy is not None:
            self.condition = Condition(
                torch.cat([given.data_mean, dummy.data_mean]), torch.cat([given.modulation, dummy.modulation])
            )

    def __call__(self, z_t: Tensor, t: float) -> Tensor:
        times = torch.full((len(z_t),), t, device=z_t.device)
        if not self.guided:
            return self.flow(z_t, times, self.condition)
        both = self.flow(torch.cat([z_t, z_t]), torch.cat([times, times]), self.condition)
        given, dummy = both.chunk(2)
        w = self.settings.guidance_scale
        if self.settings.guidance_schedule == "linear":
            w = 1 + (w - 1) * (self.start + (self.end - self.start) * (1 - t))
        return w * given + (1 - w) * dummy
