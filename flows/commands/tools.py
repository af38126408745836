"""`scail convert`, `doctor`, `bench`, `eval`, `pose`: what is done beside the renders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.console import ExitCode, err, out, refuse
from flows.commands.options import CheckpointOption
from scail.config import LoraFile
from tasks.checkpoint import inspect_checkpoint, miniature
from tasks.errors import RefusedError
from tasks.measure import DEFAULT_PARTS, PARTS_HELP, measure
from tasks.settings import Settings


def convert(
    source: Annotated[
        Path, typer.Argument(help="Official SCAIL-Preview folder, `wan` layout, Wan2GP, ComfyUI, or a folder of ours.")
    ],
    dest: Annotated[Path, typer.Argument(help="Checkpoint folder to write; it must not exist or be empty.")],
    quantize: Annotated[
        str, typer.Option(help="`fp8` (Hopper, Ada) or `int8` (Ampere): half the size, for profiles quality and fast.")
    ] = "none",
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE:STRENGTH, fused into the transformer; may be given again.")
    ] = None,
    transformer_heads: Annotated[
        int | None, typer.Option(hidden=True, help="Of a model that is not SCAIL-14B.")
    ] = None,
    image_heads: Annotated[int | None, typer.Option(hidden=True, help="Of a tower that is not ViT-H.")] = None,
) -> None:
    """Turn original weight files into a checkpoint folder, once; or a folder of ours into another one."""
    from flows.prepare_checkpoint import prepare_checkpoint

    try:
        model = prepare_checkpoint(
            source,
            dest,
            quantization=quantize,
            loras=[LoraFile.parse(text) for text in lora or ()],
            transformer_heads=transformer_heads,
            image_heads=image_heads,
            say=lambda line: err.print(line, markup=False),
        )
    except RefusedError as error:
        refuse(error)
    out.print(f"{model.name}, fingerprint {model.fingerprint} → {dest}", markup=False)


def doctor(checkpoint: CheckpointOption = None) -> None:
    """Look at the checkpoint, ffmpeg, decord, the GPU and Prefect's API; one line each."""
    from tasks.doctor import examine

    findings = examine(checkpoint or Settings().checkpoint)
    for finding in findings:
        out.print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what:<14} {finding.message}", markup=False)
    raise typer.Exit(ExitCode.OK if all(finding.ok for finding in findings) else ExitCode.SOME_FAILED)


def bench(
    model: Annotated[str, typer.Option(help="`14b` or `tiny`; its weights are random.")] = "14b",
    frames: Annotated[int, typer.Option(min=1, max=81)] = 81,
    height: Annotated[int, typer.Option(min=32)] = 512,
    width: Annotated[int, typer.Option(min=32)] = 896,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the time of one does not depend on it.")] = 2,
    only: Annotated[str, typer.Option(help=PARTS_HELP)] = ",".join(DEFAULT_PARTS),
    clips: Annotated[int, typer.Option(min=2, help="Clips of the part `clips`.")] = 20,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
) -> None:
    """Measure random weights on this machine: each figure beside its goal, and a peer or a ceiling of this device."""
    try:
        lines, document = measure(
            model,
            num_frames=frames,
            height=height,
            width=width,
            num_steps=steps,
            only=[part.strip() for part in only.split(",")],
            num_clips=clips,
        )
    except RefusedError as error:
        refuse(error)
    out.print(lines, markup=False)
    if json:
        json.write_text(document, encoding="utf-8")


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint folder. [default: the miniature that comes with the program]")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips to render; each once more with another pose.")] = 24,
    frames: Annotated[int, typer.Option(min=1, max=81)] = 17,
    steps: Annotated[int, typer.Option(min=1)] = 8,
    guidance: Annotated[float, typer.Option(min=0)] = 1.0,
    json: Annotated[Path | None, typer.Option(help="Write every score to this file.")] = None,
) -> None:
    """Score a checkpoint on characters and motions that it was not trained on; exit code 1 if a goal is missed."""
    from tasks.scores import score_checkpoint

    model = checkpoint or str(miniature() or Settings().checkpoint)
    try:
        inspect_checkpoint(model)
        lines, document, ok = score_checkpoint(
            model, num_clips=clips, num_frames=frames, num_steps=steps, guidance_scale=guidance
        )
    except RefusedError as error:
        refuse(error)
    out.print(lines, markup=False)
    if json:
        json.write_text(document, encoding="utf-8")
    raise typer.Exit(ExitCode.OK if ok else ExitCode.SOME_FAILED)


def render_pose_file(
    joints: Annotated[Path, typer.Argument(help="Pose file (.npz): SMPL joints in camera millimetres.")],
    video: Annotated[Path, typer.Argument(help="The mp4 to write.")],
    height: Annotated[int | None, typer.Option(min=2, help="Rows; with --width. [default: the pose file's]")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="Columns; with --height.")] = None,
    two_persons: Annotated[bool, typer.Option("--two-persons", help="Colours that tell persons apart.")] = False,
    align_to: Annotated[
        Path | None,
        typer.Option(
            help="Pose file (.npz) of the reference image, of which 2D points are enough: the camera is moved so that "
            "the first person stands where the reference's does, and as tall."
        ),
    ] = None,
) -> None:
    """Draw a pose file as the official renderer does."""
    from tasks.pose import render_pose_video

    try:
        num_frames = render_pose_video(
            joints, video, height=height, width=width, two_persons=two_persons, align_to=align_to
        )
    except RefusedError as error:
        refuse(error)
    out.print(f"{num_frames} frames → {video}", markup=False)
