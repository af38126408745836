"""A cluster for the tests of this folder, one in each process; what a test killed is there again before the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import object_store
from tests.chaos.harness import Cluster
from tests.tasks.emulators import google_server
from tests.tasks.fault_proxy import FaultProxy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the cluster is of `make chaos`; arithmetic that is tested here, too, is not."""
    for item in items:
        if item.path.parent == Path(__file__).parent and "shared_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[FaultProxy]:
    """A server for gs:// that the workers know, and a proxy before it that can turn requests away."""
    with google_server() as proxy:
        yield proxy


@pytest.fixture
def bucket(bucket_server: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The bucket, as this process finds it too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    object_store._filesystem.cache_clear()
    bucket_server.reset()
    yield bucket_server
    bucket_server.reset()
    object_store._filesystem.cache_clear()


@pytest.fixture(scope="session")
def shared_cluster(
    tmp_path_factory: pytest.TempPathFactory, bucket_server: FaultProxy, migrated_database: Path
) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(root, bucket_url=bucket_server.url, database=migrated_database)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    shared_cluster.wait_for_workers()
    yield shared_cluster
    shared_cluster.end_commands()
