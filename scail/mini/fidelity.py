"""What each shortcut costs and wins, measured on held-out clips of a trained checkpoint.

    python -m scail.mini.fidelity --checkpoint DIR --out gpu.json [--clips 6] [--group attention …]
    python -m scail.mini.fidelity --merge cpu.json gpu.json --out docs/fidelity.json --page docs/fidelity.md

The first form measures on this device, the second joins what several devices have measured into one page. Results are
written after every row, so that a run that is cut short is not lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scail.bench import device_name
from scail.config import OFFICIAL, RuntimeConfig, SamplingParams
from scail.encodings import EncodingCache
from scail.errors import ScailError
from scail.mini.data import PORTRAIT, draw_scenes
from scail.mini.evaluate import ClipInput, clip_inputs, mean_scores, score
from scail.mini.library_vae import LibraryVae
from scail.mini.price_list import page
from scail.mini.shortcuts import SHORTCUTS, Precision, Shortcut
from scail.mini.vae_stage import HELD_OUT_SEED
from scail.models.attention import fits
from scail.pipeline import ScailPipeline
from scail.types import ScailOutput

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**28
CPU = torch.device("cpu")
EXACT_PATH = Shortcut("exact path", "exact")
TRIAL_KEYS = ("num_clips", "num_frames", "params")  # of a report: what was rendered


@dataclass(frozen=True)
class Trial:
    """What is rendered under every shortcut.

    Attributes:
        params: Of the exact path; a clip's seed is its number.
    """

    checkpoint: str
    device: str
    num_clips: int
    num_frames: int
    params: SamplingParams

    def inputs(self) -> list[ClipInput]:
        return _inputs(self.num_clips, self.num_frames)

    def clips_of(self, shortcut: Shortcut, numbers: Iterable[int] | None = None) -> list[ScailOutput]:
        """The clips, or those of the given numbers, in this process."""
        pipeline = load(
            self.checkpoint,
            self.device,
            shortcut.precision,
            shortcut.runtime_config(),
            vae_precision=shortcut.vae_precision or shortcut.precision,
            own_vae=shortcut.own_vae,
        )
        params = replace(self.params, **shortcut.sampling)
        outputs: list[ScailOutput] = []
        for number in range(self.num_clips) if numbers is None else numbers:
            item = self.inputs()[number]
            cache = EncodingCache(CACHE_BYTES) if shortcut.cached else None
            if not outputs:  # compiles, and fills what is filled once
                _render(pipeline, item, replace(params, num_inference_steps=1, seed=number), cache)
            if cache:
                _render(pipeline, item, replace(params, num_inference_steps=1, seed=number), cache)
            outputs.append(_render(pipeline, item, replace(params, seed=number), cache))
        return outputs


def measure(trial: Trial, shortcuts: Iterable[Shortcut], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The exact path and every shortcut that this device can run.

    Args:
        trial: What is rendered.
        shortcuts: To be measured.
        save: Called with the report after every row.

    Returns:
        Plain numbers, ready for JSON: scores of the exact path, and for each shortcut its scores, its distance to the
        exact path, the seconds of a clip and how many times as fast that is.
    """
    device = torch.device(trial.device)
    exact = trial.clips_of(EXACT_PATH)
    report: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        **{name: value for name, value in asdict(trial).items() if name not in ("checkpoint", "device")},
        "exact": scores_of(trial, exact),
        "rows": [],
    }
    for shortcut in shortcuts:
        if not runs_on(shortcut, device):
            continue
        row: dict[str, Any] = {"name": shortcut.name}
        try:
            clips = clips_in_processes(trial, shortcut) if shortcut.num_processes > 1 else trial.clips_of(shortcut)
            row |= scores_of(trial, clips) | distance(clips, exact)
            row["seconds"] /= shortcut.num_processes  # that render at the same time
            row["speed"] = report["exact"]["seconds"] / row["seconds"]  # in this run: another may have had another card
        except (ScailError, RuntimeError, ImportError) as error:  # the other rows are worth having
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        logger.info("%s", row)
        report["rows"].append(row)
        save(report)
    return report


def runs_on(shortcut: Shortcut, device: torch.device) -> bool:
    if shortcut.needs_gpu and device.type != "cuda":
        return False
    attention = shortcut.runtime_config().attention
    return attention is None or fits(attention, device, getattr(torch, shortcut.precision))


@lru_cache(maxsize=1)  # many rows differ in their sampling alone
def load(
    checkpoint: str,
    device: str,
    precision: Precision,
    runtime: RuntimeConfig,
    *,
    vae_precision: Precision,
    own_vae: bool,
) -> ScailPipeline:
    """A checkpoint, with a VAE that may have a precision and a pass of its own."""

    def pipeline_as(name: Precision) -> ScailPipeline:
        return ScailPipeline.from_pretrained(checkpoint, device=device, dtype=getattr(torch, name), runtime=runtime)

    pipeline = pipeline_as(precision)
    vae = pipeline.vae if vae_precision == precision else pipeline_as(vae_precision).vae
    return replace(pipeline, vae=vae if own_vae else LibraryVae(vae.model))


