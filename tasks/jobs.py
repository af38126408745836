"""What one row asks for, what is planned for it and what came of it. Data only: frozen, small, no torch.

These models are all that crosses a task's border.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from scail.config import (
    DEFAULT_PROFILE,
    NUMERICS_VERSION,
    PROFILES,
    SIZE_MULTIPLE,
    PlacementPolicy,
    Quantization,
    SamplingParams,
)
from scail.quality import Finding, Limit, QualityNumbers, Verdict

CLIP_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_Frozen = ConfigDict(frozen=True, extra="forbid")
_Size = Annotated[int, Field(ge=SIZE_MULTIPLE, le=4096, multiple_of=SIZE_MULTIPLE)]


class ClipRequest(BaseModel):
    """One row of a manifest, checked as far as the row itself goes.

    `row` is the line of the file on which it starts; `columns` are its cells as they came, for the results.
    """

    model_config = _Frozen

    row: int
    clip_id: str
    reference: str = Field(min_length=1)
    pose: str = Field(min_length=1)
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0.0, le=100.0, allow_inf_nan=False)
    shift: float | None = Field(default=None, gt=0.0, le=100.0, allow_inf_nan=False)
    profile: str | None = None
    width: _Size | None = None
    height: _Size | None = None
    max_frames: int | None = Field(default=None, ge=5)
    fps: float | None = Field(default=None, gt=0.0, le=240.0, allow_inf_nan=False)
    priority: int = 0
    enabled: bool = True
    columns: dict[str, str] = Field(default_factory=dict)

    @field_validator("clip_id")
    @classmethod
    def _is_a_safe_file_name(cls, value: str) -> str:
        if not CLIP_ID_PATTERN.fullmatch(value):
            raise ValueError(
                "expected letters, digits, '.', '_' or '-', at most 100 of them, the first a letter or digit"
            )
        return value

    @field_validator("profile")
    @classmethod
    def _is_a_profile(cls, value: str | None) -> str | None:
        if value is not None and value not in PROFILES:
            raise ValueError(f"expected one of {', '.join(PROFILES)}")
        return value

    @model_validator(mode="after")
    def _has_both_sides_or_neither(self) -> ClipRequest:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together: give both or neither")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or none where the official rule decides."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def sampling(self, default_profile: str, seed: int) -> SamplingParams:
        """The profile's parameters with what the row says in their place."""
        given = {
            name: value
            for name in ("num_inference_steps", "guidance_scale", "shift")
            if (value := getattr(self, name)) is not None
        }
        return replace(PROFILES[self.profile or default_profile].sampling, **given, seed=seed)


class ClipJob(BaseModel):
    """A row that will be rendered: everything that decides its pixels, and the key made of it."""

    model_config = _Frozen

    request: ClipRequest
    key: str  # hex; equal keys mean equal pixels
    params: SamplingParams  # with the seed filled in
    checkpoint_fingerprint: str
    profile: str = DEFAULT_PROFILE

    @property
    def clip_id(self) -> str:
        return self.request.clip_id


def content_key(
    request: ClipRequest,
    *,
    reference_hash: str,
    pose_hash: str,
    checkpoint_fingerprint: str,
    default_profile: str,
) -> tuple[str, SamplingParams]:
    """The key of a clip's pixels, and its sampling parameters with the seed filled in.

    A seed that the row does not give is derived from everything else that decides the pixels, and not from the
    row's place, so that moving a row, or rendering it alone, gives the same clip.
    """
    params = request.sampling(default_profile, seed=0)
    content: dict[str, Any] = {
        "reference": reference_hash,
        "pose": pose_hash,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "shift": params.shift,
        "size": [request.height, request.width],
        "max_frames": request.max_frames,
        "fps": request.fps,
        "checkpoint": checkpoint_fingerprint,
        "numerics": NUMERICS_VERSION,
    }
    if params.solver != "euler":
        content["solver"] = params.solver
    seed = request.seed if request.seed is not None else int(_digest(content)[:8], 16)
    content["seed"] = seed  # the same under every arithmetic, so that their pictures can be compared
    profile = PROFILES[request.profile or default_profile]
    if profile.quantization != "none":
        content["quantization"] = profile.quantization
    if profile.attention:
        content["attention"] = profile.attention
    return _digest(content), replace(params, seed=seed)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class DoneRecord(BaseModel):
    """OUTPUT/done/<key>.json, written after everything it names. A clip exists when and only when its record does.

    Names are relative to OUTPUT, so that a bucket may be moved.
    """

    model_config = _Frozen

    key: str
    clip_id: str
    video: str
    poster: str
    metrics: str
    video_size: int  # bytes
    video_md5: str


