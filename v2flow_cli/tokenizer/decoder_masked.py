"""Tokens -> patches: rounds of context and flow (Algorithm 1, Eq. 6), guided against the dummy D (Eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Sampling
from v2flow_cli.tokenizer.context import MaskedTransformer
from v2flow_cli.tokenizer.flow import VelocityNetwork, solve
from v2flow_cli.tokenizer.guidance import Guided
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
    lengths: Tensor | None = None,
) -> Tensor:
    """Patches (B, N, P) of tokens (B, n, D), revealed in ``orders`` (B, N) from ``noise`` (B, N, P).

    ``lengths`` (B,): how many tokens of an ordered sequence each image keeps.
    """
    positions = noise.shape[1]
    patches = torch.zeros_like(noise)
    done = 0
    for count in reveal_schedule(positions, settings.num_mask_steps):
        seen, now = orders[:, :done], orders[:, done : done + count]
        visible, visible_at = gather(patches, seen), gather(places.patches, seen)
        asked = (gather(places.patches, now), places.cells.gather(1, now))
        given = flow.condition(context(tokens, places.tokens, visible, visible_at, *asked, lengths))
        dummy = None
        if settings.guidance_scale != 1:  # at 1 the dummy branch is not computed at all
            dummy = flow.condition(context(None, None, visible, visible_at, *asked))
        predict = Guided(flow, given, dummy, settings, done / positions, (done + count) / positions)
        found = solve(predict, gather(noise, now), flow.path, settings.num_flow_steps, settings.solver)
        found = found.to(patches.dtype)  # under autocast the network answers in bf16
        patches = patches.scatter(1, now[..., None].expand_as(found), found)
        done += count
    return patches
