"""What happens to the transformer's weights between a file and the network: LoRAs are fused, then they are quantised.

The same steps, whether a checkpoint is written (`scail convert --lora --quantize`) or loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scail.config import LoraFile, Quantization, TransformerConfig
from scail.errors import InvalidInputError
from scail.lora import Lora
from scail.quantization import SCALE_SUFFIX, is_quantized_weight, quantize_weight


@dataclass(frozen=True)
class WeightChanges:
    """Applied to one tensor at a time, on the device on which it is."""

    loras: tuple[Lora, ...] = ()
    quantization: Quantization = "none"

    @classmethod
    def of(
        cls,
        loras: Sequence[LoraFile],
        quantization: Quantization,
        *,
        config: TransformerConfig,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> WeightChanges:
        """Open the LoRAs and match them.

        Args:
            loras: Files with their strengths.
            quantization: Of the result.
            config: Of the transformer.
            shapes: Of its tensors before quantisation.

        Raises:
            CheckpointError: If a LoRA cannot be read or does not fit.
        """
        opened = tuple(Lora.open(Path(lora.path), lora.strength, config, shapes) for lora in loras)
        return cls(opened, quantization)

    def touch(self, key: str) -> bool:
        """Whether a tensor comes out other than it went in."""
        fused = any(key in lora.deltas for lora in self.loras)
        return fused or (self.quantization != "none" and is_quantized_weight(key))

    def sizes(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
        """Bytes of what `apply` makes of a tensor of that shape and dtype."""
        count = math.prod(shape)
        if self.quantization == "none" or not is_quantized_weight(key):
            return {key: count * dtype.itemsize}
        return {key: count, key + SCALE_SUFFIX: shape[0] * torch.float32.itemsize}

    def apply(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of the file → the network's tensors: itself, or a quantised weight and its scales."""
        for lora in self.loras:
            tensor = lora.fuse(key, tensor)
        if self.quantization == "none" or not is_quantized_weight(key):
            return {key: tensor}
        values, scales = quantize_weight(tensor, self.quantization)
        return {key: values, key + SCALE_SUFFIX: scales}


def refuse_changes_of_quantized(loras: Sequence[LoraFile], found: Quantization, wanted: Quantization) -> None:
    """Rounded weights take no difference, and no second rounding.

    Raises:
        InvalidInputError: If a quantised checkpoint is to be changed.
    """
    if found == "none":
        return
    if loras:
        raise InvalidInputError(
            f"the checkpoint is quantised ({found}); a LoRA is fused before that: scail convert ORIGINAL DEST --lora "
            f"{loras[0]} --quantize {found}"
        )
    if wanted not in {"none", found}:
        raise InvalidInputError(
            f"the checkpoint is quantised ({found}) and cannot be made {wanted}; take the original."
        )
