"""How long a plan will hold a GPU, and what that costs: a guess that learns from the clips that are done.

A clip's denoising takes `forwards × (a · tokens + b · tokens²)` seconds: the linear layers see each token by itself,
attention sees each pair. Everything else takes `c + d · pixels of all frames`. The four numbers are fitted to earlier
clips of the same checkpoint on the same device; where these are too alike to tell a from b, or c from d, the
proportions of the 14B network decide. Each run leaves a sample of its clips' times in
OUTPUT/runs/<run id>/timings.jsonl, so that a forecast reads a few small files however many clips there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from scail.config import DEFAULT_SIZE, MAX_FRAMES, SCAIL_14B, Profile, SamplingParams
from scail.types import LatentShape, num_tokens
from tasks import storage
from tasks.figures import cost_of, duration, gpu_seconds, percentile, time_name
from tasks.jobs import ClipMetrics, ClipRequest
from tasks.storage import StorageError, StoragePolicy

logger = logging.getLogger(__name__)

TIMINGS = "timings.jsonl"
MAX_TIMINGS_PER_RUN = 500
MAX_TIMINGS = 2000  # that a forecast learns from; the newest
MIN_TIMINGS_FOR_A_RANGE = 5

_ATTENTION_SHARE = 0.63  # of one forward's arithmetic at 48,832 tokens: 1.99 of 3.15 PFLOP
_FULL_TOKENS = 48_832  # 81 frames at 512 × 896
_FULL_MEGAPIXELS = MAX_FRAMES * DEFAULT_SIZE[0] * DEFAULT_SIZE[1] / 1e6
_DENOISE_PRIOR = ((1 - _ATTENTION_SHARE) / _FULL_TOKENS, _ATTENTION_SHARE / _FULL_TOKENS**2)
_OTHER_PRIOR = (0.2, 0.8 / _FULL_MEGAPIXELS)  # most stages work frame by frame; text and reference do not
_TRUST_IN_PRIOR = 0.01  # as much as this many clips that are ten per cent off
_OUTLIER = 1.5  # a clip that took so many times the usual, or so little, was disturbed


class Timing(BaseModel):
    """What one clip teaches: how much work it was, and how long it took."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later version may write more

    key: str
    device: str
    checkpoint_fingerprint: str
    pose_uri: str
    pose_num_frames: int
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    denoise_seconds: float
    other_seconds: float  # on the GPU too
    finished_at: str

    @property
    def work(self) -> Work:
        return work_of(
            self.num_frames, (self.height, self.width), _num_forwards(self.num_inference_steps, self.guidance_scale)
        )


class Work(NamedTuple):
    """The sizes on which a clip's time depends."""

    num_forwards: int
    num_tokens: int
    megapixels: float  # of all frames


class Law(NamedTuple):
    """Seconds for which a clip holds the device: `forwards × (a · tokens + b · tokens²) + c + d · megapixels`."""

    per_token: float
    per_pair: float
    fixed: float
    per_megapixel: float

    def seconds(self, work: Work) -> float:
        forward = self.per_token * work.num_tokens + self.per_pair * work.num_tokens**2
        return work.num_forwards * forward + self.fixed + self.per_megapixel * work.megapixels


class _Measured(NamedTuple):
    """One full-size clip of a checkpoint on a device that we measured ourselves."""

    forward_seconds: float
    other_seconds: float  # on the GPU too

    def law(self) -> Law:
        denoise = [self.forward_seconds * share for share in _DENOISE_PRIOR]
        other = [self.other_seconds * share for share in _OTHER_PRIOR]
        return Law(*denoise, *other)


DEFAULT_DEVICE = "NVIDIA H200"
# bfloat16, 81 frames at 512 × 896: one forward; VAE decoding and the pose's encoding.
MEASURED = {("SCAIL_14B", DEFAULT_DEVICE): _Measured(forward_seconds=5.93, other_seconds=0.82 + 0.15)}
FP8_FORWARD_SECONDS = 3.30  # the same, compiled, with matrix products and attention in float8, on an H100


