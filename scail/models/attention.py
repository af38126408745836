"""Attention: the one seam through which every softmax of the transformer goes.

A backend is chosen once, when a model is loaded, and recorded with every clip. Each has to pass a check on this very
device before it is used: black videos from an attention kernel that fails in silence are a known trouble.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scail.kernels import qk_norm_rotary, qk_norm_rotary_float8, reference, token_range
from scail.kernels.reference import FLOAT8, FLOAT8_MAX, TINY, mix_quarters

logger = logging.getLogger(__name__)

# query (B, L, heads, head_size), key and value (B, M, heads, head_size) → (B, L, heads, head_size)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class QkNorm:
    """What queries and keys of a self-attention pass before they meet; see `scail.kernels.qk_norm_rotary`."""

    weight_q: Tensor
    weight_k: Tensor
    cos: Tensor
    sin: Tensor
    head_size: int
    eps: float


# queries, keys and values side by side, what the first two pass, the tokens that are wanted → two parts of the result,
# (B, L, heads, head_size) and (B, 1, heads, head_size), which whoever reads them adds
AttentionOfQkv = Callable[[Tensor, QkNorm, slice | None], tuple[Tensor, Tensor]]

MAX_RELATIVE_ERROR = 0.01  # of a backend in bfloat16 against float32; bfloat16's own rounding makes 0.003
MAX_FLOAT8_ERROR = 0.08  # of one in float8, whose rounding makes 0.05

_SOME_TOKENS = 2048
_FLOAT8_HEAD_MULTIPLE = 16  # of FlashAttention-3's head sizes in float8


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own choice of kernel. Runs everywhere and is what the others are held against."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's fused attention, by PyTorch."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return sdpa(query, key, value)


@torch.library.custom_op("scail::flash_attention_3", mutates_args=())
def flash_attention_3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention-3, of the wheel `fa3-fwd`: Hopper only, half precision only.

    A custom operator, so that the compiler sees one node where the wheel would break its graph.
    """
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(query, key, value)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@flash_attention_3.register_fake
def _(query: Tensor, _key: Tensor, _value: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def flash_attention_3_float8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention-3 in float8, with a scale for each head, on keys and values without their mean.

    A softmax does not see what all keys have in common, and what all values have in common passes it unchanged; so
    both are taken out before the rounding, and the values' mean is added again, exactly. Large channels of queries and
    keys are spread over four, which changes no product of theirs and rounds less (`mix_quarters`).
    """
    head_size = query.shape[-1]
    query, key = mix_quarters(query.float()), mix_quarters(key.float())
    query_scale = query.abs().amax(dim=(1, 3)).float().clamp(min=TINY) / FLOAT8_MAX
    (key_mean, key_scale), (value_mean, value_scale) = _mean_and_scale(key), _mean_and_scale(value)
    out = _flash_attention_3_float8(
        _to_float8(query, query_scale),
        _to_float8(key - key_mean, key_scale),
        _to_float8(value.float() - value_mean, value_scale),
        query_scale,
        key_scale,
        value_scale,
        head_size**-0.5,
    )
    return (out[..., :head_size] + value_mean).to(value.dtype)


def flash_attention_3_float8_of_qkv(qkv: Tensor, norm: QkNorm, span: slice | None) -> tuple[Tensor, Tensor]:
    """`flash_attention_3_float8` of queries, keys and values side by side; the former two are written in float8 only.

    No pass over them is needed to learn how large they are: after a norm over all heads, no pair of numbers, rotated
    or not, is longer than the square root of the hidden size, times the largest weight of the norm. Numbers that are
    far smaller than this bound lose nothing, as float8 has a point that floats; and mixing makes none larger than the
    bound. What is taken from all keys may be anything that they have in common: the mean of some of them serves.

    Args:
        qkv: (B, L, 3 · D), side by side.
        norm: What queries and keys pass first.
        span: Tokens whose queries are wanted; all are attended to.

    Returns:
        (B, L, heads, head_size), and the values' mean, float32 (B, 1, heads, head_size), which is to be added to it.
    """
    head_size = norm.head_size
    bounds = [
        math.sqrt(len(weight)) * weight.float().view(-1, head_size).abs().amax(dim=1).clamp(min=TINY) / FLOAT8_MAX
        for weight in (norm.weight_q, norm.weight_k)
    ]
    scales_q, scales_k = bounds[0], 2 * bounds[1]  # a key without its mean
    key_mean = _some_keys(qkv, norm).float().mean(dim=1)
    query, key = qk_norm_rotary_float8(
        qkv,
        norm.weight_q,
        norm.weight_k,
        norm.cos,
        norm.sin,
        key_mean=key_mean,
        scales_q=scales_q,
        scales_k=scales_k,
        eps=norm.eps,
    )
    value = rearrange(qkv.chunk(3, dim=-1)[2], "b l (heads d) -> b l heads d", d=head_size)
    value_mean, value_scale = _mean_and_scale(value)
    out = _flash_attention_3_float8(
        _filled_up(query if span is None else query[:, span]),
        _filled_up(key),
        _to_float8(value.float() - value_mean, value_scale),
        scales_q.expand(len(qkv), -1).contiguous(),
        scales_k.expand(len(qkv), -1).contiguous(),
        value_scale,
        head_size**-0.5,
    )
    return out[..., :head_size], value_mean


def _some_keys(qkv: Tensor, norm: QkNorm) -> Tensor:
    """Keys of a few thousand tokens, evenly over the clip, or of all."""
    every = max(1, qkv.shape[1] // _SOME_TOKENS)
    _, key = qk_norm_rotary(
        qkv[:, ::every].contiguous(),
        norm.weight_q,
        norm.weight_k,
        norm.cos[::every].contiguous(),
        norm.sin[::every].contiguous(),
        head_size=norm.head_size,
        eps=norm.eps,
    )
    return key


def _filled_up(x: Tensor) -> Tensor:
    """float8 with the head size filled up with zeros as the kernel wants it."""
    missing = -x.shape[-1] % _FLOAT8_HEAD_MULTIPLE
    return F.pad(x.view(torch.uint8), (0, missing)).view(FLOAT8) if missing else x


def _mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of all tokens, float32 (B, 1, heads, head_size), and the scale of what is left of each head (B, heads).

    How far the smallest and the largest are from the mean needs no second pass over the tokens.
    """
    mean, smallest, largest = (part.view(-1, 1, *x.shape[2:]) for part in token_range(x.flatten(-2)))
    return mean, torch.maximum(largest - mean, mean - smallest).amax(dim=(1, 3)).clamp(min=TINY) / FLOAT8_MAX


def _to_float8(x: Tensor, scales: Tensor) -> Tensor:
    """float8 (B, L, heads, head_size), filled up."""
    return _filled_up((x / scales[:, None, :, None]).to(FLOAT8))


@torch.library.custom_op("scail::flash_attention_3_float8", mutates_args=())
def _flash_attention_3_float8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    softmax_scale: float,
) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(
        query,
        key,
        value,
        softmax_scale=softmax_scale,
        q_descale=query_scale,
        k_descale=key_scale,
        v_descale=value_scale,
    )
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@_flash_attention_3_float8.register_fake
def _(query: Tensor, *_others: Tensor | float) -> Tensor:
    return torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)


