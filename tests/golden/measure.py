"""One number per check: how far ours is from the official code, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """`error` of `what` in `case`; the check passes when it is at most `limit`."""

    case: str
    what: str
    error: float
    limit: float

    @property
    def passes(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        return f"{self.case:<10} {self.what:<28} {self.error:.3g} (limit {self.limit:g})"


def max_abs(case: str, what: str, ours: Tensor, theirs: Tensor, limit: float) -> Measured:
    """The largest absolute difference; another shape is an infinite one."""
    if ours.shape != theirs.shape:
        return Measured(f"{case}", f"{what} shape {tuple(ours.shape)} for {tuple(theirs.shape)}", float("inf"), limit)
    difference = (ours.to(torch.float64) - theirs.to(torch.float64)).abs()
    return Measured(case, what, float(difference.max()), limit)
