"""The one reader of the environment: machine, checkpoint, limits. `SCAIL_DEVICE` sets `device`, and so on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.storage import StoragePolicy


class Settings(BaseSettings):
    """What differs from machine to machine. What differs from clip to clip is in the manifest."""

    model_config = SettingsConfigDict(env_prefix="SCAIL_", frozen=True)

    checkpoint: str = Field("checkpoints/SCAIL-14B", description="Folder written by `scail convert`.")
    device: str = Field("auto", description="`cuda`, `cuda:1`, `cpu`; `auto` takes a GPU if there is one.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="`auto`: bfloat16 on a GPU.")
    profile: str = Field("quality", description="Sampling profile of rows that name none.")
    scratch_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / "scail",
        description="Inputs and unfinished clips of this machine; local and fast.",
    )
    ffmpeg: Path | None = Field(None, description="Overrides the ffmpeg on the PATH and the one that pip brought.")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="Gives the results their cost column.")
    max_download_bytes: int = Field(2 * 1024**3, gt=0, description="Largest input file.")
    allow_private_addresses: bool = Field(False, description="Lets https inputs come from private networks.")
    planning_threads: int = Field(16, ge=1, description="Input files hashed side by side while planning.")

    def storage_policy(self) -> StoragePolicy:
        return StoragePolicy(
            max_download_bytes=self.max_download_bytes, allow_private_addresses=self.allow_private_addresses
        )
