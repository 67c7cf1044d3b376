"""Probability path, velocity network and ODE sampler (Eq. 1 to 3, 5, 7). t = 0 is data, t = 1 is noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow_cli.recipe.schema import Flow
from v2flow_cli.runtime.device import draw_noise
from v2flow_cli.tokenizer.decoder import ImageLossPlan

T_MIN = 0.05  # the loss weight 1 / t^2 is that of T_MIN below it


class ProbabilityPath:
    """z_t = alpha(t) data + sigma(t) noise.

    ``rectified_flow``: alpha = 1 - t, sigma = t (Eq. 2). ``ddim``: the variance-preserving cosine path of
    diffusion models, for the ablation of Table 3. Departs (D1): the paper's Eq. 2 names the point on the path u_t
    and Eq. 3 regresses u_t; what generates the path is its velocity, noise - data, and that is regressed here.
    """

    def __init__(self, formulation: str) -> None:
        self.formulation = formulation

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.formulation == "rectified_flow":
            return 1 - t, t
        return torch.cos(0.5 * math.pi * t), torch.sin(0.5 * math.pi * t)

    def point(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t for t of a shape that broadcasts with data."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * data + sigma * noise

    def velocity(self, z_t: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """The straight path's velocity noise - data, from a point and its data; needs t > 0."""
        return (z_t - data) / t

    def loss_weight(self, t: Tensor) -> Tensor:
        """Factor that turns a squared error of the data into one of the velocity (flow) or the noise (ddim)."""
        t = t.clamp_min(T_MIN)
        alpha, sigma = self.alpha_sigma(t)
        return 1 / t**2 if self.formulation == "rectified_flow" else (alpha / sigma) ** 2


def sample_times(count: int, shift: float, device: torch.device) -> Tensor:
    """Logit-normal times (count,) moved toward noise: t' = s t / (1 + (s - 1) t). Silent (S6): their distribution."""
    t = torch.sigmoid(torch.randn(count, device=device))
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Condition:
    """What all steps share at each position: see ``VelocityNetwork.condition``."""

    data_mean: Tensor  # (B, M, P): regression of the data from the context alone
    modulation: Tensor  # (B, M, depth * 3 * W + 2 * W)

    def joined(self, other: Condition) -> Condition:
        """Both conditions in one batch."""
        return Condition(torch.cat([self.data_mean, other.data_mean]), torch.cat([self.modulation, other.modulation]))


class VelocityNetwork(nn.Module):
    """A light AdaLN MLP on each position, conditioned on its context and on the time (section 2.3).

    It predicts the data as a linear regression of the context plus a residual that sees z_t; the velocity is
    (z_t - data) / t. Departs (D2): a network that predicts the data need not reproduce the noise, so it can be
    narrow, and one step from pure noise is the conditional mean. The modulation is a function of the context plus one
    of the time, so that sampling computes the first once per position and the second once per step.
    """

    def __init__(self, settings: Flow, context_size: int, patch_size: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.depth, self.width = settings.depth, width
        self.path = ProbabilityPath(settings.formulation)
        self.regress = nn.Linear(context_size, patch_size)
        self.embed = nn.Linear(patch_size, width)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        modulations = settings.depth * 3 * width + 2 * width
        self.modulate_context = nn.Linear(context_size, modulations)
        self.modulate_time = nn.Linear(width, modulations, bias=False)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(settings.depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(settings.depth))
        self.out = nn.Linear(width, patch_size)
        for layer in (self.modulate_context, self.modulate_time, self.out):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.modulate_context.bias)
        nn.init.zeros_(self.out.bias)

    def condition(self, context: Tensor) -> Condition:
        """The parts that depend on the context (B, M, W_ctx) alone."""
        return Condition(self.regress(context), self.modulate_context(F.silu(context)))

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predicted data (B, M, P) at z_t (B, M, P) and times t (B,)."""
        steps = self.modulate_time(self.time(time_features(t).to(z_t.dtype)))[:, None]
        parts = (condition.modulation + steps).split(self.width, dim=-1)
        x = self.embed(z_t)
        for i, (first, second) in enumerate(zip(self.first, self.second)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = F.layer_norm(x, (self.width,)) * (1 + scale) + shift
            x = x + gate * second(F.silu(first(h)))
        shift, scale = parts[-2:]
        return condition.data_mean + self.out(F.layer_norm(x, (self.width,)) * (1 + scale) + shift)

    def loss(
        self, data: Tensor, context: Tensor, settings: Flow, sampled: ImageLossPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(flow loss of Eq. 3, regression loss, predicted data) on patches (B, M, P); a time per image and repeat.

        The regression loss is the squared error of the context's linear prediction alone. The flow loss is that of
        a random ``share`` of the images (0 when there are none): this network costs as much as the context.
        The predicted data is that regression and, for the last ``sampled.count`` images, the result of sampling: the
        losses in pixels then apply to what ``decode`` returns, with gradients through all steps.
        """
        mean = self.regress(context).float()
        regression = F.mse_loss(mean, data.float())
        if not settings.share:  # a warm start by regression alone
            return regression.new_zeros(()), regression, mean
        predicted_data = mean
        if sampled.count:
            last = slice(len(data) - sampled.count, len(data))
            predicted_data = torch.cat([mean[: last.start], self._sample_data(data[last], context[last], sampled)])
        if settings.share < 1:
            chosen = torch.randperm(len(data), device=data.device)[: max(1, round(settings.share * len(data)))]
            data, context = data[chosen], context[chosen]
        condition = self.condition(context)
        # The residual has its own loss; without the detach it would pull the regression towards low noise.
        condition = Condition(condition.data_mean.detach(), condition.modulation)
        losses = []
        for _ in range(settings.repeats):
            t = sample_times(len(data), settings.time_shift, data.device)
            noise = draw_noise(data)
            z_t = self.path.point(data, noise, t[:, None, None])
            predicted = self(z_t.to(context.dtype), t, condition).float()
            error = (predicted - data.float()).square().mean((1, 2))
            losses.append((self.path.loss_weight(t) * error).mean())
        return torch.stack(losses).mean(), regression, predicted_data

    def _sample_data(self, data: Tensor, context: Tensor, plan: ImageLossPlan) -> Tensor:
        """Data of the shape of ``data`` (B, M, P), float32, sampled from noise, with gradients."""
        condition = self.condition(context)

        def predict(z: Tensor, t: float) -> Tensor:
            return self(z.to(context.dtype), torch.full((len(z),), t, device=z.device), condition).float()

        return solve(predict, plan.noise_like(data), self.path, plan.num_flow_steps, plan.solver)