class ClipStatus(StrEnum):
    RENDERED = "rendered"
    SKIPPED = "skipped"  # a done record with the same key was there before
    FAILED = "failed"
    INVALID = "invalid"  # the row itself is malformed; only with --skip-invalid does the rest go on
    DISABLED = "disabled"


class AttemptStage(StrEnum):
    PREPARING = "preparing"
    COMPUTING = "computing"  # on the GPU; a worker that dies here may have died of this clip
    ENCODING = "encoding"  # the GPU is the next clip's, of which the worker dies more likely
    PUBLISHING = "publishing"


class Attempt(BaseModel):
    """One start of a clip: OUTPUT/attempts/<key>/<number>.json, and an entry of the clip's metrics.

    Attributes:
        run_id: Of the flow run that asked for it.
        worker: Host and process, such as `gpu-7:4711`.
        seen_at: When the worker last said that it is alive; all times are ISO 8601, UTC.
        steps: Denoising steps that it had behind it then.
        outcome: `published`, or the class of what was raised. None while it goes on, and for ever if its worker died.
        told_to_end: Whether its worker was: if that died then, it did not die of the clip.
    """

    model_config = _Frozen

    number: int
    run_id: str
    worker: str
    started_at: str
    seen_at: str
    stage: AttemptStage = AttemptStage.PREPARING
    steps: int = 0
    told_to_end: bool = False
    outcome: str | None = None
    message: str | None = None


class ClipQuality(BaseModel):
    """What was measured of a clip's pictures, and what is beyond a limit that was in force when it was rendered."""

    model_config = _Frozen

    verdict: Verdict
    numbers: QualityNumbers
    findings: tuple[Finding, ...] = ()
    limits: dict[str, Limit] = Field(default_factory=dict)  # that were in force, of every number

    @property
    def note(self) -> str:
        """`flicker 5.1, above 3; identity 0.4, below 0.65`."""
        return "; ".join(map(str, self.findings))


class ClipMetrics(BaseModel):
    """A clip's metrics.json: what was rendered, with what, and where the time went."""

    model_config = _Frozen

    clip_id: str
    key: str
    num_frames: int
    num_dropped_frames: int  # trailing pose frames without a latent frame of their own, as the official code drops them
    width: int
    height: int
    fps: float
    prompt: str
    negative_prompt: str
    params: SamplingParams
    reference_uri: str
    pose_uri: str
    reference_size: tuple[int, int]  # (height, width) as it came, before crop and resize
    pose_size: tuple[int, int]
    pose_num_frames: int
    pose_kept_share: float  # of the pose picture's area that the centre crop keeps
    seconds: dict[str, float]  # by stage, in the order in which they ran
    peak_memory_gib: float
    attempts: int
    attempt_log: tuple[Attempt, ...] = ()  # every start of this clip, this one last
    cache_hits: tuple[str, ...] = ()  # encodings that an earlier clip on the same worker had computed
    device: str
    attention: str = "sdpa"  # the backend that computed the transformer's softmaxes
    profile: str = DEFAULT_PROFILE
    quantization: Quantization = "none"  # of the transformer's matrix products, as they were computed
    memory: PlacementPolicy = "resident"  # the policy under which the weights were placed
    loras: tuple[str, ...] = ()  # in the weights, each as name and strength
    notes: tuple[str, ...] = ()  # where the clip was rendered in another way than was asked for
    quality: ClipQuality | None = None  # None: rendered by a version that did not measure it
    checkpoint_fingerprint: str
    versions: dict[str, str]
    finished_at: str  # ISO 8601, UTC

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class ClipResult(BaseModel):
    """What came of one row."""

    model_config = _Frozen

    row: int
    clip_id: str
    status: ClipStatus
    key: str | None = None
    video: str | None = None  # URI
    poster: str | None = None
    metrics: ClipMetrics | None = None
    error_class: str | None = None
    message: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)

    @property
    def quality(self) -> ClipQuality | None:
        return self.metrics.quality if self.metrics else None

    @property
    def is_to_review(self) -> bool:
        """Whether there is a clip, and something about its pictures is beyond a limit."""
        return self.quality is not None and self.quality.verdict is not Verdict.OK

    def failed_by(self, error: BaseException) -> ClipResult:
        """This row, failed with what was raised."""
        kind, message = type(error).__name__, str(error)
        return self.model_copy(update={"status": ClipStatus.FAILED, "error_class": kind, "message": message})

    def of_done(self, record: DoneRecord, metrics: ClipMetrics, output_uri: str) -> ClipResult:
        """This row, with the files that a done record names."""
        video, poster = (f"{output_uri.rstrip('/')}/{name}" for name in (record.video, record.poster))
        return self.model_copy(update={"key": record.key, "video": video, "poster": poster, "metrics": metrics})
