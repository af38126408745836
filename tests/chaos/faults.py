"""A preload for workers under test: clips that are slow, kill, hang or fail, as their prompts say.

Nothing of this is in the program: here a test process changes the program's functions from outside. What concerns
the machine and not one clip is done to the machine, by tests/chaos/harness.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from pathlib import Path

CHAOS_DIR = Path(os.environ["CHAOS_DIR"])
LOADS = CHAOS_DIR / "loads"


def once(name: str) -> bool:
    """True the first time that any process asks."""
    try:
        (CHAOS_DIR / f"once-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def misbehave(prompt: str) -> None:
    import torch

    from scail import GenerationError

    if "poison" in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang-always" in prompt or ("hang-once" in prompt and once(prompt)):
        ctypes.CDLL(None).sleep(3600)  # native code without the interpreter's lock: Dask sees a busy, healthy worker
    if "cuda-once" in prompt and once(prompt):
        raise RuntimeError("CUDA error: device-side assert triggered")
    if "memory-once" in prompt and once(prompt):
        raise torch.OutOfMemoryError("CUDA out of memory: a test said so")
    if "nan-once" in prompt and once(prompt):
        raise GenerationError("latents are not finite: a test said so")


def patch_pipeline() -> None:
    import torch

    from scail import OutOfMemoryError
    from scail.pipeline import ScailPipeline

    render, load = ScailPipeline.render, ScailPipeline.from_pretrained

    def misbehaving_render(self, pixels, prompt, *, on_step, **kwargs):
        slow = re.search(r"slow (\d+\.?\d*)(?: until (\S+))?", prompt)
        let_go = CHAOS_DIR / f"let-go-{slow[2]}" if slow and slow[2] else None

        def slow_step(done, total):
            end = time.monotonic() + (float(slow[1]) if slow else 0.0)
            while time.monotonic() < end and not (let_go and let_go.exists()):
                time.sleep(min(0.05, max(0.0, end - time.monotonic())))
            on_step(done, total)

        try:
            misbehave(prompt)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        return render(self, pixels, prompt, on_step=slow_step, **kwargs)

    def counted_load(*args, **kwargs):
        with LOADS.open("a") as file:
            file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
        return load(*args, **kwargs)

    ScailPipeline.render = misbehaving_render
    ScailPipeline.from_pretrained = counted_load


def dask_setup(_worker) -> None:
    patch_pipeline()