@dataclass(frozen=True)
class Forecast:
    """What is to be rendered, as far as it can be told before.

    Attributes:
        num_clips: That will be rendered.
        device: Whose times these are; None without a forecast.
        gpu_seconds: Expected for all clips together; None without a forecast.
        range_seconds: The same if every clip were as fast as the fastest tenth of the earlier ones, or as slow as
            the slowest tenth (p10, p90); None where there are too few to say.
        price_per_gpu_hour: None: cost is not stated.
        basis: What it rests on, or why there is none.
    """

    num_clips: int
    device: str | None
    gpu_seconds: float | None
    range_seconds: tuple[float, float] | None
    price_per_gpu_hour: float | None
    basis: str

    @property
    def cost(self) -> float | None:
        return None if self.gpu_seconds is None else cost_of(self.gpu_seconds, self.price_per_gpu_hour)

    def __str__(self) -> str:
        if self.gpu_seconds is None:
            return f"no forecast: {self.basis}"
        low_high = [] if self.range_seconds is None else [duration(seconds) for seconds in self.range_seconds]
        parts = [f"{duration(self.gpu_seconds)} of {time_name(self.device or '')}{_between(low_high)}"]
        if self.cost is not None:
            costs = [cost_of(seconds, self.price_per_gpu_hour) for seconds in self.range_seconds or ()]
            parts.append(f"cost {self.cost:,.2f}{_between([f'{cost:,.2f}' for cost in costs])}")
        return f"forecast: {', '.join(parts)}; {self.basis}"


def forecast_clips(
    clips: Sequence[tuple[ClipRequest, SamplingParams]],
    history: Iterable[Timing],
    *,
    checkpoint_fingerprint: str | None,
    model_name: str,
    device: str | None,
    price_per_gpu_hour: float | None,
) -> Forecast:
    """Forecast the time of clips from earlier ones, or from our own measurements where there are none.

    Args:
        clips: To be rendered, with their sampling parameters.
        history: Earlier clips in any order, of any checkpoint and device.
        checkpoint_fingerprint: Only clips of this checkpoint teach anything; None if it is not known.
        model_name: The checkpoint's, for the measurements.
        device: Part of the name of the device that will render. None: the one that rendered last, else the one we
            measured on.
        price_per_gpu_hour: In any currency.
    """
    timings = _alike(history, checkpoint_fingerprint, device)
    frames, num_unseen, assumed = _frames_of(clips, timings)
    if timings:
        law, spread = fit(timings)
        name = timings[0].device
        plural = "s" if len(timings) > 1 else ""
        basis = f"learned from {len(timings)} earlier clip{plural} of this checkpoint on {name}"
    else:
        name, measured = _measurement(model_name, device)
        if measured is None:
            basis = f"no earlier clip of this checkpoint{f' on {device}' if device else ''} to learn from"
            return Forecast(len(clips), None, None, None, price_per_gpu_hour, basis)
        law, spread = measured.law(), None
        basis = (
            f"a guess from {measured.forward_seconds} s per forward at full size on {name}, no clip was timed here yet"
        )
    if num_unseen and clips:
        basis += f"; {num_unseen} of unknown length counted as {assumed} frames at most"
    seconds = sum(
        law.seconds(work_of(num_frames, request.size or DEFAULT_SIZE, _forwards_of(params)))
        for (request, params), num_frames in zip(clips, frames, strict=True)
    )
    range_seconds = None if spread is None else (seconds * spread[0], seconds * spread[1])
    return Forecast(len(clips), name, seconds, range_seconds, price_per_gpu_hour, basis)