def clips_in_processes(trial: Trial, shortcut: Shortcut) -> list[ScailOutput]:
    """Every process renders each n-th clip; the order of the clips is kept."""
    num = shortcut.num_processes
    shares = [list(range(trial.num_clips))[first::num] for first in range(num)]
    threads = max(1, torch.get_num_threads() // num)  # else they wait for one another
    with ProcessPoolExecutor(
        num, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        rendered = list(pool.map(partial(trial.clips_of, shortcut), shares))
    return [rendered[number % num][number // num] for number in range(trial.num_clips)]


def scores_of(trial: Trial, clips: Sequence[ScailOutput]) -> dict[str, float]:
    """Limb error, colours and background as `scail eval` has them, and the seconds of a clip."""
    pairs = zip(clips, trial.inputs(), strict=True)
    mean = mean_scores([score(clip.frames, item.truth, item.reference_film) for clip, item in pairs])
    seconds = statistics.median(sum(clip.seconds.values()) for clip in clips)
    return {name: mean[name] for name in ("limb_error_percent", "delta_e", "background_psnr")} | {"seconds": seconds}


def distance(clips: Sequence[ScailOutput], exact: Sequence[ScailOutput]) -> dict[str, float | None]:
    """How far clips are from those of the exact path with the same seeds.

    Returns:
        `latent_rms`, relative; `psnr` of the frames in decibel over all clips, None where they are equal;
        `worst_psnr` of a clip.
    """
    pairs = list(zip(clips, exact, strict=True))
    apart = sum(float((clip.latents - other.latents).square().sum()) for clip, other in pairs)
    size = sum(float(other.latents.square().sum()) for _, other in pairs)
    errors = [float(np.square(clip.frames.astype(np.float32) - other.frames).mean()) for clip, other in pairs]
    return {
        "latent_rms": math.sqrt(apart / size),
        "psnr": _decibel(statistics.fmean(errors)),
        "worst_psnr": _decibel(max(errors)),
    }


def merge(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One document of what several devices measured; of two runs on one device, the later row counts.

    A run of other clips or another recipe replaces the one before: its rows have another exact path.
    """
    runs: dict[str, dict[str, Any]] = {}
    for report in reports:
        for run in report.get("runs", [report]):
            known = runs.get(run["device"], {})
            earlier = known.get("rows", []) if all(known.get(key) == run[key] for key in TRIAL_KEYS) else []
            rows = {row["name"]: row for row in (*earlier, *run["rows"])}
            runs[run["device"]] = run | {"rows": list(rows.values())}
    return {"runs": list(runs.values())}


def _render(
    pipeline: ScailPipeline, item: ClipInput, params: SamplingParams, cache: EncodingCache | None
) -> ScailOutput:
    size = item.reference.shape[:2]
    return pipeline(item.reference, item.pose, item.prompt, params=params, size=size, encodings=cache)


@lru_cache(maxsize=1)
def _inputs(num_clips: int, num_frames: int) -> list[ClipInput]:
    return clip_inputs(
        draw_scenes(HELD_OUT_SEED, num_clips, num_frames=num_frames, size=PORTRAIT, held_out=True, device=CPU)
    )


def _decibel(square_error: float) -> float | None:
    return 10 * math.log10(255**2 / square_error) if square_error else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scail.mini.fidelity", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="what to measure")
    parser.add_argument("--merge", type=Path, nargs="+", help="reports to be joined, instead of measuring")
    parser.add_argument("--out", type=Path, required=True, help="the JSON report")
    parser.add_argument("--page", type=Path, help="the report in Markdown")
    groups = list(dict.fromkeys(shortcut.group for shortcut in SHORTCUTS))
    parser.add_argument("--group", nargs="+", choices=groups, help="measure these groups of shortcuts alone")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=OFFICIAL.num_inference_steps)
    parser.add_argument("--guidance", type=float, default=OFFICIAL.guidance_scale)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("scail.timing").setLevel(logging.WARNING)

    def save(report: dict[str, Any]) -> None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    if options.merge:
        report = merge(json.loads(path.read_text(encoding="utf-8")) for path in options.merge)
    elif options.checkpoint:
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
        params = replace(OFFICIAL, num_inference_steps=options.steps, guidance_scale=options.guidance)
        trial = Trial(str(options.checkpoint), options.device, options.clips, options.frames, params)
        chosen = [shortcut for shortcut in SHORTCUTS if not options.group or shortcut.group in options.group]
        report = merge([measure(trial, chosen, save)])
    else:
        parser.error("give a --checkpoint to measure, or reports to --merge")
    save(report)
    if options.page:
        options.page.write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
