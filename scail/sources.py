"""Reading original weights: safetensors and torch files, mapped, opened for a few tensors at a time, without running
the code that a pickle may hold.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scail.errors import CheckpointError
from scail.fingerprint import TensorHeader, safetensors_header, sharded_headers


class SourceFile(Protocol):
    """Weights at rest: what is in them, and a way to read a few tensors and let go of the file again."""

    @property
    def path(self) -> Path: ...

    @property
    def headers(self) -> Mapping[str, TensorHeader]: ...

    def open(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """A context in which a function from key to tensor is valid."""
        ...


@dataclass(frozen=True)
class SafetensorsSource:
    """One safetensors file, or several under an index."""

    path: Path
    files: Mapping[Path, Mapping[str, TensorHeader]]

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        return {key: entry for header in self.files.values() for key, entry in header.items()}

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        owners = {key: path for path, header in self.files.items() for key in header}
        with ExitStack() as stack:
            try:
                opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in self.files}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}") from error
            yield lambda key: opened[owners[key]].get_tensor(key)


@dataclass(frozen=True)
class TorchSource:
    """A `.pt` or `.pth` file; mapped, and unpickled without running code."""

    path: Path
    headers: Mapping[str, TensorHeader]

    @classmethod
    def of(cls, path: Path) -> TorchSource:
        headers = {
            key: TensorHeader(_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)
            for key, tensor in _mapped_tensors(path).items()
        }
        return cls(path, headers)

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        yield _mapped_tensors(self.path).__getitem__


_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, of its `module` where training frameworks put them there."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a torch archive that can be mapped: it is of torch before 1.6, or cut off. "
            "Load it where you trust it and save it again with a current torch."
        )
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds pickled objects other than tensors{f' ({refused[1]})' if refused else ''}, which could run "
            "code; it is refused. If it is not part of the model, move it out of the folder."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name in ("module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors.")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def source_files(source: Path) -> Iterator[SourceFile]:
    """Every weight file in a folder; a set of shards counts as one, hidden folders are download caches."""
    paths = sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    in_shards: set[Path] = set()
    for path in paths:
        if path.name.endswith(".safetensors.index.json"):
            files = sharded_headers(path)
            in_shards |= files.keys()
            yield SafetensorsSource(path, files)
    for path in paths:
        if path.suffix == ".safetensors" and path not in in_shards:
            yield SafetensorsSource(path, {path: safetensors_header(path)})
        elif path.suffix in {".pt", ".pth"}:
            yield TorchSource.of(path)