EXACT: dict[str, Attention] = {"flash_attention_3": flash_attention_3, "cudnn": cudnn, "sdpa": sdpa}  # best first
FLOAT8_BACKENDS: dict[str, Attention] = {"flash_attention_3_float8": flash_attention_3_float8}  # likewise
BACKENDS = EXACT | FLOAT8_BACKENDS
OF_QKV: dict[str, AttentionOfQkv] = {"flash_attention_3_float8": flash_attention_3_float8_of_qkv}  # for self-attention
CROSS_ATTENTION = {"flash_attention_3_float8": "flash_attention_3"}  # few keys: nothing to win, so nothing to lose


def choose_attention(device: torch.device, dtype: torch.dtype, wanted: str | None = None) -> str:
    """The name of the first backend that is installed, fits the device and passes its check there.

    Args:
        device: Where the model runs.
        dtype: Of its activations.
        wanted: A backend, or `float8` for the fastest in that precision, to be taken before the exact ones, which
            come in the order of their speed.
    """
    preferred = FLOAT8_BACKENDS if wanted == "float8" else [] if wanted is None else [wanted]
    chosen = next(
        name for name in (*preferred, *EXACT) if name == "sdpa" or (fits(name, device, dtype) and passes(name, device))
    )
    if preferred and chosen not in preferred:
        logger.warning("attention %s cannot be had on %s in %s: %s instead", wanted, device, dtype, chosen)
    return chosen


