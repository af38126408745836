"""What the Prefect server does by itself when an event comes, or when one fails to come.

Silent runs crash         a run whose heartbeats stop, because its machine died, is marked as crashed
Crashed runs go on        a crashed run of a deployment is scheduled again; it renders what is not done yet
Unstarted runs come back  a run that was taken and never began, because its machine died first, is scheduled again
Uploads are seen          an event about an upload starts the inbox's deployment at once, not at its next minute
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import cast
from uuid import UUID

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from tasks.bucket_events import UPLOADED

HEARTBEAT_SECONDS = 30  # PREFECT_FLOWS_HEARTBEAT_FREQUENCY of whatever runs the flows; Prefect takes no less
SILENCE_SECONDS = 90  # three heartbeats
SETTLING_SECONDS = 15  # Prefect's worker reports a killed process twice, a few seconds apart
MAX_RUN_COUNT = 10  # a run that crashes ten times has a reason that an eleventh start does not mend
UNSTARTED_SECONDS = 900  # a machine may have to be found for a run, and an image fetched
RESTARTED_DEPLOYMENTS = ("render-manifest", "render-nightly")  # the inbox's next minute takes over what it left

_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")


def silent_runs_crash(within_seconds: float = SILENCE_SECONDS) -> Automation:
    """A run that had a heartbeat, and for so long neither another one nor an end, is crashed."""
    heartbeat = "prefect.flow-run.heartbeat"
    return Automation(
        name="scail: silent runs crash",
        description="A run whose heartbeats stop, because its machine died, is marked as crashed.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{end}" for end in _ENDS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=within_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"no heartbeat for {within_seconds:.0f} s: its machine is gone"
            )
        ],
    )


def crashed_runs_go_on(deployments: Sequence[str] = RESTARTED_DEPLOYMENTS) -> Automation:
    """A crashed run of one of these deployments is given to a worker again, nine times at most.

    Not at once: the second report of one crash would end the run that is scheduled again, and nobody would start it.
    """
    return Automation(
        name="scail: crashed runs go on",
        description="A crashed run is scheduled again; what is published is not rendered again.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Crashed"},
            expect={"prefect.flow-run.Running", *(f"prefect.flow-run.{end}" for end in _ENDS if end != "Crashed")},
            match=ResourceSpecification(
                {
                    "prefect.resource.id": ["prefect.flow-run.*"],
                    "prefect.run-count": [str(count) for count in range(1, MAX_RUN_COUNT)],
                }
            ),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "deployment", "prefect.resource.name": list(deployments)}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=SETTLING_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED, name="AwaitingRetry", message="crashed; goes on with what is not done yet"
            )
        ],
    )


def unstarted_runs_come_back(deployments: Sequence[str], within_seconds: float = UNSTARTED_SECONDS) -> Automation:
    """A run of one of these deployments that a worker took, and of which nothing was heard since, goes to another one.

    It has had no heartbeat yet whose absence could be noticed. Should it begin after all, both runs share the clips.
    """
    return Automation(
        name="scail: unstarted runs come back",
        description="A run that was taken and did not begin, because its machine died first, is scheduled again.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Pending"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "deployment", "prefect.resource.name": list(deployments)}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=within_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message=f"did not begin within {within_seconds:.0f} s: its machine is gone",
            )
        ],
    )


def uploads_are_seen(watch_inbox_deployment: UUID) -> Automation:
    """An event of `tasks/bucket_events.py` starts the inbox's deployment."""
    return Automation(
        name="scail: uploads are seen",
        description="An upload to the inbox is looked at when its event comes, not at the next minute.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={UPLOADED},
            match=ResourceSpecification({"prefect.resource.id": ["scail.upload.*"]}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(0),
        ),
        actions=[RunDeployment(source="selected", deployment_id=watch_inbox_deployment)],
    )


def register(automations: Sequence[Automation]) -> None:
    """Create them on the server, or bring those of the same name up to date."""
    for automation in automations:
        try:
            known = cast(Automation, Automation.read(name=automation.name))  # typed as if it had to be awaited
        except ValueError:  # there is none of this name
            automation.create()
        else:
            automation.id = known.id
            automation.update()
