"""Where weights are."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def ensure_on(module: nn.Module, device: torch.device) -> None:
    """Move `module` to `device` unless all of it is there.

    Networks call it with the device of their input, so that weights which were put aside to save memory cannot meet
    an input on another device.
    """
    if any(tensor.device != device for tensor in chain(module.parameters(), module.buffers())):
        module.to(device)