def fits(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend is installed and made for this device and dtype."""
    if name == "sdpa":
        return True
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if name.startswith("flash_attention_3"):
        return find_spec("fa3_fwd_interface") is not None and torch.cuda.get_device_capability(device)[0] == 9
    return torch.cuda.get_device_capability(device)[0] >= 8


@cache
def passes(name: str, device: torch.device) -> bool:
    """Hold a backend against float32 on this device, at lengths that are no multiple of a tile."""
    try:
        error = relative_error(name, device)
    except Exception as failure:  # noqa: BLE001  # whatever a foreign kernel raises, there is a next backend
        warnings.warn(f"attention backend {name} failed on {device}: {failure}", stacklevel=2)
        return False
    limit = MAX_FLOAT8_ERROR if name in FLOAT8_BACKENDS else MAX_RELATIVE_ERROR
    if not error <= limit:  # also when it is not a number
        warnings.warn(f"attention backend {name} is wrong on {device}: relative error {error:.2g}", stacklevel=2)
        return False
    logger.info("attention backend %s on %s: relative error %.2g", name, device, error)
    return True


@torch.no_grad()
def relative_error(name: str, device: torch.device) -> float:
    """Of a backend in bfloat16 against plain float32, over self-attention and cross-attention lengths."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    errors = [_error_of_parts(BACKENDS[name], draw, *lengths) for lengths in ((1111, 1111), (777, 512), (777, 257))]
    if name in OF_QKV:
        errors.append(_error_of_qkv(OF_QKV[name], draw))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _error_of_parts(backend: Attention, draw: Callable[..., Tensor], query_length: int, key_length: int) -> float:
    query, key, value = (draw(1, length, 4, 128).bfloat16() for length in (query_length, key_length, key_length))
    return _relative_error(backend(query, key, value), query, key, value)


def _error_of_qkv(backend: AttentionOfQkv, draw: Callable[..., Tensor]) -> float:
    """Of a backend that norms and rotates queries and keys itself."""
    length, num_heads, head_size = 1111, 4, 128
    qkv, angles = draw(1, length, 3 * num_heads * head_size).bfloat16(), draw(length, head_size // 2)
    weight_q, weight_k = (1 + 0.1 * draw(num_heads * head_size) for _ in range(2))
    norm = QkNorm(weight_q, weight_k, angles.cos(), angles.sin(), head_size, 1e-6)
    query, key = reference.qk_norm_rotary(qkv.float(), weight_q, weight_k, norm.cos, norm.sin, head_size, norm.eps)
    value = rearrange(qkv.chunk(3, dim=-1)[2], "b l (heads d) -> b l heads d", d=head_size)
    out, common = backend(qkv, norm, None)
    return _relative_error(out + common, query, key, value)


def _relative_error(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float:
    with sdpa_kernel([SDPBackend.MATH]):
        expected = sdpa(query.float(), key.float(), value.float())
    return float((out.float() - expected).norm() / expected.norm())
