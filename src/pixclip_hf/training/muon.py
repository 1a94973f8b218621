"""Muon for matrices, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

MOMENTUM = 0.95
# The quintic of Jordan et al. (2024): five rounds bring every singular value near 1, none to exactly 1.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ROUNDS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices with the singular vectors of `matrices` and singular values near 1, between about 0.7 and 1.2.

    In the precision that comes in: bfloat16, which `torch.optim.Muon` computes in, is 5 to 35 times slower where a CPU
    has to emulate it.

    Args:
        matrices (`(N, A, B)`): a matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrices.shape[-2] > matrices.shape[-1] else wide


class MuonAdamW(AdamW):
    """AdamW whose groups with `muon=True` are matrices, which step by Muon instead: along the momentum of their
    gradient, every direction of it at the same strength (Jordan et al. 2024), as far as AdamW goes on average, so that
    both share a learning rate and a decay (Liu et al. 2025, arXiv 2502.16982)."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        # Fused AdamW would unscale float16 gradients in its own step, which Muon's do not go through.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("muon"):
                self._step_matrices(group)
        super().step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            if (gradient := matrix.grad) is None:
                continue
            state = self.state[matrix]
            if not state:
                # Named as AdamW names its own, which reads every state that it loads.
                state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(matrix)
            state["step"] += 1
            state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
            by_shape[matrix.shape].append((matrix, gradient.lerp(state["exp_avg"], MOMENTUM)))
            matrix.grad = None  # AdamW leaves out what has no gradient
        for shape, pairs in by_shape.items():
            # Weights of an orthogonal A × B matrix are max(A, B) ** -0.5 on average, AdamW's steps 0.2 to 0.4 rates.
            distance = 0.2 * group["lr"] * max(shape) ** 0.5
            directions = orthogonalized(torch.stack([direction for _, direction in pairs]))
            for (matrix, _), direction in zip(pairs, directions, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=distance)
