"""Attention: the one seam through which every softmax of the transformer goes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention without a mask.

    Args:
        query: (B, L, heads, head_size).
        key: (B or 1, M, heads, head_size); one key for a whole batch is shared.
        value: As `key`.

    Returns:
        (B, L, heads, head_size).
    """
    key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)
