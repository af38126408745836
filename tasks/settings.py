"""The one reader of the environment: machine, checkpoint, limits. `SCAIL_DEVICE` sets `device`, and so on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from scail.config import DEFAULT_PROFILE, LoraFile, MemoryPolicy
from scail.quality import Limit, QualityLimits
from tasks.storage import StoragePolicy


def _read_limit(value: Any) -> Any:
    """`2,8` as people write it in an environment."""
    if not isinstance(value, str):
        return value
    numbers = [float(part) for part in value.split(",")]
    if len(numbers) != 2:
        raise ValueError("expected two numbers with a comma between them: from where on to review, and to fail")
    return Limit(*numbers)


LIMITS = QualityLimits()

QualityLimit = Annotated[Limit, NoDecode, BeforeValidator(_read_limit)]


class QualitySettings(BaseSettings):
    """The limits of a clip's quality, such as `SCAIL_QUALITY_FLICKER=2,8`: beyond the first number somebody should
    look at the clip, beyond the second it is of no use. What each measures: `scail/quality.py`.
    """

    model_config = SettingsConfigDict(env_prefix="SCAIL_QUALITY_", frozen=True)

    nonfinite_percent: QualityLimit = LIMITS.nonfinite_percent
    black_percent: QualityLimit = LIMITS.black_percent
    frozen_percent: QualityLimit = LIMITS.frozen_percent
    flicker: QualityLimit = LIMITS.flicker
    clipped_percent: QualityLimit = LIMITS.clipped_percent
    saturation_shift: QualityLimit = LIMITS.saturation_shift
    colour_drift: QualityLimit = LIMITS.colour_drift
    join_jump: QualityLimit = LIMITS.join_jump
    sharpness: QualityLimit = LIMITS.sharpness
    grain: QualityLimit = LIMITS.grain
    identity: QualityLimit = LIMITS.identity
    motion_agreement: QualityLimit = LIMITS.motion_agreement

    def limits(self) -> QualityLimits:
        return QualityLimits(**{name: getattr(self, name) for name in type(self).model_fields})


class Settings(BaseSettings):
    """What differs from machine to machine. What differs from clip to clip is in the manifest."""

    model_config = SettingsConfigDict(env_prefix="SCAIL_", env_ignore_empty=True, frozen=True)

    checkpoint: str = Field("checkpoints/SCAIL-14B", description="Folder written by `scail convert`, or its URI.")
    cache_dir: Path = Field(
        default_factory=lambda: Path.home() / ".cache" / "scail",
        description="Checkpoints fetched from a bucket; compiled kernels, for the next worker.",
    )
    device: str = Field("auto", description="`cuda`, `cuda:1`, `cpu`; `auto` takes a GPU if there is one.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="`auto`: bfloat16 on a GPU.")
    compiled: bool = Field(False, description="Let torch.compile fuse the model: a GPU is a tenth faster after 15 s.")
    memory: MemoryPolicy = Field(
        "auto", description="`resident`, `balanced` (24 GB) or `low` (17 GB): what of the model stays on the GPU."
    )
    lora: str | None = Field(
        None, description="FILE:STRENGTH, several with commas: fused into the transformer's weights at load."
    )
    profile: str = Field(DEFAULT_PROFILE, description="`exact`, `quality` or `fast`: of rows that name none.")
    scratch_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / "scail",
        description="Inputs and unfinished clips of this machine; local and fast.",
    )
    ffmpeg: Path | None = Field(None, description="Overrides the ffmpeg on the PATH and the one that pip brought.")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="Gives the results their cost column.")
    forecast_device: str | None = Field(
        None, description="Part of a GPU's name, whose earlier times the forecast takes; the last one used if absent."
    )
    max_download_bytes: int = Field(2 * 1024**3, gt=0, description="Largest input file.")
    allow_private_addresses: bool = Field(False, description="Lets https inputs come from private networks.")
    workers: str = Field(
        "local", description="`local`, a number of processes of this machine, or a scheduler's `tls://host:port`."
    )
    tls_dir: Path | None = Field(
        None,
        description="This machine's certificates, DIR/node of `scail certificates`; for clusters of many machines.",
    )
    max_starts: int = Field(3, ge=1, description="Workers that may die of a clip before its row fails.")
    claim_seconds: float = Field(60.0, gt=0, description="A worker silent for so long has lost its clip to others.")
    stage_limit_seconds: float = Field(7200.0, gt=0, description="A Dask worker with a clip stuck so long is killed.")
    inbox_settle_seconds: float = Field(5.0, gt=0, description="An upload that did not change for so long is whole.")
    min_free_scratch_bytes: int = Field(2 * 1024**3, ge=0, description="With less room, no clip is begun.")
    encoding_cache_bytes: int = Field(512 * 1024**2, ge=0, description="Encodings kept on the device for later clips.")
    planning_threads: int = Field(16, ge=1, description="Input files hashed side by side while planning.")
    output: str | None = Field(None, description="Folder of all clips, for `scail deploy`; as are the next two.")
    inbox: str | None = Field(None, description="Folder into which manifests are put to be rendered.")
    manifests: str | None = Field(None, description="Folder of manifests that are rendered nightly.")
    webhook_url: str | None = Field(None, pattern="^https?://", description="Told of a run's start, clips and end.")
    events_token: SecretStr | None = Field(None, description="Whoever tells `scail events` of an upload must know it.")
    webhook_secret: SecretStr | None = Field(None, description="Signs what the webhook is told; unsigned if absent.")
    quality: QualitySettings = Field(default_factory=QualitySettings, description="Limits of a clip's quality.")

    def loras(self) -> tuple[LoraFile, ...]:
        return tuple(LoraFile.parse(part) for part in (self.lora or "").split(",") if part.strip())

    def storage_policy(self) -> StoragePolicy:
        return StoragePolicy(
            max_download_bytes=self.max_download_bytes, allow_private_addresses=self.allow_private_addresses
        )
