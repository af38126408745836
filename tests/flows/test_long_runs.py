"""What a flow of many clips may not keep."""

from __future__ import annotations

from prefect import flow, task
from prefect.context import FlowRunContext

from tasks import cluster


@task
def double(number: int) -> int:
    return 2 * number


def test_of_tasks_that_were_submitted_nothing_is_kept_about_assets(monkeypatch):
    monkeypatch.setattr(cluster, "renders_here", lambda: False)
    num_kept, results = [], []

    @flow
    def many() -> None:
        context = FlowRunContext.get()
        for call in (double, cluster.at_priority(double, 0)):
            results.append(call(2))
            num_kept.append(len(context.task_run_assets))

    many()

    assert results == [4, 4]
    assert num_kept == [1, 0]  # 1: when Prefect no longer keeps anything itself, ours can go
