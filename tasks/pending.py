"""Which manifests of a folder are not done: for the run that renders them all, night after night."""

from __future__ import annotations

from pathlib import PurePosixPath

from tasks import storage
from tasks.checkpoint import inspect_checkpoint
from tasks.errors import RefusedError
from tasks.form import RenderOptions
from tasks.plan import plan_with
from tasks.selection import choose_rows
from tasks.settings import Settings
from tasks.storage import StorageError

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})


def find_manifests(folder_uri: str, output_uri: str, *, settings: Settings) -> list[str]:
    """URIs of the manifests below a folder, at any depth, in the order of their names.

    Raises:
        RefusedError: If the folder cannot be listed, or if the output lies in it: results.csv would be a manifest.
    """
    if f"{output_uri.rstrip('/')}/".startswith(f"{folder_uri.rstrip('/')}/"):
        raise RefusedError(
            f"the output {output_uri} lies in the folder of the manifests, {folder_uri}: keep them apart"
        )
    try:
        found = storage.list_files(folder_uri, policy=settings.storage_policy())
    except StorageError as error:
        raise RefusedError(f"manifests cannot be listed: {error}") from error
    return [uri for uri in found if PurePosixPath(storage.name(uri)).suffix.lower() in SUFFIXES]


def output_below(manifest_uri: str, folder_uri: str, output_uri: str) -> str:
    """Where a manifest's clips go: FOLDER/a/spring.csv → OUTPUT/a/spring.

    Two manifests may use one clip_id for two clips, so that they may not share a folder.
    """
    path, folder = storage.local_path(manifest_uri), storage.local_path(folder_uri)
    if path is not None and folder is not None:
        place = path.absolute().relative_to(folder.absolute()).as_posix()
    else:
        place = manifest_uri.removeprefix(f"{folder_uri.rstrip('/')}/")
    return storage.join(output_uri, str(PurePosixPath(place).with_suffix("")))


def is_done(manifest_uri: str, output_uri: str, options: RenderOptions, *, settings: Settings) -> bool:
    """Whether nothing of a manifest is left to render. One that cannot be used is not done.

    Raises:
        RefusedError: If the checkpoint cannot be used.
    """
    model = inspect_checkpoint(options.checkpoint or settings.checkpoint)
    try:
        rows = choose_rows(manifest_uri, output_uri, options, policy=settings.storage_policy())
        plan = plan_with(settings, model, rows.requests, output_uri=output_uri, default_profile=options.profile)
    except RefusedError:
        return False
    return not plan.jobs
