"""What `scail.mini.fidelity` measured, as a page, and the rule by which a shortcut may be a default."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from scail.mini.shortcuts import SHORTCUTS, Shortcut

MAX_LIMB_COST_PERCENT = 0.3  # of the frame height
MIN_PSNR = 35.0

_COLUMNS = (
    "shortcut", "device", "latents, RMS", "frames", "limbs off", "colours off", "speed", "may be a default", "is one",
)  # fmt: skip
_INTRODUCTION = f"""# What each shortcut costs

Held-out clips of the miniature, rendered with the same seeds along the exact path and along it with one thing changed.
The exact path is float32 throughout, PyTorch's own attention, nothing compiled, nothing quantised, Euler's method, the
library's pass through the VAE, every encoding made anew, everything resident, one process. Latents and frames are
compared with its own on the same device; limbs and colours with the truth, as `scail eval` does, and in brackets with
what the exact path reaches.

A shortcut that costs more than {MAX_LIMB_COST_PERCENT} % of the frame height in limb error, or leaves less than
{MIN_PSNR:g} dB, is not a default; a test holds the defaults in the code against this page. Speed is the
miniature's: on a network this small, launches and conversions weigh more than arithmetic. The 14B's is in
[performance.md](performance.md).

Written by `python -m scail.mini.fidelity`; docs/fidelity.json holds the numbers."""


def is_too_dear(row: dict[str, Any], exact: dict[str, Any]) -> bool:
    """Whether a shortcut may not be a default; `psnr` None is equal."""
    if "failed" in row:
        return True
    too_far = row["psnr"] is not None and not row["psnr"] >= MIN_PSNR
    return too_far or not limb_cost(row, exact) <= MAX_LIMB_COST_PERCENT


def limb_cost(row: dict[str, Any], exact: dict[str, Any]) -> float:
    """Percent of the frame height by which limbs are farther off than along the exact path."""
    return float(row["limb_error_percent"] - exact["limb_error_percent"])


def page(report: dict[str, Any]) -> str:
    """The report in Markdown, a table for each group of shortcuts."""
    if not report["runs"]:
        return f"{_INTRODUCTION}\n\nNothing is measured yet.\n"
    return "\n".join([_INTRODUCTION, *_exact_lines(report), *_group_lines(report), *_gap_lines(report)]) + "\n"


def _exact_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "\n## The exact path\n\n| device | torch | clips | limbs off | colours off | background | a clip |"
    yield "|---" * 7 + "|"
    for run in report["runs"]:
        exact, params = run["exact"], run["params"]
        clips = f"{run['num_clips']} of {run['num_frames']} frames, {params['num_inference_steps']} steps, "
        clips += f"guidance {params['guidance_scale']:g}"
        yield (
            f"| {run['device']} | {run['torch']} | {clips} | {exact['limb_error_percent']:.2f} % | "
            f"{exact['delta_e']:.1f} | {exact['background_psnr']:.1f} dB | {exact['seconds']:.2f} s |"
        )


def _group_lines(report: dict[str, Any]) -> Iterator[str]:
    for group, shortcuts in groupby(SHORTCUTS, key=lambda shortcut: shortcut.group):
        lines = [line for shortcut in shortcuts for line in _shortcut_lines(report, shortcut)]
        if lines:
            yield f"\n## {group[0].upper() + group[1:]}\n"
            yield f"| {' | '.join(_COLUMNS)} |"
            yield "|---" * len(_COLUMNS) + "|"
            yield from lines


def _shortcut_lines(report: dict[str, Any], shortcut: Shortcut) -> Iterator[str]:
    is_default = "yes" if shortcut.is_default else "no"
    for run in report["runs"]:
        exact = run["exact"]
        for row in run["rows"]:
            if row["name"] != shortcut.name:
                continue
            if "failed" in row:
                yield f"| {shortcut.name} | {run['device']} | failed: {row['failed']} |||||| {is_default} |"
                continue
            frames = "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
            verdict = "no" if is_too_dear(row, exact) else "yes"
            yield (
                f"| {shortcut.name} | {run['device']} | {100 * row['latent_rms']:.2g} % | {frames} | "
                f"{row['limb_error_percent']:.2f} % ({limb_cost(row, exact):+.2f}) | "
                f"{row['delta_e']:.1f} ({row['delta_e'] - exact['delta_e']:+.1f}) | "
                f"{row['speed']:.2f} times | {verdict} | {is_default} |"
            )


def _gap_lines(report: dict[str, Any]) -> Iterator[str]:
    """What no device has measured: it is no cheaper for that."""
    measured = {row["name"] for run in report["runs"] for row in run["rows"]}
    gaps = [shortcut.name for shortcut in SHORTCUTS if shortcut.name not in measured]
    if gaps:
        yield f"\n## Not measured yet\n\n{'; '.join(gaps)}."
