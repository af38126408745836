"""Drawn examples in the device's memory, renewed bit by bit: drawing one costs more than a step learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Draw = Callable[[int, int], Sequence[Tensor]]  # a seed and a number of examples → their values, each (num, ...)


class Renewal:
    """`num_slots` examples; the oldest are renewed first.

    Attributes:
        values: One tensor (num_slots, ...) for each that `draw` returns; changed in place.
        next_slot: Where the oldest example is.
    """

    def __init__(self, num_slots: int, seed: tuple[int, ...], draw: Draw, *, drawn_together: int) -> None:
        self.num_slots, self.seed = num_slots, seed
        self.num_drawn, self.next_slot = 0, 0
        self._draw_examples = draw
        parts = [self._draw(min(drawn_together, num_slots - n)) for n in range(0, num_slots, drawn_together)]
        self.values = tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def renew(self, num: int) -> None:
        """Draw new examples in place of the oldest; no more than there are up to the last slot."""
        num = min(num, self.num_slots - self.next_slot)
        for values, new in zip(self.values, self._draw(num), strict=True):
            values[self.next_slot : self.next_slot + num] = new
        self.next_slot = (self.next_slot + num) % self.num_slots

    @torch.no_grad()
    def _draw(self, num: int) -> Sequence[Tensor]:
        seed = int(np.random.SeedSequence((*self.seed, self.num_drawn)).generate_state(1)[0])
        self.num_drawn += num
        return self._draw_examples(seed, num)
