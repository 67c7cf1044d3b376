"""The paper's decoder: masked transformer and per-patch flow (section 2.3), sampled in rounds (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Flow, Sampling, TokenizerLoss
from v2flow_cli.tokenizer.context import MaskedTransformer
from v2flow_cli.tokenizer.decoder import DecoderLosses, Places, StepPlan
from v2flow_cli.tokenizer.flow import VelocityNetwork, solve
from v2flow_cli.tokenizer.guidance import Guided
from v2flow_cli.tokenizer.masking import gather, random_orders, reveal_schedule, seeded_orders


class MaskedDecoder:
    """Masked autoregressive flow: context of the hidden patches, then a flow on each of them."""

    def __init__(self, context: MaskedTransformer, flow: VelocityNetwork, settings: Flow) -> None:
        self.context, self.flow, self.settings = context, flow, settings

    def losses(
        self,
        patches: Tensor,
        tokens: Tensor,
        lengths: Tensor | None,
        places: Places,
        loss: TokenizerLoss,
        plan: StepPlan,
    ) -> DecoderLosses:
        """Source: section 2.3."""
        batch, positions, _ = patches.shape
        order = random_orders(batch, positions, patches.device)
        hidden, seen = order[:, : plan.hidden], order[:, plan.hidden :]
        visible, visible_at = gather(patches, seen), gather(places.patches, seen)
        hidden_at, hidden_cells = gather(places.patches, hidden), places.cells.gather(1, hidden)
        parts = places.parts.gather(1, hidden)
        # D is one token, not n copies, so the images that see it form a batch of their own.
        contexts = []
        for part, known in ((slice(0, plan.dropped), False), (slice(plan.dropped, batch), True)):
            if part.start < part.stop:
                given = (tokens[part], places.tokens[part]) if known else (None, None)
                rest = (visible, visible_at, hidden_at, hidden_cells)
                kept = None if lengths is None else lengths[part]
                contexts.append(self.context(*given, *(x[part] for x in rest), kept, parts[part], places.rate))
        asked = gather(patches, hidden)
        flow, regression, foretold = self.flow.loss(asked, torch.cat(contexts), self.settings, plan.drawn)
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
        parts = places.parts.gather(1, now)
        given = flow.condition(context(tokens, places.tokens, visible, visible_at, *asked, lengths, parts, places.rate))
        dummy = None
        if settings.guidance_scale != 1:  # at 1 the dummy branch is not computed at all
            dummy = flow.condition(context(None, None, visible, visible_at, *asked))
        predict = Guided(flow, given, dummy, settings, done / positions, (done + count) / positions)
        found = solve(predict, gather(noise, now), flow.path, settings.num_flow_steps, settings.solver)
        found = found.to(patches.dtype)  # under autocast the network answers in bf16
        patches = patches.scatter(1, now[..., None].expand_as(found), found)
        done += count
    return patches
