"""What a run of training leaves behind and the next one begins from: averaged weights, counters, a log.

`STAGE-00001-of-0000N.safetensors` hold the weights in float32, each small enough to be sent anywhere; the counters are
in their header. Training goes on from the averaged weights, so that one set is enough; the optimiser begins anew, with
a short warm-up.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scail.checkpoint import compare_shapes, shapes_of
from scail.errors import CheckpointError
from scail.fingerprint import MODEL_INDEX, TRANSFORMER, VAE, component_headers

COMPONENTS = {"vae": (VAE, "model."), "dit": (TRANSFORMER, "")}  # a stage's files in a checkpoint, and their prefix
MAX_FILE_BYTES = 14_000_000
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Progress:
    """How far a stage is, over all its runs."""

    num_steps: int = 0
    seconds: float = 0.0
    num_runs: int = 0


class AveragedWeights:
    """An exponential moving average of a network's parameters, short at first."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [parameter.detach() for parameter in module.parameters()]
        self.average = [parameter.clone() for parameter in self.parameters]
        self.num_updates = 0

    def update(self) -> None:
        self.num_updates += 1
        decay = min(EMA_DECAY, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def swap(self) -> None:
        """Exchange weights and average: to evaluate, and back."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def snapshot(self) -> list[Tensor]:
        return [average.clone() for average in self.average]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Go back to an earlier average, with the weights too."""
        for parameter, average, kept in zip(self.parameters, self.average, snapshot, strict=True):
            parameter.copy_(kept)
            average.copy_(kept)


def save_state(folder: Path, stage: str, module: nn.Module, average: AveragedWeights, progress: Progress) -> None:
    """Write the averaged weights; each file is replaced as a whole."""
    names = [name for name, _ in module.named_parameters()]
    tensors = {name: value.float().cpu().contiguous() for name, value in zip(names, average.average, strict=True)}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _num_bytes([*shards[-1].values(), tensor]) > MAX_FILE_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"progress": json.dumps(asdict(progress)), "stage": stage}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"{stage}-{number:05}-of-{len(shards):05}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(shard, partial, metadata=metadata)
        partial.replace(path)


def load_state(folder: Path, stage: str, module: nn.Module) -> Progress:
    """Give `module` the weights of a stage, from a run's folder or from an assembled checkpoint, which holds halves.

    Raises:
        CheckpointError: If files or tensors are missing, extra or misshapen.
    """
    if (folder / MODEL_INDEX).is_file():
        component, prefix = COMPONENTS[stage]
        paths = sorted(component_headers(folder, component))
    else:
        paths, prefix = sorted(folder.glob(f"{stage}-*-of-*.safetensors")), ""
        if not paths or len(paths) != int(paths[0].stem.rsplit("-", 1)[1]):
            raise CheckpointError(f"{folder} has {len(paths)} {stage}-*.safetensors files; expected all of one state.")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors |= {prefix + key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata()
    compare_shapes({key: tuple(value.shape) for key, value in tensors.items()}, shapes_of(module), where=str(folder))
    module.load_state_dict(tensors, strict=True)
    return Progress(**json.loads(metadata["progress"]))


class RunLog:
    """Lines of JSON, one for each moment worth keeping; a resumed run goes on in the same file."""

    def __init__(self, folder: Path, stage: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stage}.jsonl"

    def write(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **values}) + "\n")


def _num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
