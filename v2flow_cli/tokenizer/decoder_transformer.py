"""One transformer for the velocity of all patches at once: the decoder of FlexTok (arXiv 2502.13967)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import FlowTransformer, Sampling, TokenizerLoss
from v2flow_cli.runtime.device import draw_noise
from v2flow_cli.tokenizer.context import Block, RotaryPositions, nearby, sines
from v2flow_cli.tokenizer.decoder import DecoderLosses, ImageLossPlan, StepPlan, TokenInput, count_dropped
from v2flow_cli.tokenizer.flow import TIME_FEATURES, ProbabilityPath, sample_times, solve, time_features
from v2flow_cli.tokenizer.guidance import Guided
from v2flow_cli.tokenizer.prefix import TokenEmbedding


@dataclass(frozen=True)
class Memory:
    """What all steps share: encoded tokens (B, n, W), and the angles (B, 1, n + N, head_size / 2) of all positions."""

    tokens: Tensor
    angles: Tensor
    start: Tensor  # (B, N, W): mean of the tokens near each patch

    def __getitem__(self, index: Tensor) -> Memory:
        return Memory(self.tokens[index], self.angles[index], self.start[index])

    def joined(self, other: Memory) -> Memory:
        """Both memories in one batch."""
        pairs = ((self.tokens, other.tokens), (self.angles, other.angles), (self.start, other.start))
        return Memory(*(torch.cat(pair) for pair in pairs))


class TimedBlock(nn.Module):
    """A block in which patches attend to tokens and patches; the time scales its norms and branches (AdaLN-zero)."""

    def __init__(self, settings: FlowTransformer) -> None:
        super().__init__()
        self.block = Block(settings)

    def forward(self, x: Tensor, memory: Memory, parts: Sequence[Tensor]) -> Tensor:
        """Patches (B, N, W) -> (B, N, W); ``parts``, six tensors (B, 1, W): shift, scale and gate of each branch."""
        block, count = self.block, memory.tokens.shape[1]
        h = torch.cat([memory.tokens, block.norm_attention(x) * (1 + parts[1]) + parts[0]], dim=1)
        x = x + parts[2] * block.drop(block.attend(h, memory.angles, h.shape[1], skip=count))
        h = block.norm_mlp(x) * (1 + parts[4]) + parts[3]
        return x + parts[5] * block.drop(block.mlp(h))


class VelocityTransformer(nn.Module):
    """Rectified flow over all latent patches of an image, conditioned on its tokens.

    It predicts the data as c z_t + s F(c z_t, t, tokens), where c z_t is the best estimate of unit-variance data from
    z_t alone and s the error of that estimate (arXiv 2206.00364). F then has one scale at all times, and one step from
    pure noise, where c is 0, is the conditional mean for any noise.

    Departs (F2, F3): in FlexTok the tokens pass through every block together with the patches and are modulated by
    the time. Here they pass once an image through separate blocks without the time, and each block of the patches
    attends to the result: sampling then computes half the positions at each step. A patch starts from the mean of the
    tokens near it (of all kept tokens if they have no positions), so that it need not learn which token to attend to.
    """

    def __init__(self, settings: FlowTransformer, token_size: int, patch_size: int, max_tokens: int = 0) -> None:
        super().__init__()
        width, head_size = settings.hidden_size, settings.hidden_size // settings.num_heads
        self.settings, self.width = settings, width
        self.path = ProbabilityPath(settings.formulation)
        self.embed_token = TokenEmbedding(token_size, width, max_tokens)
        self.dummy_token = nn.Parameter(0.02 * torch.randn(width))  # D of Eq. 7, in every token's place
        self.positions = RotaryPositions(head_size)
        self.token_blocks = nn.ModuleList(Block(settings) for _ in range(settings.token_depth))
        self.norm_tokens = nn.LayerNorm(width)
        self.embed, self.place = nn.Linear(patch_size, width), nn.Linear(head_size, width)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(TimedBlock(settings) for _ in range(settings.depth))
        self.modulate = nn.Linear(width, (6 * settings.depth + 2) * width)
        self.out = nn.Linear(width, patch_size)
        for layer in (self.modulate, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def memory(self, inputs: TokenInput, dropped: int = 0) -> Memory:
        """The condition of a batch; its first ``dropped`` images see D instead of their tokens."""
        layout = inputs.layout
        centre = layout.patches.float().mean(1, keepdim=True)
        angles = self.positions(torch.cat([layout.tokens, layout.patches], dim=1) - centre)
        x = self.embed_token(inputs.vectors, inputs.lengths)
        count = x.shape[1]
        x = x + self.place(sines(angles[:, :, :count]).to(x.dtype))
        x = torch.cat([self.dummy_token.to(x.dtype).expand(dropped, *x.shape[1:]), x[dropped:]])
        for block in self.token_blocks:
            x = block(x, angles[:, :, :count], count)
        x = self.norm_tokens(x)
        lengths = torch.full((len(x),), count, device=x.device) if inputs.lengths is None else inputs.lengths
        known = torch.arange(count, device=x.device) < lengths[:, None]
        start = nearby(x, layout.tokens, layout.patches, layout.patches.shape[1] / lengths, known)
        return Memory(x, angles, start)

    def forward(self, z_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Predicted data (B, N, P) at z_t (B, N, P) and times t (B,)."""
        alpha, sigma = (x[:, None, None].to(z_t.dtype) for x in self.path.alpha_sigma(t))
        power = alpha**2 + sigma**2
        estimate = alpha / power * z_t
        parts = self.modulate(self.time(time_features(t).to(z_t.dtype)))[:, None].split(self.width, dim=-1)
        angles = memory.angles[:, :, memory.tokens.shape[1] :]
        x = self.embed(estimate) + self.place(sines(angles).to(z_t.dtype)) + memory.start
        for i, block in enumerate(self.blocks):
            x = block(x, memory, parts[6 * i : 6 * i + 6])
        x = F.layer_norm(x, (self.width,)) * (1 + parts[-1]) + parts[-2]
        return estimate + sigma / power.sqrt() * self.out(x)

    def plan(
        self, u: float, v: float, batch: int, positions: int, loss: TokenizerLoss, sampling: Sampling, coarse: bool
    ) -> tuple[int, int]:
        """No patch is hidden."""
        return 0, count_dropped(loss.guidance_dropout, batch, v)

    def losses(self, patches: Tensor, inputs: TokenInput, loss: TokenizerLoss, plan: StepPlan) -> DecoderLosses:
        """The flow loss is that of random times, the regression loss the squared error of the data at t = 1."""
        batch, sampled = len(patches), plan.image_losses
        memory = self.memory(inputs, plan.dropped)
        regression, mean = patches.new_zeros(()), patches
        if loss.regression or sampled.count:
            mean = self._predict(patches, torch.ones(batch, device=patches.device), memory)
            regression = F.mse_loss(mean, patches.float())
        if sampled.noise_temperature or sampled.num_flow_steps > 1:  # one step is the mean for any noise
            last = torch.arange(batch - sampled.count, batch, device=patches.device)
            data = self._sample_data(sampled.noise_like(patches[last]), memory[last], sampled)
            mean = torch.cat([mean[: -sampled.count], data])
        if not self.settings.share:  # a warm start by regression alone
            return DecoderLosses(patches.new_zeros(()), regression, mean)
        chosen = torch.randperm(batch, device=patches.device)[: max(1, round(self.settings.share * batch))]
        data, memory = patches[chosen], memory[chosen]
        flow_losses = []
        for _ in range(self.settings.repeats):
            t = sample_times(len(data), self.settings.time_shift, data.device)
            error = (self._predict(data, t, memory) - data.float()).square().mean((1, 2))
            flow_losses.append((self.path.loss_weight(t) * error).mean())
        return DecoderLosses(torch.stack(flow_losses).mean(), regression, mean)

    def _sample_data(self, noise: Tensor, memory: Memory, plan: ImageLossPlan) -> Tensor:
        """The data (B, N, P), float32, that ``decode`` samples from ``noise``, with gradients."""

        def predict(z: Tensor, t: float) -> Tensor:
            return self(z.to(memory.tokens.dtype), torch.full((len(z),), t, device=z.device), memory).float()

        return solve(predict, noise, self.path, plan.num_flow_steps, plan.solver)

    def _predict(self, data: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """The data (B, N, P), float32, predicted from a point on the path at times t (B,)."""
        z_t = self.path.point(data, draw_noise(data), t[:, None, None])
        return self(z_t.to(memory.tokens.dtype), t, memory).float()

    def sample(self, inputs: TokenInput, noise: Tensor, seeds: Sequence[int], settings: Sampling) -> Tensor:
        """Patches (B, N, P) from ``noise``: one ODE for the whole image.  Raises: ModelError for several rounds."""
        if settings.num_mask_steps != 1:
            raise ModelError(
                f"{settings.num_mask_steps} rounds, but this tokenizer's flow transformer draws all patches at once; "
                "use 1 round and more steps."
            )
        memory, dummy = self.memory(inputs), None
        if settings.guidance_scale != 1:  # at 1 the dummy branch is not computed
            dummy = self.memory(inputs, dropped=len(noise))
        predict = Guided(self, memory, dummy, settings)
        return solve(predict, noise, self.path, settings.num_flow_steps, settings.solver).to(noise.dtype)