def fit(timings: Sequence[Timing]) -> tuple[Law, tuple[float, float] | None]:
    """The law that earlier clips obey, and the p10 and p90 of what they took as a share of what it says.

    Clips that were disturbed, by a neighbour or a first use of the device, do not bend the law; in the p10 and p90
    they are counted.
    """
    law = _law(timings)
    shares = _shares(law, timings)
    usual = median(shares)
    calm = [timing for timing, share in zip(timings, shares, strict=True) if 1 / _OUTLIER < share / usual < _OUTLIER]
    if 0 < len(calm) < len(timings):
        law = _law(calm)
        shares = _shares(law, timings)
    if len(timings) < MIN_TIMINGS_FOR_A_RANGE:
        return law, None
    return law, (percentile(shares, 0.1), percentile(shares, 0.9))


def full_clip_seconds(profile: Profile) -> float:
    """How long the longest clip at the usual size holds the device we measured on, with the 14B model."""
    measured = MEASURED[SCAIL_14B.name, DEFAULT_DEVICE]
    if profile.quantization == "fp8":
        measured = measured._replace(forward_seconds=FP8_FORWARD_SECONDS)
    return measured.law().seconds(work_of(MAX_FRAMES, DEFAULT_SIZE, _forwards_of(profile.sampling)))


def work_of(num_frames: int, size: tuple[int, int], num_forwards: int) -> Work:
    """The work of a clip of `size` (height, width)."""
    height, width = size
    shape = LatentShape.of_clip(num_frames, height, width)
    return Work(num_forwards, num_tokens(SCAIL_14B.transformer, shape), num_frames * height * width / 1e6)


