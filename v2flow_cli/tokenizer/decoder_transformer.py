"""One transformer for the velocity of all patches at once: the decoder of FlexTok (arXiv 2502.13967)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import FlowTransformer, Sampling, TokenizerLoss
from v2flow_cli.tokenizer.context import Block, RotaryPositions, nearby, sines
from v2flow_cli.tokenizer.decoder import DecoderLosses, Drawn, Places, StepPlan
from v2flow_cli.tokenizer.flow import TIME_FEATURES, ProbabilityPath, sample_times, solve, time_features
from v2flow_cli.tokenizer.guidance import Guided
from v2flow_cli.tokenizer.prefix import TokenEmbedding


@dataclass(frozen=True)
class Memory:
    """What is the same at every step: tokens (B, n, W), and the angles (B, 1, n + N, head_size / 2) of everything."""

    tokens: Tensor
    angles: Tensor
    start: Tensor  # (B, N, W): what the tokens near each patch say

    def __getitem__(self, index: Tensor) -> Memory:
        return Memory(self.tokens[index], self.angles[index], self.start[index])

    def joined(self, other: Memory) -> Memory:
        """Both memories in one batch."""
        pairs = ((self.tokens, other.tokens), (self.angles, other.angles), (self.start, other.start))
        return Memory(*(torch.cat(pair) for pair in pairs))


class TimedBlock(nn.Module):
    """A block whose patches read tokens and patches, with its norms and branches scaled by the time (AdaLN-zero)."""

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

    It predicts the data as c z_t + s F(c z_t, t, tokens), where c z_t is the best guess of unit-variance data from z_t
    alone and s the error that guess leaves (arXiv 2206.00364). So F is at one scale at all times, and one step
    from pure noise, where c is 0, is the conditional mean whatever the noise.

    Departs (F2, F3): in FlexTok the tokens pass through every block together with the patches and are modulated by
    the time. Here they pass through blocks of their own that know no time, once an image, and each block of the
    patches reads the result: sampling then computes half the positions at each step. And a patch starts from the mean
    of the tokens near it (of all kept ones, where tokens have no places), so that it need not learn where to look.
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

    def memory(self, tokens: Tensor, lengths: Tensor | None, places: Places, dropped: int = 0) -> Memory:
        """The condition of tokens (B, n, D); the first ``dropped`` images see D instead."""
        middle = places.patches.float().mean(1, keepdim=True)
        angles = self.positions(torch.cat([places.tokens, places.patches], dim=1) - middle)
        x = self.embed_token(tokens, lengths)
        count = x.shape[1]
        x = x + self.place(sines(angles[:, :, :count]).to(x.dtype))
        x = torch.cat([self.dummy_token.to(x.dtype).expand(dropped, *x.shape[1:]), x[dropped:]])
        for block in self.token_blocks:
            x = block(x, angles[:, :, :count], count)
        x = self.norm_tokens(x)
        kept = torch.full((len(x),), count, device=x.device) if lengths is None else lengths
        known = torch.arange(count, device=x.device) < kept[:, None]
        start = nearby(x, places.tokens, places.patches, places.patches.shape[1] / kept, known)
        return Memory(x, angles, start)

    def forward(self, z_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Predicted data (B, N, P) at z_t (B, N, P) and times t (B,)."""
        alpha, sigma = (x[:, None, None].to(z_t.dtype) for x in self.path.alpha_sigma(t))
        power = alpha**2 + sigma**2
        guess = alpha / power * z_t
        parts = self.modulate(self.time(time_features(t).to(z_t.dtype)))[:, None].split(self.width, dim=-1)
        places = memory.angles[:, :, memory.tokens.shape[1] :]
        x = self.embed(guess) + self.place(sines(places).to(z_t.dtype)) + memory.start
        for i, block in enumerate(self.blocks):
            x = block(x, memory, parts[6 * i : 6 * i + 6])
        x = F.layer_norm(x, (self.width,)) * (1 + parts[-1]) + parts[-2]
        return guess + sigma / power.sqrt() * self.out(x)

    def losses(
        self,
        patches: Tensor,
        tokens: Tensor,
        lengths: Tensor | None,
        places: Places,
        loss: TokenizerLoss,
        plan: StepPlan,
    ) -> DecoderLosses:
        """The flow loss is that of random times, the regression loss the squared error of the data at t = 1."""
        batch, drawn = len(patches), plan.drawn
        memory = self.memory(tokens, lengths, places, plan.dropped)
        regression, mean = patches.new_zeros(()), patches
        if loss.regression or drawn.count:
            mean = self._predict(patches, torch.ones(batch, device=patches.device), memory)
            regression = F.mse_loss(mean, patches.float())
        if drawn.noise_temperature or drawn.num_flow_steps > 1:  # one step is the mean whatever the noise
            few = torch.arange(batch - drawn.count, batch, device=patches.device)
            mean = torch.cat([mean[: -drawn.count], self._draw(drawn.noise_like(patches[few]), memory[few], drawn)])
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

    def _draw(self, noise: Tensor, memory: Memory, drawn: Drawn) -> Tensor:
        """The data (B, N, P), float32, that ``decode`` finds from ``noise``, with gradients."""

        def predict(z: Tensor, t: float) -> Tensor:
            return self(z.to(memory.tokens.dtype), torch.full((len(z),), t, device=z.device), memory).float()

        return solve(predict, noise, self.path, drawn.num_flow_steps, drawn.solver)

    def _predict(self, data: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """The data (B, N, P), float32, predicted from a point on the path at times t (B,)."""
        z_t = self.path.point(data, torch.randn_like(data), t[:, None, None])
        return self(z_t.to(memory.tokens.dtype), t, memory).float()

    def sample(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        places: Places,
        noise: Tensor,
        seeds: Sequence[int],
        settings: Sampling,
    ) -> Tensor:
        """Patches (B, N, P) from ``noise``: one ODE for the whole image.  Raises: ModelError for several rounds."""
        if settings.num_mask_steps != 1:
            raise ModelError(
                f"{settings.num_mask_steps} rounds, but this tokenizer's flow transformer draws all patches at once; "
                "use 1 round and more steps."
            )
        given, dummy = self.memory(tokens, lengths, places), None
        if settings.guidance_scale != 1:  # at 1 the dummy branch is not computed at all
            dummy = self.memory(tokens, lengths, places, dropped=len(tokens))
        predict = Guided(self, given, dummy, settings)
        return solve(predict, noise, self.path, settings.num_flow_steps, settings.solver).to(noise.dtype)
