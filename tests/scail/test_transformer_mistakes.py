"""Would the golden checks see a mistake? Each known one is made on a case that the official code recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from scail.models import transformer as transformer_module
from scail.models.rope import RotaryTable, video_rotary
from scail.models.transformer import CrossAttention, KeyValue, PreparedConditioning
from scail.types import Conditioning
from tests.golden.checks_model import Fixture, run_transformer, transformer_of

GOLDEN_LIMIT = 1e-5  # what the golden checks allow between our velocity and the official one
REFERENCE, VIDEO, POSE = range(3)
Patch = pytest.MonkeyPatch


class Recorded:
    """The golden case with padded text and a fractional timestep; its transformer may be changed at will."""

    def __init__(self, folder: Path) -> None:
        fixture = Fixture.read(folder / "dit_hd32.safetensors")
        self.transformer = transformer_of(fixture, fixture.meta["config"])
        self.tensors = fixture.case(1)
        self.num_words = fixture.meta["cases"][1]["valid"][0]

    @property
    def sections(self) -> tuple[int, int, int]:
        """Reference, video and pose tokens."""
        frames, grid = self.tensors["x"].shape[2], self.tensors["x"][0, 0, 0].numel() // 4
        return grid, frames * grid, frames * grid // 4

    def error(self, out: Tensor) -> float:
        return float((out - self.tensors["out"]).abs().max())

    def run(self, **changes: Tensor) -> Tensor:
        return run_transformer(self.transformer, {**self.tensors, **changes}, torch.float32)

    def run_prepared(self, change: Callable[[PreparedConditioning], PreparedConditioning]) -> Tensor:
        conditioning = Conditioning(*(self.tensors[name] for name in ("context", "clip", "ref", "pose")))
        prepared = change(self.transformer.prepare(conditioning))
        return self.transformer(self.tensors["x"], self.tensors["t"], prepared)

    def run_with_rotary(self, part: int, change: Callable[[RotaryTable], RotaryTable]) -> Tensor:
        def changed(prepared: PreparedConditioning) -> PreparedConditioning:
            cosines, sines = (list(x.split(self.sections)) for x in (prepared.rotary.cos, prepared.rotary.sin))
            table = change(RotaryTable(cosines[part], sines[part]))
            cosines[part], sines[part] = table.cos, table.sin
            return replace(prepared, rotary=RotaryTable(torch.cat(cosines), torch.cat(sines)))

        return self.run_prepared(changed)

    def moved(self, table: RotaryTable, frames: int = 0, rows: int = 0, columns: int = 0) -> RotaryTable:
        """The table of tokens that stand elsewhere."""
        config = self.transformer.config
        space_size = 2 * (config.head_size // 6)
        sizes = (config.head_size - 2 * space_size, space_size, space_size)
        angles = [
            steps * config.rope_theta ** -(torch.arange(0, size, 2) / size)
            for steps, size in zip((frames, rows, columns), sizes, strict=True)
        ]
        rotation = torch.polar(torch.ones(config.head_size // 2), torch.cat(angles))
        moved = torch.complex(table.cos, table.sin) * rotation
        return RotaryTable(moved.real, moved.imag)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.config.getoption("--golden-dir"))


def pose_from_time_zero(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run_with_rotary(POSE, lambda table: recorded.moved(table, frames=-1))


def video_from_time_zero(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run_with_rotary(VIDEO, lambda table: recorded.moved(table, frames=-1))


def pose_not_offset(recorded: Recorded, _patch: Patch) -> Tensor:
    recorded.transformer.config = replace(recorded.transformer.config, pose_rope_offset=0)
    return recorded.run()


def pose_offset_downwards(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run_with_rotary(POSE, lambda table: recorded.moved(table, rows=120, columns=-120))


def pose_on_the_coarse_grid(recorded: Recorded, _patch: Patch) -> Tensor:
    _, _, frames, height, width = recorded.tensors["pose"].shape
    coarse = video_rotary(recorded.transformer.config, frames, height // 2, width // 2)
    return recorded.run_with_rotary(POSE, lambda _table: recorded.moved(coarse, columns=120))


def pose_rotation_renormalised(recorded: Recorded, _patch: Patch) -> Tensor:
    def normalised(table: RotaryTable) -> RotaryTable:
        length = torch.hypot(table.cos, table.sin)
        return RotaryTable(table.cos / length, table.sin / length)

    return recorded.run_with_rotary(POSE, normalised)


def halves_rotated_instead_of_neighbours(recorded: Recorded, _patch: Patch) -> Tensor:
    """Scores do not change when queries and keys are reordered alike: halves made neighbours are rotated as halves."""
    config = recorded.transformer.config
    features = torch.arange(config.hidden_size).reshape(config.num_heads, 2, -1).mT.flatten()
    queries, keys, values = torch.arange(3 * config.hidden_size).chunk(3)
    order = torch.cat((queries[features], keys[features], values))
    for block in recorded.transformer.blocks:
        attn = block.self_attn
        for layer, permutation in ((attn.qkv, order), (attn.norm_q, features), (attn.norm_k, features)):
            layer.load_state_dict({name: value[permutation] for name, value in layer.state_dict().items()})
    return recorded.run()


def tokens_with_mask_zero(projection: nn.Module, latents: Tensor) -> Tensor:
    zeros = torch.zeros(latents.shape[0], 4, *latents.shape[2:])
    return projection(torch.cat((latents, zeros), dim=1))


def reference_mask_zero(recorded: Recorded, _patch: Patch) -> Tensor:
    tokens = tokens_with_mask_zero(recorded.transformer.patch_embedding, recorded.tensors["ref"])
    return recorded.run_prepared(lambda prepared: replace(prepared, reference_tokens=tokens))


def pose_mask_zero(recorded: Recorded, _patch: Patch) -> Tensor:
    tokens = tokens_with_mask_zero(recorded.transformer.pose_patch_embedding, recorded.tensors["pose"])
    return recorded.run_prepared(lambda prepared: replace(prepared, pose_tokens=tokens))


def video_mask_one(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run(history_mask=torch.ones_like(recorded.tensors["x"][:, :4]))


def timestep_between_zero_and_one(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run(t=recorded.tensors["t"] / 1000)


def timestep_truncated(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run(t=recorded.tensors["t"].floor())


def sines_before_cosines(recorded: Recorded, patch: Patch) -> Tensor:
    right = transformer_module.sinusoid
    patch.setattr(transformer_module, "sinusoid", lambda timesteps, size: right(timesteps, size).roll(size // 2, -1))
    return recorded.run()


def padding_dropped(recorded: Recorded, _patch: Patch) -> Tensor:
    return recorded.run(context=recorded.tensors["context"][:, : recorded.num_words])


def padding_zeroed_after_its_embedding(recorded: Recorded, _patch: Patch) -> Tensor:
    is_word = (torch.arange(recorded.tensors["context"].shape[1]) < recorded.num_words)[:, None]
    recorded.transformer.text_embedding.register_forward_hook(lambda _module, _args, out: out * is_word)
    return recorded.run()


def norm_by_head(self_attn: nn.Module) -> None:
    """Undoes the norm over all heads and norms each of them; the rotation between is linear and does not mind."""
    ratios: list[Tensor] = []
    attend = self_attn.attend

    def remember(_module: nn.Module, _args: tuple[Tensor, ...], qkv: Tensor) -> None:
        heads = rearrange(qkv, "b l (three heads d) -> three b l heads d", three=3, d=self_attn.head_size)
        by_head = heads.square().mean(-1, keepdim=True)
        ratios[:] = (by_head.mean(-2, keepdim=True) / by_head).sqrt()

    self_attn.qkv.register_forward_hook(remember)

    def attend_unnormed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_tokens, num_queries = key.shape[1], query.shape[1]
        start = 0 if num_queries == num_tokens else num_tokens - 5 * num_queries // 4  # video alone, in the last block
        return attend(query * ratios[0][:, start : start + num_queries], key * ratios[1], value)

    self_attn.attend = attend_unnormed


def queries_and_keys_normed_by_head(recorded: Recorded, _patch: Patch) -> Tensor:
    for block in recorded.transformer.blocks:
        norm_by_head(block.self_attn)
    return recorded.run()


def erf_gelu_in_the_mlp(recorded: Recorded, _patch: Patch) -> Tensor:
    for block in recorded.transformer.blocks:
        block.ffn[1] = nn.GELU()
    return recorded.run()


def tanh_gelu_in_the_image_embedding(recorded: Recorded, _patch: Patch) -> Tensor:
    recorded.transformer.image_embedding[2] = nn.GELU(approximate="tanh")
    return recorded.run()


def eps_of_the_blocks_in_the_image_embedding(recorded: Recorded, _patch: Patch) -> Tensor:
    for index in (0, 4):
        recorded.transformer.image_embedding[index].eps = recorded.transformer.config.eps
    return recorded.run()


def cross_attention_norm_without_its_weights(recorded: Recorded, _patch: Patch) -> Tensor:
    for block in recorded.transformer.blocks:
        block.cross_attn_norm = nn.LayerNorm(block.cross_attn_norm.normalized_shape, eps=block.eps)
    return recorded.run()


def one_softmax_over_text_and_image(recorded: Recorded, patch: Patch) -> Tensor:
    def joint(self: CrossAttention, tokens: Tensor, text: KeyValue, image: KeyValue) -> Tensor:
        query = rearrange(self.norm_q(self.q(tokens)), "b l (heads d) -> b l heads d", d=self.head_size)
        key, value = torch.cat((text.key, image.key), dim=1), torch.cat((text.value, image.value), dim=1)
        return self.out(self.attend(query, key, value).flatten(-2))

    patch.setattr(CrossAttention, "forward", joint)
    return recorded.run()


def silu_before_the_head(recorded: Recorded, _patch: Patch) -> Tensor:
    recorded.transformer.head.register_forward_pre_hook(lambda _module, args: (args[0], F.silu(args[1])))
    return recorded.run()


def channels_first_in_a_patch(recorded: Recorded, _patch: Patch) -> Tensor:
    tokens = rearrange(recorded.run(), "b c f (h p) (w q) -> b f h w (p q c)", p=2, q=2)
    return rearrange(tokens, "b f h w (c p q) -> b c f (h p) (w q)", p=2, q=2)


MISTAKES = [
    pose_from_time_zero,
    video_from_time_zero,
    pose_not_offset,
    pose_offset_downwards,
    pose_on_the_coarse_grid,
    pose_rotation_renormalised,
    halves_rotated_instead_of_neighbours,
    reference_mask_zero,
    pose_mask_zero,
    video_mask_one,
    timestep_between_zero_and_one,
    timestep_truncated,
    sines_before_cosines,
    padding_dropped,
    padding_zeroed_after_its_embedding,
    queries_and_keys_normed_by_head,
    erf_gelu_in_the_mlp,
    tanh_gelu_in_the_image_embedding,
    eps_of_the_blocks_in_the_image_embedding,
    cross_attention_norm_without_its_weights,
    one_softmax_over_text_and_image,
    silu_before_the_head,
    channels_first_in_a_patch,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_known_mistake_would_be_seen_by_the_golden_checks(recorded, monkeypatch, mistake):
    assert recorded.error(mistake(recorded, monkeypatch)) > GOLDEN_LIMIT


def test_the_case_in_which_mistakes_are_made_is_right_without_them(recorded):
    unchanged = recorded.run_with_rotary(POSE, recorded.moved)

    assert recorded.error(recorded.run()) <= GOLDEN_LIMIT
    assert recorded.error(unchanged) <= GOLDEN_LIMIT
    assert recorded.error(recorded.run_prepared(lambda prepared: prepared)) <= GOLDEN_LIMIT