def timings_of(clips: Iterable[ClipMetrics]) -> list[Timing]:
    """What a run's clips teach; of many, some from its beginning to its end."""
    all_clips = [metrics for metrics in clips if metrics.seconds.get("denoise", 0.0) > 0]
    every = max(1, -(-len(all_clips) // MAX_TIMINGS_PER_RUN))
    return [_timing(metrics) for metrics in all_clips[::every]]


def read_history(output_uri: str, *, policy: StoragePolicy) -> list[Timing]:
    """Times of the newest runs' clips. A file that cannot be read is left out: a forecast stops no run."""
    timings: list[Timing] = []
    try:
        found = storage.list_files(storage.join(output_uri, "runs"), policy=policy)
    except StorageError as error:
        logger.warning("earlier runs cannot be listed, the forecast does without: %s", error)
        return []
    for uri in sorted((uri for uri in found if storage.name(uri) == TIMINGS), reverse=True):
        try:
            lines = storage.read_bytes(uri, policy=policy).splitlines()
            timings += [Timing.model_validate_json(line) for line in lines]
        except (StorageError, ValidationError) as error:
            logger.warning("%s is left out of the forecast: %s", uri, error)
        if len(timings) >= MAX_TIMINGS:
            break
    return timings[:MAX_TIMINGS]


def _timing(metrics: ClipMetrics) -> Timing:
    denoise_seconds = metrics.seconds["denoise"]
    return Timing(
        key=metrics.key,
        device=metrics.device,
        checkpoint_fingerprint=metrics.checkpoint_fingerprint,
        pose_uri=metrics.pose_uri,
        pose_num_frames=metrics.pose_num_frames,
        num_frames=metrics.num_frames,
        height=metrics.height,
        width=metrics.width,
        num_inference_steps=metrics.params.num_inference_steps,
        guidance_scale=metrics.params.guidance_scale,
        denoise_seconds=denoise_seconds,
        other_seconds=max(0.0, gpu_seconds(metrics.seconds) - denoise_seconds),
        finished_at=metrics.finished_at,
    )


def _alike(history: Iterable[Timing], checkpoint_fingerprint: str | None, device: str | None) -> list[Timing]:
    """Of each clip its newest timing, if it is of the checkpoint and of the device, or of the last device used."""
    by_key: dict[str, Timing] = {}
    for timing in sorted(history, key=lambda timing: timing.finished_at, reverse=True):
        if timing.checkpoint_fingerprint == checkpoint_fingerprint and _is_named(timing.device, device):
            by_key.setdefault(timing.key, timing)
    timings = list(by_key.values())[:MAX_TIMINGS]
    return [timing for timing in timings if timing.device == timings[0].device]


def _is_named(name: str, part: str | None) -> bool:
    return part is None or part.casefold() in name.casefold()


def _measurement(model_name: str, device: str | None) -> tuple[str, _Measured | None]:
    for (name, measured_device), measured in MEASURED.items():
        if name == model_name and _is_named(measured_device, device):
            return measured_device, measured
    return "", None


def _frames_of(
    clips: Sequence[tuple[ClipRequest, SamplingParams]], timings: Sequence[Timing]
) -> tuple[list[int], int, int]:
    """Frames of each clip, for how many the pose's length was not known, and what was taken for it."""
    known = {timing.pose_uri: timing.pose_num_frames for timing in timings}
    assumed = round(median(known.values())) if known else MAX_FRAMES
    frames, num_unseen = [], 0
    for request, _ in clips:
        pose_num_frames = known.get(storage.redact(request.pose))
        num_unseen += pose_num_frames is None
        frames.append(min(pose_num_frames or assumed, request.max_frames or MAX_FRAMES, MAX_FRAMES))
    return frames, num_unseen, min(assumed, MAX_FRAMES)


def _forwards_of(params: SamplingParams) -> int:
    return _num_forwards(params.num_inference_steps, params.guidance_scale)


def _num_forwards(num_inference_steps: int, guidance_scale: float) -> int:
    return num_inference_steps * (2 if guidance_scale > 1 else 1)


def _law(timings: Sequence[Timing]) -> Law:
    works = [timing.work for timing in timings]
    denoise = [
        (float(work.num_forwards * work.num_tokens), float(work.num_forwards * work.num_tokens**2)) for work in works
    ]
    other = [(1.0, work.megapixels) for work in works]
    return Law(
        *_coefficients(denoise, [timing.denoise_seconds for timing in timings], _DENOISE_PRIOR),
        *_coefficients(other, [timing.other_seconds for timing in timings], _OTHER_PRIOR),
    )


def _shares(law: Law, timings: Sequence[Timing]) -> list[float]:
    return [(timing.denoise_seconds + timing.other_seconds) / law.seconds(timing.work) for timing in timings]


def _coefficients(
    terms: Sequence[tuple[float, float]], seconds: Sequence[float], prior: tuple[float, float]
) -> tuple[float, float]:
    """The two coefficients of `seconds = x · term 0 + y · term 1`, none of them negative.

    Least squares of the relative error, with each coefficient drawn a little towards the multiple of the prior that
    fits best; with it, clips of one size alone give an answer too.
    """
    pairs = [
        (term[0] * prior[0] / spent, term[1] * prior[1] / spent)
        for term, spent in zip(terms, seconds, strict=True)
        if spent > 0
    ]
    if not pairs:
        return 0.0, 0.0
    scale = sum(u + v for u, v in pairs) / sum((u + v) ** 2 for u, v in pairs)
    pairs = [(u * scale, v * scale) for u, v in pairs]  # from here on, (1, 1) is the multiple of the prior
    uu = sum(u * u for u, _ in pairs) + _TRUST_IN_PRIOR
    vv = sum(v * v for _, v in pairs) + _TRUST_IN_PRIOR
    uv = sum(u * v for u, v in pairs)
    u_sum, v_sum = sum(u for u, _ in pairs) + _TRUST_IN_PRIOR, sum(v for _, v in pairs) + _TRUST_IN_PRIOR
    determinant = uu * vv - uv * uv
    x, y = (u_sum * vv - v_sum * uv) / determinant, (v_sum * uu - u_sum * uv) / determinant
    if x < 0:
        x, y = 0.0, v_sum / vv
    elif y < 0:
        x, y = u_sum / uu, 0.0
    return x * scale * prior[0], y * scale * prior[1]


def _between(low_high: Sequence[str]) -> str:
    return f" (p10–p90 {low_high[0]} to {low_high[1]})" if low_high else ""  # noqa: RUF001  # a range
