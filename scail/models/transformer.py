"""The diffusion transformer of SCAIL: Wan 2.1's blocks over reference, video and pose tokens.

Velocity is `noise - data`; a timestep is 1000 · sigma, fractional allowed. Tokens are joined in the order reference,
video, pose, each flattened frame, row, column, and attend to one another without a mask. What depends on the clip
and not on the step, the tokens of reference and pose and the keys and values of both cross-attentions, is computed
once, by `prepare`.

Source: zai-org/SCAIL, the DiT and its mixins; sizes and names of the weights in `scail.conversion`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from scail.config import TransformerConfig
from scail.errors import InvalidInputError
from scail.kernels import qk_norm_rotary
from scail.kernels.reference import layer_norm_modulate, rms_norm
from scail.models.attention import BACKENDS, CROSS_ATTENTION, OF_QKV, Attention, AttentionOfQkv, QkNorm, sdpa
from scail.models.rope import RotaryTable, kept_rotary_table
from scail.types import Conditioning

# Layers of a block that `prepare` alone uses: once a clip, not at every step.
CONDITIONING_LAYERS = (
    "cross_attn.text_kv",
    "cross_attn.image_kv",
    "cross_attn.norm_text_k",
    "cross_attn.norm_image_k",
)


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one cross-attention, each (B, M, heads, head_size)."""

    key: Tensor
    value: Tensor

    def of_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The same for every item of a batch, where there is only one."""
        return self.key.expand(batch_size, -1, -1, -1), self.value.expand(batch_size, -1, -1, -1)


@dataclass(frozen=True)
class PreparedConditioning:
    """A `Conditioning` as the blocks use it: computed once for a clip, the same at every step."""

    reference_tokens: Tensor  # (B, h·w / 4, D)
    pose_tokens: Tensor  # (B, f·h·w / 16, D)
    rotary: RotaryTable
    text: tuple[KeyValue, ...]  # one for each block
    image: tuple[KeyValue, ...]
    grid: tuple[int, int, int]  # latent frames, height and width that all of this is for

    def of_block(self, index: int) -> tuple[KeyValue, KeyValue]:
        return self.text[index], self.image[index]


class ScailTransformer(nn.Module):
    """Predicts the velocity of the video latents."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        in_channels = config.latent_channels + config.mask_channels
        patch = (1, config.patch_size, config.patch_size)
        self.patch_embedding = PatchEmbedding(in_channels, size, kernel_size=patch, stride=patch)
        self.pose_patch_embedding = PatchEmbedding(in_channels, size, kernel_size=patch, stride=patch)
        self.time_embedding = nn.Sequential(nn.Linear(config.time_freq_size, size), nn.SiLU(), nn.Linear(size, size))
        self.time_projection = nn.Linear(size, 6 * size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_size, size), nn.GELU(approximate="tanh"), nn.Linear(size, size)
        )
        self.image_embedding = nn.Sequential(
            nn.LayerNorm(config.image_size, eps=1e-5),  # not config.eps: these two came with Wan's CLIP projection
            nn.Linear(config.image_size, config.image_size),
            nn.GELU(),
            nn.Linear(config.image_size, size),
            nn.LayerNorm(size, eps=1e-5),
        )
        self.blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.num_layers)])
        self.head = Head(config)
        # What the blocks are taken from, for the conditioning and for a step; in tuples, since they are not modules
        # of their own.
        self._sources: tuple[Iterable[nn.Module], Iterable[nn.Module]] = (self.blocks, self.blocks)

    def take_blocks_from(self, for_conditioning: Iterable[nn.Module], for_steps: Iterable[nn.Module]) -> None:
        """Let `scail.memory` hand out the blocks; each is used before the next one is asked for."""
        self._sources = for_conditioning, for_steps

    def use_attention(self, backend: str) -> None:
        """Take a backend of `scail.models.attention` for every softmax; it is `sdpa` until then."""
        for block in self._executing_blocks():
            block.self_attn.attend, block.self_attn.attend_qkv = BACKENDS[backend], OF_QKV.get(backend)
            block.cross_attn.attend = BACKENDS[CROSS_ATTENTION.get(backend, backend)]

    def prepare(self, conditioning: Conditioning) -> PreparedConditioning:
        """Everything that stays the same from step to step."""
        config = self.config
        reference, pose = conditioning.reference_latents, conditioning.pose_latents
        num_frames, (height, width) = pose.shape[2], reference.shape[-2:]
        _check_shapes(reference, pose)
        rows, columns = height // config.patch_size, width // config.patch_size
        image = self.image_embedding(conditioning.image_embeds)
        text = self.text_embedding(conditioning.context)
        key_values = [
            (block.cross_attn.text_key_value(text), block.cross_attn.image_key_value(image))
            for block in cast(Iterable[TransformerBlock], self._sources[0])
        ]
        return PreparedConditioning(
            reference_tokens=_patchify(self.patch_embedding, reference, mask=1.0),
            pose_tokens=_patchify(self.pose_patch_embedding, pose, mask=1.0),
            rotary=kept_rotary_table(config, num_frames, rows, columns, reference.device, reference.dtype),
            text=tuple(of_text for of_text, _ in key_values),
            image=tuple(of_image for _, of_image in key_values),
            grid=(num_frames, height, width),
        )

    def with_context(self, prepared: PreparedConditioning, context: Tensor) -> PreparedConditioning:
        """The same clip under another text: the other side of the guidance."""
        text = self.text_embedding(context)
        blocks = cast(Iterable[TransformerBlock], self._sources[0])
        return replace(prepared, text=tuple(block.cross_attn.text_key_value(text) for block in blocks))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prepared: PreparedConditioning,
        history_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of `latents`.

        Args:
            latents: Noisy video latents (B, 16, f, h, w); h and w multiples of 4.
            timesteps: (B,), 1000 · sigma, in 0 … 1000.
            prepared: From `prepare`; a batch of one is shared by all of `latents`.
            history_mask: (1 or B, 4, f, h, w), 1 where `latents` are given and not to be generated.

        Returns:
            (B, 16, f, h, w) in the dtype of `latents`.
        """
        return self.velocities(latents, timesteps, (prepared,), history_mask)[0]

    def velocities(
        self,
        latents: Tensor,
        timesteps: Tensor,
        sides: Sequence[PreparedConditioning],
        history_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Velocity of `latents` under each side of the guidance; see `forward`.

        The sides differ in their text alone, as `with_context` makes them: up to the first cross-attention they are
        one, and that part is computed once. Of the last block only video tokens are wanted, and computed.
        """
        shared = sides[0]
        batch_size, _, f, h, w = latents.shape
        if (f, h, w) != shared.grid:
            raise InvalidInputError(f"latents are {f} x {h} x {w}; the conditioning was prepared for {shared.grid}.")
        video_tokens = _patchify(self.patch_embedding, latents, mask=0.0 if history_mask is None else history_mask)
        start = shared.reference_tokens.shape[1]
        video = slice(start, start + video_tokens.shape[1])
        tokens = torch.cat(
            (
                shared.reference_tokens.expand(batch_size, -1, -1),
                video_tokens,
                shared.pose_tokens.expand(batch_size, -1, -1),
            ),
            dim=1,
        )  # (B, L, D)
        embedding = self.time_embedding(sinusoid(timesteps, self.config.time_freq_size).to(tokens.dtype))
        modulation = self.time_projection(F.silu(embedding)).view(batch_size, 6, -1)
        hidden = self._through_blocks(tokens, modulation, sides, video)
        return [self._unpatchify(self.head(tokens, embedding), f, h, w) for tokens in hidden]

    def _through_blocks(
        self, tokens: Tensor, modulation: Tensor, sides: Sequence[PreparedConditioning], video: slice
    ) -> list[Tensor]:
        """The video tokens of each side after the last block; one pass over the blocks, since they may be streamed."""
        hidden = [tokens] * len(sides)
        last = self.config.num_layers - 1
        for index, block in enumerate(cast(Iterable[TransformerBlock], self._sources[1])):
            span = video if index == last else None
            # Never compiled with a span: its numbers would be constants, and every other size of a clip another graph.
            attend = block.attend if span is None else partial(type(block).attend, block, span=span)
            shared = attend(tokens, modulation, sides[0].rotary) if index == 0 else None
            for number, side in enumerate(sides):
                own = hidden[number]
                update = attend(own, modulation, side.rotary) if shared is None else shared
                own = own[:, video].contiguous() if span else own
                hidden[number] = block.finish(own, update, modulation, *side.of_block(index))
        return hidden

    def compile_blocks(self) -> None:
        """Let the compiler fuse what the blocks do between their matrix products; the first clip waits for it."""
        for block in self._executing_blocks():
            block.attend = torch.compile(block.attend, fullgraph=True)  # type: ignore[method-assign]
            block.finish = torch.compile(block.finish, fullgraph=True)  # type: ignore[method-assign]

    def _executing_blocks(self) -> Iterable[TransformerBlock]:
        """The modules that a step runs: where blocks are streamed, some of them stand for many."""
        return cast(Iterable[TransformerBlock], getattr(self._sources[1], "executing", self.blocks))

    def _unpatchify(self, tokens: Tensor, f: int, h: int, w: int) -> Tensor:
        """Latents (B, 16, f, h, w) of video tokens (B, f·h·w / 4, 64)."""
        p = self.config.patch_size
        return rearrange(tokens, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h // p, w=w // p, p=p, q=p)

    def transformer_blocks(self) -> Iterator[TransformerBlock]:
        return (cast(TransformerBlock, block) for block in self.blocks)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and an MLP; the first and the last modulated and gated by the timestep."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, size))
        self.self_attn = SelfAttention(config)
        self.cross_attn_norm = nn.LayerNorm(size, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(size, config.ffn_size), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_size, size)
        )
        nn.init.normal_(self.modulation, std=size**-0.5)

    def attend(self, tokens: Tensor, modulation: Tensor, rotary: RotaryTable, span: slice | None = None) -> Tensor:
        """What self-attention adds to the tokens of `span`, before its gate; the text has no part in it.

        Args:
            tokens: (B, L, D).
            modulation: (B, 6, D), of the timestep.
            rotary: Of all tokens.
            span: Tokens that are wanted; all of them are attended to.
        """
        shift, scale, *_ = self._rows(modulation)
        return self.self_attn(layer_norm_modulate(tokens, shift, scale, self.eps), rotary, span)

    def finish(self, tokens: Tensor, update: Tensor, modulation: Tensor, text: KeyValue, image: KeyValue) -> Tensor:
        """Add what `attend` gave for these tokens, then cross-attention and the MLP."""
        _, _, attn_gate, ffn_shift, ffn_scale, ffn_gate = self._rows(modulation)
        tokens = tokens + attn_gate * update
        tokens = tokens + self.cross_attn(self.cross_attn_norm(tokens), text, image)
        return tokens + ffn_gate * self.ffn(layer_norm_modulate(tokens, ffn_shift, ffn_scale, self.eps))

    def _rows(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of the attention, then of the MLP; each (B, 1, D)."""
        return (self.modulation + modulation).chunk(6, dim=1)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = config.head_size
        self.attend: Attention = sdpa
        self.attend_qkv: AttentionOfQkv | None = None  # a backend that norms and rotates by itself
        self.qkv = nn.Linear(size, 3 * size)
        self.norm_q = RMSNorm(size, config.eps)
        self.norm_k = RMSNorm(size, config.eps)
        self.out = LinearOfSum(size, size)

    def forward(self, tokens: Tensor, rotary: RotaryTable, span: slice | None = None) -> Tensor:
        qkv = self.qkv(tokens)
        weights = (self.norm_q.weight, self.norm_k.weight)
        if self.attend_qkv is not None:
            norm = QkNorm(*weights, rotary.cos, rotary.sin, self.head_size, self.norm_q.eps)
            return self.out.of_sum(*(part.flatten(-2) for part in self.attend_qkv(qkv, norm, span)))
        query, key = qk_norm_rotary(
            qkv, *weights, rotary.cos, rotary.sin, head_size=self.head_size, eps=self.norm_q.eps
        )  # (B, L, heads, head_size)
        value = _split_heads(qkv.chunk(3, dim=-1)[2], self.head_size)
        if span is not None:
            query = query[:, span]
        return self.out(self.attend(query, key, value).flatten(-2))


class CrossAttention(nn.Module):
    """Two softmaxes over the same queries, one over the text and one over the image; their outputs are added."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = config.head_size
        self.attend: Attention = sdpa
        self.q = nn.Linear(size, size)
        self.text_kv = nn.Linear(size, 2 * size)
        self.image_kv = nn.Linear(size, 2 * size)
        self.norm_q = RMSNorm(size, config.eps)
        self.norm_text_k = RMSNorm(size, config.eps)
        self.norm_image_k = RMSNorm(size, config.eps)
        self.out = LinearOfSum(size, size)

    def text_key_value(self, text: Tensor) -> KeyValue:
        key, value = self.text_kv(text).chunk(2, dim=-1)
        return KeyValue(_split_heads(self.norm_text_k(key), self.head_size), _split_heads(value, self.head_size))

    def image_key_value(self, image: Tensor) -> KeyValue:
        key, value = self.image_kv(image).chunk(2, dim=-1)
        return KeyValue(_split_heads(self.norm_image_k(key), self.head_size), _split_heads(value, self.head_size))

    def forward(self, tokens: Tensor, text: KeyValue, image: KeyValue) -> Tensor:
        query = _split_heads(self.norm_q(self.q(tokens)), self.head_size)
        parts = (self.attend(query, *side.of_batch(len(query))) for side in (text, image))
        return self.out.of_sum(*(part.flatten(-2) for part in parts))


class LinearOfSum(nn.Linear):
    """A layer whose input comes in two parts."""

    def of_sum(self, x: Tensor, other: Tensor) -> Tensor:
        """Of `x` (B, L, D) plus `other`, (B, L, D) or (B, 1, D), in the dtype of `x`."""
        return self((x + other).to(x.dtype))


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.latent_channels)
        nn.init.normal_(self.modulation, std=config.hidden_size**-0.5)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.modulation + embedding[:, None]).chunk(2, dim=1)
        return self.linear(layer_norm_modulate(tokens, shift, scale, self.eps))


