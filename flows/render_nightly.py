"""Every manifest below a folder that is not done, one after the other: what a night is for."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.render_manifest import render_manifest
from tasks import storage
from tasks.artifacts import publish_night
from tasks.form import DEFAULT_OPTIONS, RenderOptions
from tasks.pending import find_manifests, is_done, output_below
from tasks.settings import Settings


def run_name() -> str:
    """What the run is called in Prefect's UI: `every manifest of nightly`."""
    return f"every manifest of {storage.name(flow_run.parameters['manifests'])}"


@flow(name="render-nightly", flow_run_name=run_name, validate_parameters=True)
def render_nightly(manifests: str, output: str, options: RenderOptions = DEFAULT_OPTIONS) -> State[Any]:
    """Render every manifest below a folder that is not done.

    Args:
        manifests: The folder of manifests, such as `gs://studio/manifests`; folders below it count.
        output: The folder for clips and results, such as `gs://studio/renders`. The clips of `spring.csv` go to
            `spring` in it.
        options: For every manifest.

    Returns:
        A failed state if the run of a manifest failed, otherwise a completed one.

    Raises:
        RefusedError: If the manifests cannot be listed or the checkpoint cannot be used.
    """
    settings = Settings()
    found = {uri: output_below(uri, manifests, output) for uri in find_manifests(manifests, output, settings=settings)}
    todo = {uri: below for uri, below in found.items() if not is_done(uri, below, options, settings=settings)}
    states = {uri: render_manifest(uri, below, options, return_state=True) for uri, below in todo.items()}
    publish_night(
        {uri: (state.name or state.type, state.message or "") for uri, state in states.items()}, found, folder=manifests
    )
    num_failed = sum(not state.is_completed() for state in states.values())
    message = f"{len(found)} manifests: {len(states) - num_failed} rendered, {num_failed} failed, "
    return (Failed if num_failed else Completed)(message=f"{message}{len(found) - len(states)} done before")
