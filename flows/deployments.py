"""What `scail deploy` registers with a Prefect server. infra/prefect.yaml says the same in Prefect's own words.

A worker of the pool `scail` runs them: `prefect worker start --pool scail`, on any machine on which this package is
installed. A pool and not `serve`: the deployments stay when the process that registered them ends; several
machines may work for one pool; the UI shows whether a worker is there; and each run is a process of its own, whose
death is noticed. Entrypoints are modules of the installed package, so that no code is fetched and no folder is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType

from flows import automations
from flows.render_manifest import render_manifest
from flows.render_nightly import render_nightly
from flows.watch_inbox import watch_inbox
from scail import __version__
from tasks.errors import RefusedError

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

WORK_POOL, WORK_POOL_TYPE = "scail", "process"
RUN_ENVIRONMENT = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(automations.HEARTBEAT_SECONDS),  # without it, no silence is noticed
    "PREFECT_LOGGING_EXTRA_LOGGERS": "scail,tasks,flows",  # our own lines are on the run's page
}
TAGS = ["scail"]
TIMEZONE = "UTC"


@dataclass(frozen=True)
class Deployment:
    """One way in. It has the name of its flow.

    Attributes:
        flow: A function of a module of ours.
        description: On the deployment's page, above the button that opens the form.
        folders: Parameters that the operator gives once, for all runs: `inbox`, `manifests`, `output`.
        schedule: A cron line, or seconds between two runs; None: on demand.
        is_active: Whether the schedule runs as soon as it is registered.
        limit: Runs at a time; None: any number.
        on_collision: What becomes of a run that is one too many.
    """

    flow: Flow[..., Any]
    description: str
    folders: tuple[str, ...]
    schedule: str | int | None = None
    is_active: bool = True
    limit: int | None = None
    on_collision: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"

    @property
    def name(self) -> str:
        return self.flow.name

    @property
    def entrypoint(self) -> str:
        return f"{self.flow.fn.__module__}.{self.flow.fn.__name__}"


DEPLOYMENTS = (
    Deployment(
        flow=render_manifest,
        description="Render one manifest: fill in the form.",
        folders=("output",),
    ),
    Deployment(
        flow=render_nightly,
        description="Render every manifest below a folder that is not done. Switch the schedule on to have it nightly.",
        folders=("manifests", "output"),
        schedule="0 20 * * *",
        is_active=False,
        limit=1,
        on_collision="CANCEL_NEW",
    ),
    Deployment(
        flow=watch_inbox,
        description="Look into the inbox. A manifest that was put there is rendered once.",
        folders=("inbox", "output"),
        schedule=60,
        limit=4,  # a look that finds a manifest lasts until that is rendered, and the next look finds the next one
        on_collision="CANCEL_NEW",
    ),
)


@dataclass(frozen=True)
class Registered:
    """A deployment as the server has it now."""

    id: UUID
    name: str
    schedule: str | int | None
    is_active: bool
    missing: tuple[str, ...]  # folders that nobody named, without which no schedule can run

    def __str__(self) -> str:
        match self.schedule:
            case None:
                when = "on demand"
            case int(seconds):
                when = f"every {seconds} s"
            case cron:
                when = f"at {cron} {TIMEZONE}"
        needs = ", ".join(f"--{name} or SCAIL_{name.upper()}" for name in self.missing)
        off = f", switched off until it has {needs}" if needs else "" if self.is_active else ", switched off"
        return f"{self.name:<16} {when}{off}"


def deploy(folders: Mapping[str, str | None]) -> list[Registered]:
    """Register every deployment and automation, or bring them up to date.

    A schedule that somebody has switched on or off in the UI stays as it is.

    Args:
        folders: URIs by name; see `Deployment.folders`.

    Raises:
        RefusedError: If no server is configured: a temporary one would forget them.
    """
    if not PREFECT_API_URL.value():
        raise RefusedError("there is no Prefect server to register with: set PREFECT_API_URL (see docs/ways-in.md)")
    with get_client(sync_client=True) as client:
        ensure_work_pool(client)
        registered = [register(client, deployment, folders) for deployment in DEPLOYMENTS]
    ids = {item.name: item.id for item in registered}
    automations.register(
        [
            automations.silent_runs_crash(),
            automations.crashed_runs_go_on(),
            automations.unstarted_runs_come_back(list(ids)),
            automations.uploads_are_seen(ids[watch_inbox.name]),
        ]
    )
    return registered


def ensure_work_pool(client: SyncPrefectClient) -> None:
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type=WORK_POOL_TYPE, base_job_template=template))


def register(client: SyncPrefectClient, deployment: Deployment, folders: Mapping[str, str | None]) -> Registered:
    """Register one deployment; without a folder that it needs its schedule is off."""
    name = deployment.name
    given = {folder: uri for folder in deployment.folders if (uri := folders.get(folder))}
    missing = tuple(folder for folder in deployment.folders if folder not in given) if deployment.schedule else ()
    found = find(client, f"{name}/{name}")
    is_active = deployment.is_active and not missing
    if found and found.schedules and not missing and set(deployment.folders) <= set(found.parameters):
        is_active = found.schedules[0].active
    limit = deployment.limit and ConcurrencyLimitConfig(
        limit=deployment.limit, collision_strategy=ConcurrencyLimitStrategy(deployment.on_collision)
    )
    wanted = deployment.flow.to_deployment(
        name,
        parameters=given,
        schedules=schedules_of(deployment, is_active=is_active),
        concurrency_limit=limit,
        description=deployment.description,
        tags=TAGS,
        version=__version__,
        work_pool_name=WORK_POOL,
        job_variables={"env": RUN_ENVIRONMENT},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    deployment_id = cast(RunnerDeployment, wanted).apply()  # both are coroutines only where an event loop runs
    return Registered(cast(UUID, deployment_id), name, deployment.schedule, is_active, missing)


def schedules_of(deployment: Deployment, *, is_active: bool) -> list[DeploymentScheduleCreate]:
    match deployment.schedule:
        case None:
            return []
        case int(seconds):
            schedule: CronSchedule | IntervalSchedule = IntervalSchedule(interval=timedelta(seconds=seconds))
        case cron:
            schedule = CronSchedule(cron=cron, timezone=TIMEZONE)
    return [DeploymentScheduleCreate(schedule=schedule, active=is_active)]


def find(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None