TIME_FEATURES = 128


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines (B, 128) of times (B,) in [0, 1]."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(TIME_FEATURES // 2, device=t.device) / (TIME_FEATURES // 2)
    )
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


Predict = Callable[[Tensor, float], Tensor]  # (z_t, t) -> predicted data


def flow_times(steps: int) -> list[float]:
    """``steps + 1`` times from 1 (noise) to 0 (data), evenly spaced."""
    return [1 - k / steps for k in range(steps + 1)]


def solve(predict: Predict, noise: Tensor, path: ProbabilityPath, steps: int, solver: str) -> Tensor:
    """Integrate from ``noise`` at t = 1 to data at t = 0 in ``steps`` steps of ``solver``.

    ``euler`` and ``heun`` follow the velocity; ``ddim`` is its deterministic step on any path (on the straight
    path the same as Euler's); ``dpm++`` is DPM-Solver++(2M), arXiv 2211.01095, second order at one prediction a
    step. The last step of each is the predicted data, because log-SNR and 1 / t diverge at t = 0.
    Silent (S7): the solver, and the times between its steps.
    """
    times = flow_times(steps)
    z, previous = noise, None  # previous: (data, log-SNR) of the step before
    for t, s in itertools.pairwise(times):
        data = predict(z, t)
        if s == 0:
            return data
        if solver == "dpm++":
            z, previous = _dpm_step(z, data, previous, path, t, s)
        elif solver == "heun":
            slope = path.velocity(z, data, torch.tensor(t))
            ahead = z + (s - t) * slope
            slope_ahead = path.velocity(ahead, predict(ahead, s), torch.tensor(s))
            z = z + (s - t) * 0.5 * (slope + slope_ahead)
        else:
            z = _ddim_step(z, data, path, t, s)
    return z


def _ddim_step(z: Tensor, data: Tensor, path: ProbabilityPath, t: float, s: float) -> Tensor:
    """z_s on the line through the data and the noise that z_t implies; Euler's step on the straight path."""
    alpha_t, sigma_t = path.alpha_sigma(torch.tensor(t))
    noise = (z - alpha_t * data) / sigma_t
    alpha_s, sigma_s = path.alpha_sigma(torch.tensor(s))
    return alpha_s * data + sigma_s * noise


def _dpm_step(
    z: Tensor, data: Tensor, previous: tuple[Tensor, float] | None, path: ProbabilityPath, t: float, s: float
) -> tuple[Tensor, tuple[Tensor, float]]:
    log_snr_t, log_snr_s = _log_snr(path, t), _log_snr(path, s)
    estimate = data
    if previous is not None:
        earlier, log_snr_earlier = previous
        ratio = (log_snr_t - log_snr_earlier) / (log_snr_s - log_snr_t)
        estimate = data + (data - earlier) / (2 * ratio)
    _, sigma_t = path.alpha_sigma(torch.tensor(t))
    alpha_s, sigma_s = path.alpha_sigma(torch.tensor(s))
    z = (sigma_s / sigma_t) * z - alpha_s * math.expm1(-(log_snr_s - log_snr_t)) * estimate
    return z, (data, log_snr_t)


def _log_snr(path: ProbabilityPath, t: float) -> float:
    # At t = 1 alpha is 0, so the start is a time just below it, as in DPM-Solver's own clamp.
    alpha, sigma = path.alpha_sigma(torch.tensor(min(t, 1 - 1e-3), dtype=torch.float64))
    return math.log(alpha / sigma)
