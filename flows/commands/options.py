"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.form import SELECTABLE

ManifestArgument = Annotated[str, typer.Argument(help="URI of a CSV or JSONL manifest.")]
OutputOption = Annotated[str, typer.Option(help="URI of the folder for clips and results.")]
CheckpointOption = Annotated[str | None, typer.Option(help="Checkpoint folder. [default: SCAIL_CHECKPOINT]")]
ProfileOption = Annotated[str | None, typer.Option(help="Sampling profile of rows that name none.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Take only the first rows.")]
OnlyStatusOption = Annotated[
    list[str],
    typer.Option(help=f"Take only rows that ended so in the last run: {', '.join(SELECTABLE)}. May be repeated."),
]
SkipInvalidOption = Annotated[bool, typer.Option("--skip-invalid", help="Render the good rows, report the others.")]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        help="`local`, a number of processes, or a Dask scheduler's tls://host:port. [default: SCAIL_WORKERS]"
    ),
]
PriorityOption = Annotated[int, typer.Option(help="On a cluster, runs with a higher number come first.")]
MaxGpusOption = Annotated[
    int | None, typer.Option(min=1, help="Of a cluster's GPUs, hold so many at most. [default: all]")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's and our own log.")]
