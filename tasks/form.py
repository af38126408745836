"""What a person may choose about a run: the form in Prefect's UI, and the options of the command line.

Prefect draws the form from this model's JSON schema: a title is a label, a description the help below it, an `enum` a
list to choose from. A field that may be empty is declared as its own type alone, since the UI turns `X | None` into a
switch between two types.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from scail.config import DEFAULT_SIZE, MAX_FRAMES, PROFILES
from scail.quality import Verdict
from tasks.forecast import DEFAULT_DEVICE, full_clip_seconds
from tasks.jobs import ClipStatus
from tasks.settings import Settings

# Rows without a clip, or without a good one: of the others there is nothing to render.
SELECTABLE: tuple[str, ...] = (
    *(status for status in ClipStatus if status not in {ClipStatus.RENDERED, ClipStatus.SKIPPED, ClipStatus.DISABLED}),
    *(verdict for verdict in Verdict if verdict is not Verdict.OK),
)


def _known_profile(name: str) -> str:
    if name not in PROFILES:
        raise ValueError(f"came {name!r}, expected one of {', '.join(PROFILES)}")
    return name


def _selectable_status(name: str) -> str:
    if name not in SELECTABLE:
        raise ValueError(f"came {name!r}, expected one of {', '.join(SELECTABLE)}")
    return name


def _may_be_empty(schema: dict[str, Any]) -> None:
    """Prefect's server takes null for a field that says of no default; one of null it holds against the type."""
    del schema["default"]


def _profile_help() -> str:
    """Each profile with the time of one clip, as far as we have measured it."""
    lines = []
    for name, profile in PROFILES.items():
        how = [f"{_about(full_clip_seconds(profile))} a clip", f"{profile.sampling.num_inference_steps} steps"]
        how += ["float8"] if profile.quantization == "fp8" else []
        how += ["attention too"] if profile.attention else []
        how += ["only for weights with a step-distilled LoRA"] if profile.step_distilled else []
        lines.append(f"- {name}: {', '.join(how)}")
    height, width = DEFAULT_SIZE
    size = f"{MAX_FRAMES} frames at {height} × {width} on an {DEFAULT_DEVICE}"  # noqa: RUF001  # a sign, for readers
    # Prefect's UI takes a line break for a space, except where a paragraph ends.
    return "\n\n".join([f"Quality or speed, for rows that name no profile of their own ({size}).", *lines])


def _about(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"


ProfileName = Annotated[str, AfterValidator(_known_profile), WithJsonSchema({"type": "string", "enum": [*PROFILES]})]
Count = Annotated[int | None, Field(ge=1), WithJsonSchema({"type": "integer", "minimum": 1})]
OptionalText = Annotated[str | None, WithJsonSchema({"type": "string"})]
Selectable = Annotated[
    str, AfterValidator(_selectable_status), WithJsonSchema({"type": "string", "enum": [*SELECTABLE]})
]


class RenderOptions(BaseModel):
    """Everything has a sensible default: leave it as it is to render what is not rendered yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: ProfileName = Field(
        default_factory=lambda: Settings().profile,
        validate_default=True,
        title="Profile",
        description=_profile_help(),
    )
    only_status: tuple[Selectable, ...] = Field(
        (),
        title="Only rows whose status was",
        description="Take only rows that ended so when this manifest was last rendered to this output. "
        "Nothing selected: all rows. A row whose clip is there and that was not changed since is skipped in any case.",
    )
    limit: Count = Field(
        None,
        title="At most so many rows",
        description="Take only the first rows, as a trial. Empty: all rows.",
        json_schema_extra=_may_be_empty,
    )
    skip_invalid: bool = Field(
        False,
        title="Leave out malformed rows",
        description="Render the good rows and report the others. Off: a manifest with a malformed row is refused.",
    )
    dry_run: bool = Field(
        False,
        title="Dry run",
        description="Say what would be rendered, how long it takes and what it costs. Nothing is rendered.",
    )
    priority: int = Field(
        0,
        title="Priority",
        description="Where several runs share the GPUs, clips of a run with a higher number go first.",
    )
    max_gpus: Count = Field(
        None,
        title="GPUs at most",
        description="Hold no more than so many GPUs at a time. Empty: all that are free.",
        json_schema_extra=_may_be_empty,
    )
    checkpoint: OptionalText = Field(
        None,
        title="Checkpoint folder",
        description="The weights, as the machines that render see them. Empty: those that the operator has set up.",
        json_schema_extra=_may_be_empty,
    )


DEFAULT_OPTIONS = RenderOptions()
