"""Where weights are. `Placement` decides it, for every tensor of every network, and nothing else moves one.

A stack of equal layers – the transformer's blocks, the layers of an encoder – is on the device, or waits in the
host's memory and passes through two slots on the device: while one layer computes, the next is copied beside it.
How many of the transformer's blocks stay on the device is the whole difference between the policies:

resident    all of them; the encoders too
balanced    as many as fit into a budget made for a card of 24 GB; the encoders' layers pass through
low         none

Numbers and their order do not change, so that every policy renders the same bits.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from scail.config import DEFAULT_SIZE, MAX_FRAMES, MemoryPolicy, PlacementPolicy, TransformerConfig
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import TextEncoder
from scail.models.transformer import CONDITIONING_LAYERS, ScailTransformer
from scail.streaming import LayerStream, Slots, Stack, StreamedList, moved_into, set_tensor, tensors_of
from scail.types import LatentShape, num_tokens

logger = logging.getLogger(__name__)

BALANCED_BYTES = 22_000_000_000  # what a card of 24 GB has beside a desktop and the CUDA context
BESIDE_BYTES = 2_000_000_000  # the context, and handles of cuBLAS and cuDNN for each thread: not of torch's allocator
ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # by which a user sets up torch's allocator
SHARE_TO_USE = 0.92  # of the free memory, when the budget is made of it: the allocator loses some between its blocks

_ACTIVATIONS = 14  # tensors of tokens × hidden size that are alive at once in a block's MLP, rounded up
_DECODING_BYTES = 4_100_000_000  # the VAE's peak at 81 frames of 512 × 896, above its weights


class Placement:
    """The one owner of where a pipeline's weights are.

    Attributes:
        policy: That is in force.
        num_resident_blocks: Of the transformer; the others pass through the slots.
    """

    def __init__(
        self,
        transformer: ScailTransformer,
        *,
        vae: nn.Module,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        device: torch.device,
        policy: MemoryPolicy = "resident",
        num_resident_blocks: int | None = None,
    ) -> None:
        """Give every tensor its place; those of modules on the meta device are left to be filled.

        Args:
            transformer, vae, text_encoder, image_encoder: The networks.
            device: Where they compute.
            policy: `auto` takes the first one for which the device has room.
            num_resident_blocks: Instead of what the policy's budget allows.
        """
        device = self.device = with_index(device)
        prepare_allocator(device)
        sizes = _Sizes.of(transformer, (vae, text_encoder, image_encoder), device)
        self.policy, budget = choose_policy(policy, sizes, device)
        self._waiting: list[Tensor] = []
        if self.policy == "resident":
            self.num_resident_blocks = len(transformer.blocks)
            for module in (transformer, vae, text_encoder, image_encoder):
                place(module, device)
            return
        fitting = 0 if self.policy == "low" else sizes.num_blocks_within(budget)
        self.num_resident_blocks = fitting if num_resident_blocks is None else num_resident_blocks
        self._stream(transformer, text_encoder, image_encoder)
        place(vae, device)

    def _stream(self, transformer: ScailTransformer, text_encoder: TextEncoder, image_encoder: ImageEncoder) -> None:
        blocks = list(transformer.transformer_blocks())
        spared = spread(len(blocks), len(blocks) - self.num_resident_blocks)
        texts, images = list(text_encoder.encoder.block), list(image_encoder.encoder.layers)
        stacks = [
            Stack(blocks, range(len(blocks)), is_for_conditioning),
            Stack(blocks, spared, lambda name: not is_for_conditioning(name)),
            Stack(texts, range(len(texts))),
            Stack(images, range(len(images))),
        ]
        slots = Slots(max(stack.num_bytes for stack in stacks), self.device)
        conditioning, steps, *encoders = (LayerStream(stack, slots) for stack in stacks)
        transformer.take_blocks_from(conditioning, steps)
        text_encoder.encoder.block = StreamedList(texts, encoders[0])
        image_encoder.encoder.layers = StreamedList(images, encoders[1])
        self._waiting = [flat for stack in stacks for flat in stack.waiting.values()]
        waiting = {id(tensor) for stack in stacks for tensor in stack.waiting_tensors()}
        place(text_encoder.encoder.embed_tokens, torch.device("cpu"))  # 2 GB of which a prompt needs a few rows
        waiting |= {id(tensor) for tensor in text_encoder.encoder.embed_tokens.parameters()}
        for module in (transformer, text_encoder, image_encoder):
            place(module, self.device, but=waiting)

    def pin(self) -> None:
        """Lock what waits in the host's memory, so that it can be copied beside the computing; call it when filled.

        Torch's own locked memory comes in powers of two, of which 40 blocks would waste 16 GB.
        """
        if self.device.type != "cuda" or not self._waiting:
            return
        locked: list[Tensor] = []
        weakref.finalize(self, _unlock, locked, self.device)
        for flat in self._waiting:
            error = int(_cuda().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
            if error:
                logger.warning("the host's memory cannot be locked (CUDA error %d): streaming will be slow", error)
                return
            locked.append(flat)


def prepare_allocator(device: torch.device) -> None:
    """Let torch's allocator keep less than the whole device, and in pieces that grow, unless the environment says how.

    What it keeps for later is lost to everybody else: a first clip that fills its cache would leave nothing for the
    handles of the next clip's thread. And of pieces that cannot grow it lost 5 GB between the stages of a clip.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.5, 1 - BESIDE_BYTES / total), device)
    if not ALLOCATOR_VARIABLES & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def with_index(device: torch.device) -> torch.device:
    """As tensors name their device: `cuda` alone is equal to none of theirs."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _unlock(locked: list[Tensor], device: torch.device) -> None:
    torch.cuda.synchronize(device)
    for flat in locked:
        _cuda().cudaHostUnregister(flat.data_ptr())


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def is_for_conditioning(name: str) -> bool:
    """Whether a tensor of a block is used once a clip and not at every step."""
    return name.startswith(tuple(f"{layer}." for layer in CONDITIONING_LAYERS))


def spread(num_layers: int, num_chosen: int) -> list[int]:
    """`num_chosen` of `num_layers` indices, as far from one another as can be: each has time to arrive."""
    return sorted({index * num_layers // num_chosen for index in range(num_chosen)}) if num_chosen else []


def place(module: nn.Module, device: torch.device, *, but: Iterable[int] = ()) -> None:
    """Put every tensor of a module on `device`, except those whose `id` is among `but`."""
    kept = set(but)
    for name, tensor in tensors_of(module).items():
        if id(tensor) not in kept and tensor.device != device:
            set_tensor(module, name, moved_into(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=device)))


def place_bare(module: nn.Module, device: torch.device) -> None:
    """Give those tensors of a module a place that have none."""
    place(module, device, but=(id(tensor) for tensor in tensors_of(module).values() if not tensor.is_meta))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a model's parts."""

    steps: int  # of one block, without what only the conditioning uses
    conditioning: int  # of one block
    num_blocks: int
    beside: int  # the transformer without its blocks, and the VAE
    encoders: int
    slot: int
    reserve: int  # what a clip needs beside weights
    placed: int  # that are on the device already

    @classmethod
    def of(cls, transformer: ScailTransformer, others: Sequence[nn.Module], device: torch.device) -> _Sizes:
        vae, *encoders = others
        block = tensors_of(transformer.blocks[0])
        conditioning = sum(tensor.nbytes for name, tensor in block.items() if is_for_conditioning(name))
        steps = sum(tensor.nbytes for tensor in block.values()) - conditioning
        num_blocks = len(transformer.blocks)
        text_encoder = cast(TextEncoder, encoders[0])
        return cls(
            steps=steps,
            conditioning=conditioning,
            num_blocks=num_blocks,
            beside=num_bytes(transformer) - num_blocks * (steps + conditioning) + num_bytes(vae),
            encoders=sum(num_bytes(encoder) for encoder in encoders),
            slot=max(steps, num_bytes(text_encoder.encoder.block[0])),
            reserve=max(clip_bytes(transformer.config), _DECODING_BYTES),
            placed=sum(
                tensor.nbytes
                for module in (transformer, *others)
                for tensor in tensors_of(module).values()
                if tensor.device == device
            ),
        )

    @property
    def resident(self) -> int:
        """Everything on the device, and a clip."""
        weights = self.num_blocks * (self.steps + self.conditioning) + self.beside + self.encoders
        return weights + self.reserve

    def num_blocks_within(self, budget: int) -> int:
        spare = budget - self.beside - 2 * self.slot - self.reserve
        return max(0, min(self.num_blocks, spare // self.steps))


def clip_bytes(config: TransformerConfig) -> int:
    """What the longest clip of the default size holds while it is denoised with guidance, in bfloat16."""
    shape = LatentShape.of_clip(MAX_FRAMES, *DEFAULT_SIZE)
    activations = _ACTIVATIONS * num_tokens(config, shape) * config.hidden_size * 2
    key_values = config.num_layers * (2 * 512 + 257) * 2 * config.hidden_size * 2
    return activations + key_values


def choose_policy(policy: MemoryPolicy, sizes: _Sizes, device: torch.device) -> tuple[PlacementPolicy, int]:
    """The policy that `auto` means on this device, and the bytes that weights and a clip may take."""
    if policy != "auto":
        return policy, BALANCED_BYTES
    if device.type != "cuda":
        return "resident", 0
    usable = int(SHARE_TO_USE * (torch.cuda.mem_get_info(device)[0] + sizes.placed))
    if usable >= sizes.resident:
        return "resident", usable
    chosen: PlacementPolicy = "balanced" if usable >= BALANCED_BYTES else "low"
    logger.info("%.1f GB of device memory can be used, %.1f are needed: %s", usable / 1e9, sizes.resident / 1e9, chosen)
    return chosen, usable


def num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(module).values())