class PatchEmbedding(nn.Conv3d):
    """A convolution of patches that do not overlap, as the matrix product it is.

    oneDNN's own in bfloat16 reads past inputs that are two columns wide (torch 2.13, AVX-512): the numbers vary.
    """

    def forward(self, latents: Tensor) -> Tensor:
        """Tokens (B, L, D) of latents (B, C, f, h, w)."""
        _, rows, columns = self.kernel_size
        patches = rearrange(latents, "b c f (h p) (w q) -> b (f h w) (c p q)", p=rows, q=columns)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class RMSNorm(nn.Module):
    """RMS norm over the whole hidden size, all heads together; computed in float32 as the official one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def sinusoid(timesteps: Tensor, size: int) -> Tensor:
    """(B, size), cosines first; float64, since in float32 the network's output is 2e-5 off."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _patchify(projection: PatchEmbedding, latents: Tensor, *, mask: float | Tensor) -> Tensor:
    """Tokens (B, L, D) of latents with their mask appended as 4 more channels."""
    shape = (latents.shape[0], projection.in_channels - latents.shape[1], *latents.shape[2:])
    channels = mask.to(latents.dtype).expand(shape) if isinstance(mask, Tensor) else latents.new_full(shape, mask)
    tokens: Tensor = projection(torch.cat((latents, channels), dim=1))
    return tokens


def _split_heads(x: Tensor, head_size: int) -> Tensor:
    return rearrange(x, "b l (heads d) -> b l heads d", d=head_size)


def _check_shapes(reference: Tensor, pose: Tensor) -> None:
    height, width = reference.shape[-2:]
    if height % 4 or width % 4:
        raise InvalidInputError(f"latents are {height} x {width}; height and width must be multiples of 4.")
    if pose.shape[-2:] != (height // 2, width // 2):
        raise InvalidInputError(
            f"pose latents are {tuple(pose.shape[-2:])}; expected half of the reference's {(height, width)}."
        )
