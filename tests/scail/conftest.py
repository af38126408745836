"""A whole model of random weights, small enough for a CPU, and something to render with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY
from scail.pipeline import ScailPipeline

Calls = list[tuple[Any, ...]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose much where several test runs share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    return folder


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> ScailPipeline:
    """Shared by all tests; whoever wants to change one of its networks loads another one from `tiny_checkpoint`."""
    return ScailPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture
def reference() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (40, 72, 3), np.uint8)


@pytest.fixture
def pose() -> NDArray[np.uint8]:
    return np.random.default_rng(2).integers(0, 256, (9, 48, 80, 3), np.uint8)


@pytest.fixture
def record_calls() -> Iterator[Callable[[nn.Module], Calls]]:
    """Call it with a network and get a list that grows by the positional arguments of each of its calls."""
    handles = []

    def record(module: nn.Module) -> Calls:
        calls: Calls = []
        handles.append(module.register_forward_pre_hook(lambda _module, args: calls.append(args)))
        return calls

    yield record
    for handle in handles:
        handle.remove()


@pytest.fixture
def layers_called() -> Iterator[list[str]]:
    """The class of every layer that any network calls while the test runs."""
    names: list[str] = []
    handle = register_module_forward_pre_hook(lambda module, _args: names.append(type(module).__name__))
    yield names
    handle.remove()
