"""Checkpoints in a bucket: planned without their weights, fetched once, checked, loaded while they arrive."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from scail import ScailPipeline, checkpoint
from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_TINY
from scail.errors import CheckpointError
from scail.fingerprint import LOADING_ORDER, Component, check_folder, checkpoint_fingerprint
from tasks import checkpoint_cache, doctor, storage
from tasks.checkpoint import inspect_checkpoint, opened
from tasks.checkpoint_cache import Arrival
from tasks.errors import RefusedError
from tasks.settings import Settings
from tasks.storage import DEFAULT_POLICY, DamagedError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    return folder


@pytest.fixture
def bucket(original, tmp_path) -> str:
    """The folder in a store without local paths; another one for each test."""
    uri = f"memory://{tmp_path.name}/SCAIL_TINY"
    for path in original.rglob("*"):
        if path.is_file():
            storage.publish_file(path, storage.join(uri, path.relative_to(original).as_posix()))
    return uri


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SCAIL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    names: list[str] = []
    download = storage.download
    monkeypatch.setattr(storage, "download", lambda uri, path, **kw: names.append(uri) or download(uri, path, **kw))
    return names


def fetch(uri: str) -> Path:
    """All of it."""
    with opened(uri, (), Settings()) as checkpoint:
        return checkpoint.folder


def test_a_plan_needs_no_weights(bucket, original, cache, downloads):
    model = inspect_checkpoint(bucket)

    assert model.fingerprint == checkpoint_fingerprint(original)
    assert (model.path, model.name) == (bucket, "SCAIL_TINY")
    assert not any(name.endswith(".safetensors") for name in downloads)


def test_the_whole_folder_is_fetched_once(bucket, original, downloads):
    folder = fetch(bucket)
    first = list(downloads)

    assert check_folder(folder) == []
    assert checkpoint_fingerprint(folder) == checkpoint_fingerprint(original)
    assert (folder / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()
    assert fetch(bucket) == folder
    assert downloads == first


def test_what_was_fetched_is_not_hashed_again(bucket, monkeypatch):
    folder = fetch(bucket)
    monkeypatch.setattr("hashlib.file_digest", lambda *_args: pytest.fail("a file was read"))

    checkpoint_fingerprint(folder)


def test_of_a_changed_folder_what_changed_is_fetched_again(bucket, original, tmp_path, downloads):
    before = fetch(bucket)
    changed = tmp_path / "changed"
    write_random_checkpoint(changed, SCAIL_TINY, seed=1)
    for name in (WEIGHTS, "files.json"):
        storage.publish_file(changed / name, storage.join(bucket, name))
    record = json.loads((original / "files.json").read_text())
    record[WEIGHTS] = json.loads((changed / "files.json").read_text())[WEIGHTS]
    storage.publish_bytes(storage.join(bucket, "files.json"), json.dumps(record).encode())
    downloads.clear()

    after = fetch(bucket)

    assert after == before
    assert downloads == [storage.join(bucket, WEIGHTS)]
    assert (after / WEIGHTS).read_bytes() == (changed / WEIGHTS).read_bytes()


def test_a_file_that_is_not_what_its_record_says_is_refused_and_not_kept(bucket, cache):
    storage.publish_bytes(storage.join(bucket, WEIGHTS), b"somebody else's")

    with pytest.raises(DamagedError, match=r"is not the file that files\.json describes"):
        fetch(bucket)

    assert not list(cache.rglob("*.safetensors")) or not list(cache.rglob(f"*/{WEIGHTS}"))


def test_workers_that_start_together_fetch_it_once(bucket, cache, downloads):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(bucket), range(4)))

    assert len(folders) == 1
    assert len(downloads) == len(set(downloads))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "has no files.json"),
        ("no json", "cannot be read"),
        ({"../../.bashrc": {"size": 1, "mtime_ns": 1, "sha256": "0"}}, "names '../../.bashrc', which no checkpoint"),
        ({"/etc/passwd": {"size": 1, "mtime_ns": 1, "sha256": "0"}}, "which no checkpoint holds"),
        ({"vae/config.json": {"size": 1}}, "which no checkpoint holds"),
    ],
)
def test_a_folder_without_a_true_record_is_refused(record, message, bucket, cache):
    uri = storage.join(bucket, "files.json")
    if record is None:
        storage.delete(uri)
    else:
        storage.publish_bytes(uri, record.encode() if isinstance(record, str) else json.dumps(record).encode())

    with pytest.raises(CheckpointError, match=message):
        fetch(bucket)
    with pytest.raises(RefusedError, match=message):
        inspect_checkpoint(bucket)


def test_a_network_is_loaded_while_the_next_ones_files_arrive(bucket, original, monkeypatch):
    loaded: dict[str, threading.Event] = {component.folder: threading.Event() for component in LOADING_ORDER}
    before = dict(zip(loaded, [None, *loaded], strict=False))
    download, load_weights = storage.download, checkpoint.load_weights

    def download_in_time(uri: str, path: Path, **options: Any) -> None:
        folder = path.parent.name
        if path.suffix == ".safetensors" and (earlier := before[folder]):
            assert loaded[earlier].wait(timeout=30), f"{folder} was wanted before {earlier} was loaded"
        download(uri, path, **options)

    def load_and_tell(module: nn.Module, folder: Path, component: Component, **options: Any) -> nn.Module:
        module = load_weights(module, folder, component, **options)
        loaded[component.folder].set()
        return module

    monkeypatch.setattr(storage, "download", download_in_time)
    monkeypatch.setattr(checkpoint, "load_weights", load_and_tell)

    with opened(bucket, (), Settings()) as arriving:
        pipeline = load(arriving.folder, wait_for=arriving.wait_for)

    assert arriving.fingerprint == checkpoint_fingerprint(original) == checkpoint_fingerprint(arriving.folder)
    expected = load(original).transformer.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in pipeline.transformer.state_dict().items())


def load(folder: Path, **options: Any) -> ScailPipeline:
    return ScailPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32, **options)


def test_what_another_process_brings_is_loaded_while_it_fetches_the_rest(bucket, original, cache):
    arrival = Arrival(bucket, cache, policy=DEFAULT_POLICY)
    brought = {name: entry for name, entry in arrival.record.items() if name != WEIGHTS}

    def take_what_is_here() -> NoReturn:
        arrival.wait_for("text_encoder")
        assert arrival._here == brought.keys()
        raise ValueError("no time for the rest")

    with checkpoint_cache._locked(arrival.folder, meanwhile=lambda: pytest.fail("nobody else has it")):
        assert inspect_checkpoint(bucket).name == "SCAIL_TINY"
        checkpoint_cache._fetch(bucket, arrival.folder, brought, DEFAULT_POLICY)
        with pytest.raises(ValueError, match="no time"), arrival:  # which ends though the other still fetches
            take_what_is_here()

    assert fetch(bucket) == arrival.folder
    assert (arrival.folder / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()


def test_whoever_waits_for_a_file_that_cannot_come_is_told(bucket, cache):
    storage.publish_bytes(storage.join(bucket, WEIGHTS), b"somebody else's")

    with (
        pytest.raises(DamagedError, match=r"transformer/.* is not the file"),
        Arrival(bucket, cache, policy=DEFAULT_POLICY) as arrival,
    ):
        load(arrival.folder, wait_for=arrival.wait_for)


def test_after_a_failure_no_other_file_is_begun(bucket, cache, downloads, monkeypatch):
    monkeypatch.setattr(checkpoint_cache, "NUM_THREADS", 1)
    arrival, begun = Arrival(bucket, cache, policy=DEFAULT_POLICY), threading.Event()
    fetch_file = checkpoint_cache._fetch_file

    def fetch_until_the_failure(uri: str, name: str, *args: Any) -> None:
        if name.endswith(".safetensors"):
            begun.set()
            assert arrival._stop.wait(timeout=30)
        fetch_file(uri, name, *args)

    monkeypatch.setattr(checkpoint_cache, "_fetch_file", fetch_until_the_failure)

    def fail_once_it_is_begun() -> NoReturn:
        assert begun.wait(timeout=30)
        raise ValueError("another checkpoint")

    with pytest.raises(ValueError, match="another checkpoint"), arrival:
        fail_once_it_is_begun()

    first = "vae/diffusion_pytorch_model.safetensors"
    assert [name for name in downloads if name.endswith(".safetensors")] == [storage.join(bucket, first)]
    assert (arrival.folder / first).is_file()  # for the next time


def test_the_doctor_looks_at_a_bucket_too(bucket):
    [finding] = doctor._checkpoint(bucket)
    [missing] = doctor._checkpoint(f"{bucket}-none")

    assert finding.ok
    assert "SCAIL_TINY" in finding.message
    assert not missing.ok


def test_another_process_is_told_the_same_place(bucket):
    assert checkpoint_cache.absolute(bucket) == bucket
    assert checkpoint_cache.absolute("checkpoints/a") == str(Path("checkpoints/a").absolute())
