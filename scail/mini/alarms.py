"""How often the numbers of `scail.quality` cry wolf, and how often they notice: on clips whose truth is known.

    python -m scail.mini.alarms --out alarms.json --page docs/quality.md [--clips 48] [--checkpoint DIR]

Good clips are scenes as they are drawn and, with a checkpoint, the same scenes as it renders them. Bad ones are the
drawn clips with a defect of `scail.mini.defects`, or with another character's identity.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scail.bench import random_pipeline
from scail.config import SCAIL_MINI, SamplingParams
from scail.identity import identity
from scail.mini.data import FRAMES_PER_SECOND, LANDSCAPE, PORTRAIT, draw_scenes
from scail.mini.defects import DEFECTS
from scail.mini.evaluate import ClipInput, clip_inputs, render, true_frames
from scail.mini.moving_camera import with_moving_background
from scail.pipeline import ScailPipeline
from scail.quality import Finding, Frames, QualityLimits, QualityNumbers, Verdict, judge, measure

SEED = 77
CPU = torch.device("cpu")
NOTHING = "–"  # noqa: RUF001  # a dash as a table has it
NAMES = tuple(QualityNumbers.__dataclass_fields__)


@dataclass(frozen=True)
class Tally:
    """What a set of clips was found to be.

    Attributes:
        verdicts: How many clips of each.
        alarms: How often each number was beyond a limit.
    """

    num_clips: int
    verdicts: dict[str, int]
    alarms: dict[str, int]

    @classmethod
    def of(cls, judged: Iterable[tuple[Verdict, tuple[Finding, ...]]]) -> Tally:
        listed = list(judged)
        return cls(
            num_clips=len(listed),
            verdicts=dict(Counter(str(verdict) for verdict, _ in listed)),
            alarms=dict(Counter(finding.name for _, findings in listed for finding in findings)),
        )


def count_alarms(
    pipeline: ScailPipeline, *, num_clips: int, params: SamplingParams | None, limits: QualityLimits
) -> dict[str, Any]:
    """Tallies of good and of bad clips, and the range of every number over the good ones.

    Args:
        pipeline: Its image encoder sees the identity; it renders the scenes too, if there are `params`.
        num_clips: Half of them upright; every other one has 33 frames instead of 17.
        params: For the renders; without, only what was drawn is judged.
        limits: In force.
    """
    items = [item for size in (PORTRAIT, LANDSCAPE) for item in _scenes(size, num_clips // 2)]
    true = [true_frames(item) for item in items]
    own = [identity(pipeline, item.reference, clip) for item, clip in zip(items, true, strict=True)]
    good = [_numbers(item, clip, likeness) for item, clip, likeness in zip(items, true, own, strict=True)]
    report: dict[str, Any] = {"limits": limits._asdict(), "clips": len(items), "ranges": {"drawn": _ranges(good)}}
    filmed = [_filmed(item, clip) for item, clip in zip(items, true, strict=True)]
    report["good"] = {"drawn": _tally(good, limits), "drawn, the camera moves": _tally(filmed, limits)}
    if params:
        clips = [render(pipeline, item, item.pose, params) for item in items]
        rendered = [
            _numbers(item, clip, identity(pipeline, item.reference, clip))
            for item, clip in zip(items, clips, strict=True)
        ]
        report["good"]["rendered"] = _tally(rendered, limits)
        report["ranges"]["rendered"] = _ranges(rendered)
    report["bad"] = {
        defect.name: {"shows_in": defect.shows_in, "related": sorted(defect.related)}
        | _tally([_numbers(item, defect.spoil(clip), None) for item, clip in zip(items, true, strict=True)], limits)
        for defect in DEFECTS
    }
    others = [identity(pipeline, item.reference, true[index - 1]) for index, item in enumerate(items)]
    report["bad"]["somebody else, elsewhere"] = {"shows_in": "identity", "related": []} | _tally(
        [QualityNumbers(identity=likeness) for likeness in others], limits
    )
    poses = [_pose_of_another(items, index) for index in range(len(items))]
    report["bad"]["another clip's motion"] = {"shows_in": "motion_agreement", "related": []} | _tally(
        [
            measure(clip, item.reference, pose, fps=FRAMES_PER_SECOND)
            for item, clip, pose in zip(items, true, poses, strict=True)
            if pose is not None
        ],
        limits,
    )
    return report


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    return "\n".join([_INTRODUCTION, *_good_lines(report), *_limit_lines(report), *_bad_lines(report)]) + "\n"


_INTRODUCTION = """# Quality

