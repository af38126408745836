"""Every manifest below a folder that is not done, one after the other: what a night is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.render_manifest import render_manifest
from tasks import storage
from tasks.artifacts import ManifestEnd, publish_night
from tasks.errors import RefusedError
from tasks.form import DEFAULT_OPTIONS, RenderOptions
from tasks.pending import find_manifests, is_done, output_below
from tasks.results import counts_line, summary_in
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
    ends = [end_of(uri, below, states.get(uri)) for uri, below in found.items()]
    publish_night(ends, folder=manifests)
    return closing_state(ends, [uri for uri, state in states.items() if not state.is_completed()], num_run=len(states))


def end_of(manifest: str, output: str, state: State[Any] | None) -> ManifestEnd:
    """What became of a manifest, by the state of its run; None: it was done before."""
    if state is None:
        return ManifestEnd(manifest, output, "done before", "", has_report=True)
    result = None if state.is_cancelled() else state.result(raise_on_failure=False)
    if (summary := summary_in(result)) is not None:
        why = "" if state.is_completed() else counts_line(summary.counts)
    else:
        why = "; ".join(result.lines) if isinstance(result, RefusedError) and result.lines else str(result or "")
    return ManifestEnd(manifest, output, state.name or state.type, why, has_report=summary is not None)


def closing_state(ends: Sequence[ManifestEnd], failed: Sequence[str], *, num_run: int) -> State[Any]:
    """The night's last state: failed if the run of a manifest is, and then with the reasons below the message."""
    message = f"{len(ends)} manifests: {num_run - len(failed)} rendered, {len(failed)} failed, "
    lines = [f"{storage.name(end.manifest)}: {end.why}" for end in ends if end.manifest in failed]
    message = "\n".join([f"{message}{len(ends) - num_run} done before", *lines])
    return (Failed if failed else Completed)(message=message)
