"""From a checkpoint on local disk to the first step: with the disk's cache empty, and with the files in it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scail.bench import random_frames, random_pipeline
from scail.bench_goals import Row, Workload
from scail.bench_peers import release, synchronise
from scail.checkpoint import write_byte_tokenizer
from scail.config import Quantization, RuntimeConfig, SamplingParams
from scail.errors import Interrupted
from scail.fingerprint import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE, write_model_config
from scail.loading import NUM_THREADS, PIECE_BYTES
from scail.pipeline import ScailPipeline

GOAL_SECONDS = 15.0
QUANTIZATION: Quantization = "fp8"


def load_rows(work: Workload, folder: Path) -> list[Row]:
    """Seconds from nothing to the end of the first step, compiling left out; beside them the disk and safetensors.

    Args:
        work: What is loaded, its blocks in float8, and the clip of the first step.
        folder: An empty one on the disk that is to be measured; a checkpoint is written there.
    """
    checkpoint = folder / "checkpoint"
    files = _write_checkpoint(work, checkpoint)
    num_bytes = sum(file.stat().st_size for file in files)
    _forget(files)
    disk = _read_seconds(files)
    _forget(files)
    cold = _first_step_seconds(work, checkpoint)
    warm = _first_step_seconds(work, checkpoint)
    size = f"{num_bytes / 1e9:.1f} GB"
    plain = _safetensors_seconds(files, work.device)
    return [
        Row(
            "load, empty cache, to the first step", "s", cold, GOAL_SECONDS, beside=disk,
            note=f"the disk alone, {size} past its cache",
        ),
        Row(
            "load, cached files, to the first step", "s", warm, GOAL_SECONDS, beside=plain,
            note=f"safetensors' load_file alone, {size}",
        ),
    ]  # fmt: skip


def _write_checkpoint(work: Workload, folder: Path) -> list[Path]:
    """A float8 checkpoint of random weights; returns the files that hold them."""
    runtime = RuntimeConfig(quantization=QUANTIZATION, memory="resident")
    pipeline = random_pipeline(work.config, device=work.device, dtype=work.dtype, runtime=runtime)
    write_model_config(folder, work.config, notice="The weights are random.", quantization=QUANTIZATION)
    write_byte_tokenizer(folder / "tokenizer", work.config.text_encoder.vocab_size)
    files = []
    for component, network in (
        (TRANSFORMER, pipeline.transformer),
        (VAE, pipeline.vae.model),
        (TEXT_ENCODER, pipeline.text_encoder),
        (IMAGE_ENCODER, pipeline.image_encoder),
    ):
        path = folder / component.folder / f"{component.weights}.safetensors"
        save_file({key: tensor.contiguous().cpu() for key, tensor in network.state_dict().items()}, path)
        files.append(path)
    del pipeline, network
    release(work.device)
    return files


def _first_step_seconds(work: Workload, checkpoint: Path) -> float:
    """Seconds until the first step of a clip is done."""
    reference, pose = random_frames(work.num_frames, work.height, work.width)
    runtime = RuntimeConfig(quantization=QUANTIZATION, memory="resident")

    def stop(_step: int, _num_steps: int) -> None:
        synchronise(work.device)
        raise Interrupted("the first step is done")

    start = time.perf_counter()
    pipeline = ScailPipeline.from_pretrained(checkpoint, device=work.device, dtype=work.dtype, runtime=runtime)
    with suppress(Interrupted):
        pipeline(reference, pose, "a dancer", params=SamplingParams(), size=(work.height, work.width), on_step=stop)
    seconds = time.perf_counter() - start
    del pipeline
    release(work.device)
    return seconds


def _safetensors_seconds(files: Sequence[Path], device: torch.device) -> float:
    start = time.perf_counter()
    for file in files:
        load_file(file, device=str(device))
        synchronise(device)
    seconds = time.perf_counter() - start
    release(device)
    return seconds


def _forget(files: Sequence[Path]) -> None:
    """Put the files out of the system's cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read_seconds(files: Sequence[Path]) -> float:
    """Seconds in which the disk gives all bytes to as many threads as the loader has; past the cache where it can."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, PIECE_BYTES)]
    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for done in [pool.submit(_read_piece, file, at) for file, at in pieces]:
            done.result()
    return time.perf_counter() - start


def _read_piece(file: Path, offset: int) -> None:
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        with mmap.mmap(-1, PIECE_BYTES) as target:  # begins at a page, as direct reads want it
            os.preadv(descriptor, [target], offset)
    finally:
        os.close(descriptor)
