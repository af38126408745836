from __future__ import annotations

import os

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from tasks.errors import RefusedError
from tasks.resident import choose_device, keep_compiled


def test_compilers_keep_their_work_where_the_next_worker_looks(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)

    keep_compiled(tmp_path)

    assert cache_dir() == str(tmp_path / "compiled")
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(tmp_path))


def test_a_place_that_somebody_chose_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))

    keep_compiled(tmp_path)

    assert cache_dir() == os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "theirs")


@pytest.fixture
def as_if_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(("visible", "found"), [("1", 2), ("0,1", 3)])
def test_a_gpu_that_was_named_too_late_is_refused(monkeypatch, as_if_with_gpus, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: found, raising=False)

    with pytest.raises(RefusedError, match=f"CUDA_VISIBLE_DEVICES is '{visible}', but CUDA sees {found} GPUs"):
        choose_device("cuda", "auto")


@pytest.mark.parametrize(("visible", "found"), [("1", 1), ("GPU-7,GPU-9", 2), ("0,1,9", 2), (None, 8)])
def test_gpus_that_were_named_in_time_are_taken(monkeypatch, as_if_with_gpus, visible, found):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: found, raising=False)

    assert choose_device("cuda", "auto") == (torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("visible", [None, "0"])
def test_without_a_gpu_the_choice_is_left_to_whoever_uses_it(monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert choose_device("cuda:0", "float32") == (torch.device("cuda:0"), torch.float32)
