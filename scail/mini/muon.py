"""Muon: the step of a matrix is its momentum with all singular values made one.

Small convolutional and transformer networks learn in about half the steps that AdamW needs. PyTorch's own class takes
matrices alone and one at a time; here kernels count as matrices (out, in · taps), and those of one shape are stepped
together, so that a small network's step is a few dozen launches.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the size of a step, 0.2 · √(longer side), by
which AdamW's learning rates fit, is from Liu et al. 2025, arXiv:2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
MIN_SIDE = 16  # thinner matrices, such as the convolution to three colours, are left to AdamW
_ITERATIONS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
               (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip


class Muon(Optimizer):
    """For matrices and kernels of at least two axes."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 torch's signature
        """Take one step by the gradients that are there."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[len(parameter), parameter[0].numel()].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_together(parameters, shape, group["lr"], group["weight_decay"])

    def _step_together(self, parameters: list[Tensor], shape: tuple[int, int], lr: float, weight_decay: float) -> None:
        gradients = torch.stack([_gradient(parameter).reshape(shape) for parameter in parameters])
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        state["momentum"].lerp_(gradients, 1 - MOMENTUM)
        directions = orthogonalised(gradients.lerp(state["momentum"], MOMENTUM))
        scale = lr * 0.2 * max(shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(
            parameters, [d.view_as(p) for d, p in zip(directions, parameters, strict=True)], alpha=-scale
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with singular values of about one and the singular vectors they had.

    Five iterations of Newton and Schulz with the coefficients of You et al., in bfloat16 where a GPU computes.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for a, b, c in _ITERATIONS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimisers(module: nn.Module, *, lr: float, weight_decay: float) -> list[Optimizer]:
    """Muon for what is a matrix, AdamW for norms, biases, tables and thin matrices."""
    parameters = list(module.parameters())
    matrices = [p for p in parameters if p.ndim >= 2 and min(len(p), p[0].numel()) >= MIN_SIDE and len(p) > 1]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in known]
    optimisers: list[Optimizer] = [Muon(matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
    if others:
        optimisers.append(AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, foreach=True))
    return optimisers


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
