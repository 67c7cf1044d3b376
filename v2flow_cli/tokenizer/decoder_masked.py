"""The paper's decoder: masked transformer and per-patch flow (section 2.3), sampled in rounds (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v2flow_cli.recipe.schema import Context, Flow, Sampling, TokenizerLoss
from v2flow_cli.tokenizer.context import MaskedTransformer
from v2flow_cli.tokenizer.decoder import DecoderLosses, StepPlan, TokenInput, count_dropped
from v2flow_cli.tokenizer.flow import VelocityNetwork, solve
from v2flow_cli.tokenizer.guidance import Guided
from v2flow_cli.tokenizer.masking import (
    gather,
    hidden_patches,
    mask_ratio,
    random_orders,
    reveal_schedule,
    seeded_orders,
)


class MaskedDecoder:
    """Masked autoregressive flow: context of the hidden patches, then a flow on each of them."""

    def __init__(
        self, context: MaskedTransformer, flow: VelocityNetwork, context_settings: Context, flow_settings: Flow
    ) -> None:
        self.context, self.flow = context, flow
        self.context_settings, self.flow_settings = context_settings, flow_settings

    def plan(
        self, u: float, v: float, batch: int, positions: int, loss: TokenizerLoss, sampling: Sampling, coarse: bool
    ) -> tuple[int, int]:
        """Without guidance no image sees D: those images would need a separate pass through the context."""
        ratio = mask_ratio(self.context_settings.mask_ratio_min, self.context_settings.mask_ratio_std, u)
        share = loss.guidance_dropout if sampling.guidance_scale != 1 else 0.0
        return hidden_patches(ratio, positions, coarse), count_dropped(share, batch, v)

    def losses(self, patches: Tensor, inputs: TokenInput, loss: TokenizerLoss, plan: StepPlan) -> DecoderLosses:
        """Source: section 2.3."""
        batch, positions, _ = patches.shape
        layout = inputs.layout
        order = random_orders(batch, positions, patches.device)
        hidden, visible = order[:, : plan.hidden], order[:, plan.hidden :]
        columns = (gather(patches, visible), gather(layout.patches, visible), gather(layout.patches, hidden))
        token_index, part_index = layout.token_index.gather(1, hidden), layout.part_index.gather(1, hidden)
        # D is one token, not n copies, so the images that see it form a batch of their own.
        contexts = []
        for rows, with_tokens in ((slice(0, plan.dropped), False), (slice(plan.dropped, batch), True)):
            if rows.start < rows.stop:
                tokens = (inputs.vectors[rows], layout.tokens[rows]) if with_tokens else (None, None)
                lengths = None if inputs.lengths is None else inputs.lengths[rows]
                args = (*tokens, *(x[rows] for x in columns), token_index[rows], lengths, part_index[rows])
                contexts.append(self.context(*args, layout.rate))
        flow, regression, predicted = self.flow.loss(
            gather(patches, hidden), torch.cat(contexts), self.flow_settings, plan.image_losses
        )
        index = hidden[..., None].expand(-1, -1, patches.shape[-1])
        return DecoderLosses(flow, regression, patches.scatter(1, index, predicted.to(patches.dtype)))

    def sample(self, inputs: TokenInput, noise: Tensor, seeds: Sequence[int], settings: Sampling) -> Tensor:
        """Source: Algorithm 1."""
        positions, layout = noise.shape[1], inputs.layout
        orders = seeded_orders(seeds, positions, noise.device)
        patches = torch.zeros_like(noise)
        start = 0
        for count in reveal_schedule(positions, settings.num_mask_steps):
            end = start + count
            visible, hidden = orders[:, :start], orders[:, start:end]
            args = (
                *(gather(patches, visible), gather(layout.patches, visible), gather(layout.patches, hidden)),
                layout.token_index.gather(1, hidden),
            )
            part_index = layout.part_index.gather(1, hidden)
            context = self.context(inputs.vectors, layout.tokens, *args, inputs.lengths, part_index, layout.rate)
            condition, dummy = self.flow.condition(context), None
            if settings.guidance_scale != 1:  # at 1 the dummy branch is not computed
                dummy = self.flow.condition(self.context(None, None, *args))
            predict = Guided(self.flow, condition, dummy, settings, start / positions, end / positions)
            data = solve(predict, gather(noise, hidden), self.flow.path, settings.num_flow_steps, settings.solver)
            data = data.to(patches.dtype)  # under autocast the network returns bf16
            patches = patches.scatter(1, hidden[..., None].expand_as(data), data)
            start = end
        return patches
