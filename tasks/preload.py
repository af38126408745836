"""What a Dask worker does before it registers: it starts its watchdog, loads the model and learns how to end.

Named to Dask as a preload, so that it runs again whenever the nanny starts the process anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks import attempts, ending, thrift, watchdog
from tasks.checkpoint import inspect_checkpoint
from tasks.resident import load_pipeline, pipeline_spec
from tasks.scratch import sweep_scratch
from tasks.settings import Settings

if TYPE_CHECKING:
    from distributed import Worker


def dask_setup(worker: Worker) -> None:
    thrift.begin()
    settings = Settings()
    watchdog.start()
    sweep_scratch(settings.scratch_dir)
    model = inspect_checkpoint(settings.checkpoint)
    load_pipeline(pipeline_spec(settings.checkpoint, model.fingerprint, profile=settings.profile, settings=settings))
    thrift.settle()
    ending.listen(worker)  # last: until here there is nothing that a signal could interrupt too soon


def dask_teardown(_worker: Worker) -> None:
    attempts.worker_closing.set()