Every clip's `metrics.json` holds numbers about its pictures and a verdict: `ok`, `needs_review` or `failed_quality`,
with the numbers that are beyond a limit. `scail/quality.py` says what each number measures. A limit has two bounds:
beyond the first somebody should look, beyond the second the clip is of no use. `SCAIL_QUALITY_FLICKER=2,8` sets
one. A clip in which there is nothing to see (`black_percent`, `nonfinite_percent`) is rendered once more on
the exact path (PyTorch's own attention, nothing compiled, nothing quantised), and then its row fails; every other clip
is published, and its row flagged in `results.csv`, `review.csv` and the report.

This page is written by `python -m scail.mini.alarms --page docs/quality.md`. The limits are set on procedural
characters before still backgrounds; the same before a background that goes by and sways are counted apart. Weights
other than the miniature's may need others, `identity` first of all, as the miniature's image encoder is random. Held
once against a film, the official example 001 (its driving video as a clip, 65 frames at 512 x 896, under its official
pose video): `ok`, motion agreement 0.74, sharpness 0.65, flicker 0.01; each defect below was noticed by its own number,
and example 002 under the pose of 001 by its motion agreement, 0.03. Measuring 81 frames of 512 x 896 takes 0.7 s of one
CPU core, beside the GPU's work on the next clip.

`motion_agreement` is optical (`scail/agreement.py`). What it cannot tell from its pose: a motion that is nearly its own
mirror image, and a figure that stands still while pose and picture are carried along by the camera. A skeletal measure
would need a pose extractor, and none is part of the program yet. `join_jump` needs not be told where joins are: the
program renders a clip in one piece, but whatever has pieces in it, and jumps there, is noticed.

The miniature's own clips are soft, and their `sharpness` says so: that is a finding and no false alarm. `scail demo`
lowers this one limit to 0.1, 0.05.
"""


def _good_lines(report: dict[str, Any]) -> Iterable[str]:
    yield "## False alarms\n\n| good clips | how many | ok | needs_review | failed_quality | because of |"
    yield "|---" * 6 + "|"
    for name, tally in report["good"].items():
        counts = [str(tally["verdicts"].get(verdict, 0)) for verdict in Verdict]
        because = ", ".join(f"{number} {count}" for number, count in tally["alarms"].items()) or NOTHING
        yield f"| {name} | {tally['num_clips']} | {' | '.join(counts)} | {because} |"
    yield ""


def _limit_lines(report: dict[str, Any]) -> Iterable[str]:
    kinds = list(report["ranges"])
    yield f"## Limits\n\n| number | review, fail | {' | '.join(f'{kind}: median, worst' for kind in kinds)} |"
    yield "|---" * (2 + len(kinds)) + "|"
    for name in NAMES:
        review, fail = report["limits"][name]
        cells = []
        for kind in kinds:
            spread = report["ranges"][kind].get(name)
            worst = spread and spread["min" if fail < review else "max"]
            cells.append(f"{spread['median']:.3g}, {worst:.3g}" if spread else NOTHING)
        yield f"| `{name}` | {review:g}, {fail:g} | {' | '.join(cells)} |"
    yield ""


def _bad_lines(report: dict[str, Any]) -> Iterable[str]:
    yield "## Clips made bad on purpose\n\n| defect | its number | noticed | failed_quality | other numbers |"
    yield "|---" * 5 + "|"
    for name, tally in report["bad"].items():
        num, alarms, own = tally["num_clips"], tally["alarms"], tally["shows_in"]
        failed = tally["verdicts"].get(Verdict.FAILED_QUALITY, 0)
        others = ", ".join(f"{number} {count}" for number, count in alarms.items() if number != own) or NOTHING
        yield f"| {name} | `{own}` | {alarms.get(own, 0)} of {num} | {failed} | {others} |"


def _scenes(size: tuple[int, int], num_clips: int) -> Iterable[ClipInput]:
    for num_frames, share in ((17, num_clips - num_clips // 2), (33, num_clips // 2)):
        if share:
            yield from clip_inputs(
                draw_scenes(SEED, share, num_frames=num_frames, size=size, held_out=True, device=CPU)
            )


def _numbers(item: ClipInput, clip: Frames, likeness: float | None) -> QualityNumbers:
    return measure(clip, item.reference, item.pose, fps=FRAMES_PER_SECOND, identity=likeness)


def _filmed(item: ClipInput, clip: Frames) -> QualityNumbers:
    """Of the clip and its reference as a camera in somebody's hand sees them."""
    reference = with_moving_background(item.reference[None], (item.reference_film.person[0] >= 0).numpy())[0]
    clip = with_moving_background(clip, (item.truth.person[0] >= 0).numpy())
    return _numbers(replace(item, reference=reference), clip, None)


def _pose_of_another(items: Sequence[ClipInput], index: int) -> Frames | None:
    """The pose video of the clip before, or of one before that, which has the same size and length."""
    others = (items[index - back].pose for back in range(1, len(items)))
    return next((pose for pose in others if pose.shape == items[index].pose.shape), None)


def _tally(numbers: Iterable[QualityNumbers], limits: QualityLimits) -> dict[str, Any]:
    return vars(Tally.of(judge(one, limits) for one in numbers)).copy()


def _ranges(numbers: Sequence[QualityNumbers]) -> dict[str, dict[str, float]]:
    known = {name: [value for one in numbers if (value := getattr(one, name)) is not None] for name in NAMES}
    return {
        name: {"min": min(values), "median": float(np.median(values)), "max": max(values)}
        for name, values in known.items()
        if values
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scail.mini.alarms", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="renders the scenes too; without, encoders are random")
    parser.add_argument("--out", type=Path, required=True, help="the JSON report")
    parser.add_argument("--page", type=Path, help="the same in Markdown")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    params: SamplingParams | None = None
    if options.checkpoint:
        pipeline = ScailPipeline.from_pretrained(options.checkpoint, device=device, dtype=dtype)
        params = SamplingParams(num_inference_steps=options.steps, guidance_scale=options.guidance)
    else:
        pipeline = random_pipeline(SCAIL_MINI, device=device, dtype=dtype)
    report = count_alarms(pipeline, num_clips=options.clips, params=params, limits=QualityLimits())
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
