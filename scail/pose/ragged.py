"""Lists of different lengths laid end to end: what capsules, spans and their pixels are to a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def ranges(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Owner and position of every element of ranges of the given lengths, laid end to end."""
    owner = torch.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner), device=lengths.device) - first[owner]


def pieces(lengths: Tensor, budget: int) -> Iterator[slice]:
    """Slices of consecutive lists that hold about `budget` elements together."""
    total = lengths.cumsum(0)
    num_pixels = int(total[-1]) if len(total) else 0
    limits = torch.arange(0, num_pixels + budget, budget, device=lengths.device)
    borders = torch.searchsorted(total, limits).tolist()
    for start, stop in zip(borders, [*borders[1:], len(total)], strict=True):
        if start < stop:
            yield slice(start, stop)
