"""Muon, for tokenizers, autoencoders and language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ADAMW_RMS = 0.2  # of AdamW's steps, in learning rates
CACHED = 2**18  # numbers that a CPU multiplies at a time: the products of larger stacks leave its cache
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5, steepest at 0


class Muon(torch.optim.AdamW):
    """AdamW, but parameters of groups marked ``orthogonal`` take steps along their orthogonalised momentum.

    All directions of a matrix then move equally far, not only the few in which gradients agree. A step has the root
    mean square of a typical AdamW step, so that the same learning rate suits both. Kernels (O, I, h, w) are treated as
    matrices (O, I h w), stacks (E, O, I) as E matrices. torch's own Muon is only for matrices and always multiplies in
    bfloat16, which is nine times slower on CPUs without that type.

    Source: K. Jordan, kellerjordan.github.io/posts/muon; the step's length, arXiv 2502.16982, section 2.2.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:  # it computes the gradients
            with torch.enable_grad():
                loss = closure()
        gradients: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            matrices: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"] if group.get("orthogonal") else ():
                if parameter.grad is not None:
                    matrices.setdefault(_as_matrices(parameter).shape, []).append(parameter)
            for alike in matrices.values():
                self._move(alike, group["lr"], group["weight_decay"])
                for parameter in alike:  # AdamW skips parameters without a gradient
                    gradients[parameter], parameter.grad = cast(Tensor, parameter.grad), None
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _move(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        """One step of parameters of one shape, stacked: a few large products instead of many small ones."""
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] = torch.zeros(())  # AdamW reads it in every state that it loads
        states = [self.state[parameter] for parameter in parameters]
        momenta = [state["momentum"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        bad = getattr(self, "found_inf", None)  # as in torch's fused optimizers: 1 means no change
        before = [x.clone() for x in (*momenta, *parameters)] if bad is not None else []
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        stack = torch.stack([_as_matrices(x) for x in ahead])
        directions = orthogonalize(stack) * (ADAMW_RMS * max(stack.shape[-2:]) ** 0.5)
        weights: list[Tensor] = [*parameters]
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_add_(weights, [d.reshape(p.shape) for d, p in zip(directions, parameters)], alpha=-rate)
        for now, old in zip((*momenta, *parameters), before):
            now.copy_(torch.where(cast(Tensor, bad) > 0, old, now))


def _as_matrices(x: Tensor) -> Tensor:
    return x.flatten(1) if x.ndim == 4 else x


def copies_kept(optimizer: torch.optim.AdamW, group: dict[str, Any]) -> int:
    """How many numbers the optimizer stores for each parameter of a group."""
    return 1 if isinstance(optimizer, Muon) and group.get("orthogonal") else 2


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of matrices U S V^T (..., O, I): singular values become 0.7 to 1.2, with matrix products only.

    In bfloat16 on GPUs, with singular values of 0.5 to 1.3. On a CPU with AMX, products of these sizes take 1.7 times
    as long in bfloat16 as in float32.
    """
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    if matrices.is_cuda:
        stack = _newton_schulz(stack.to(torch.bfloat16))
    else:
        stack = torch.cat([_newton_schulz(part) for part in stack.split(max(1, CACHED // stack[0].numel()))])
    return stack.reshape(matrices.shape).to(matrices.dtype)


def _newton_schulz(matrices: Tensor) -> Tensor:
    """``orthogonalize`` of (B, O, I)."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
