"""Layers that pass through the device: they wait in the host's memory, and are copied there one ahead of their turn.

A layer that waits is one piece of memory, so that one copy brings it; on the device it goes into one of two slots, and
its tensors are views of that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; the strictest kernel asks for 128


class Stack:
    """Equal layers, some of which wait in the host's memory, each in one piece.

    Attributes:
        layers: In the order in which they compute.
        waiting: The bytes of those that wait, by index.
        num_bytes: Of one of them.
    """

    def __init__(
        self, layers: Sequence[nn.Module], waiting: Iterable[int], wanted: Callable[[str], bool] = lambda _name: True
    ) -> None:
        """Move the `wanted` tensors of the `waiting` layers there."""
        self.layers = layers
        self._wanted = wanted
        self._layout = _Layout.of({name: x for name, x in tensors_of(layers[0]).items() if wanted(name)})
        self.num_bytes = self._layout.num_bytes
        self.waiting = {index: torch.empty(self.num_bytes, dtype=torch.uint8) for index in waiting}
        for index, flat in self.waiting.items():
            tensors = tensors_of(layers[index])
            for name, view in self._layout.views(flat).items():
                set_tensor(layers[index], name, moved_into(tensors[name], view))

    def waiting_tensors(self) -> Iterator[Tensor]:
        for index in self.waiting:
            yield from (tensor for name, tensor in tensors_of(self.layers[index]).items() if self._wanted(name))

    def in_slot(self, flat: Tensor) -> nn.Module:
        """A layer like the others whose wanted tensors are in `flat`; it has no others."""
        layer = self.layers[0]
        bare = {
            id(tensor): _like(tensor, torch.empty_like(tensor, device="meta")) for tensor in tensors_of(layer).values()
        }
        twin = copy.deepcopy(layer, bare)
        for name, view in self._layout.views(flat).items():
            set_tensor(twin, name, view)
        return twin


@dataclass(frozen=True)
class _Layout:
    """Where in one piece of memory each tensor of a layer lies."""

    extents: Mapping[str, tuple[int, torch.Size, torch.dtype]]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> _Layout:
        extents, start = {}, 0
        for name, tensor in tensors.items():
            extents[name] = (start, tensor.shape, tensor.dtype)
            start += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        return cls(extents, start)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (start, shape, dtype) in self.extents.items()
        }


class Slots:
    """Two pieces of device memory through which layers pass in turn; shared by all stacks, as one computes at a time.

    Copies run on a stream of their own. A slot is written only when the computing that read it is done, and read
    only when its copy is done; both are events on the device, for which the host does not wait.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._keys: list[object] = [None, None]
        self._last = 1
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._copying:
            self._copying.wait_stream(torch.cuda.current_stream(device))  # the buffers may have been something else's
            self._filled = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            self._free = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def bring(self, key: object, waiting: Tensor) -> int:
        """Begin to copy a layer, unless it is here: into the slot that was not used last. Returns its slot."""
        if key in self._keys:
            return self._keys.index(key)
        slot = 1 - self._last
        self._keys[slot] = key
        target = self.buffers[slot][: waiting.nbytes]
        if self._copying is None:
            target.copy_(waiting)
            return slot
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(self._free[slot])
            target.copy_(waiting, non_blocking=True)
            self._filled[slot].record(self._copying)
        return slot

    def take(self, slot: int) -> None:
        """What is computed from now on waits for the slot's copy; the other slot is the next to be written."""
        self._last = slot
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_event(self._filled[slot])

    def leave(self, slot: int) -> None:
        """What was computed until now was the last that reads the slot."""
        if self._copying is not None:
            self._free[slot].record(torch.cuda.current_stream(self._device))


class LayerStream:
    """Iterates over a stack's layers; those that wait are brought to the device one ahead.

    A layer that comes out of it is valid until the next one is asked for. After the last comes the first again: when
    a sweep ends, the next one's first layer is on its way.
    """

    def __init__(self, stack: Stack, slots: Slots) -> None:
        self._layers, self._waiting, self._slots = stack.layers, stack.waiting, slots
        self._in_slots = [stack.in_slot(buffer) for buffer in slots.buffers]
        order = list(stack.waiting)
        self._next = dict(zip(order, [*order[1:], *order[:1]], strict=True))

    @property
    def executing(self) -> list[nn.Module]:
        """Every module that can come out: the resident layers and the two in the slots."""
        resident = [layer for index, layer in enumerate(self._layers) if index not in self._waiting]
        return [*resident, *(self._in_slots if self._waiting else [])]

    def __iter__(self) -> Iterator[nn.Module]:
        for index, layer in enumerate(self._layers):
            if index not in self._waiting:
                yield layer
                continue
            slot = self._bring(index)
            self._slots.take(slot)
            self._bring(self._next[index])
            try:
                yield self._in_slots[slot]
            finally:
                self._slots.leave(slot)

    def _bring(self, index: int) -> int:
        return self._slots.bring((id(self), index), self._waiting[index])


class StreamedList(nn.ModuleList):
    """Takes the place of a library's list of layers: the same names, but iterating over it streams."""

    def __init__(self, layers: Iterable[nn.Module], stream: LayerStream) -> None:
        super().__init__(layers)
        self._stream = stream

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._stream)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those included that no file holds."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer, whatever its device."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def moved_into(tensor: Tensor, target: Tensor) -> Tensor:
    """`target`, which now holds what `tensor` does; nothing to copy from the meta device."""
    return target if tensor.is_meta else target.copy_(tensor.detach())


def _like(tensor: Tensor, bare: Tensor) -> Tensor:
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
