from __future__ import annotations

import os

from torch._inductor.runtime.cache_dir_utils import cache_dir

from tasks.resident import keep_compiled


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
