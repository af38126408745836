"""Writes the checkpoint folder of the miniature: `python -m scail.mini.assemble --vae DIR --dit DIR --out DIR`.

The trained networks go in as float16; the text and the image encoder are the frozen random ones of the training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from scail.checkpoint import write_random_checkpoint
from scail.config import SCAIL_MINI, ModelConfig
from scail.errors import CheckpointError
from scail.fingerprint import TRANSFORMER, VAE, Component, record_hashes, write_model_config
from scail.mini.dit_stage import ENCODER_SEED
from scail.mini.state import Progress, load_state
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae


def assemble(vae_dir: Path, dit_dir: Path, checkpoint_dir: Path, config: ModelConfig = SCAIL_MINI) -> int:
    """Write the folder that `ScailPipeline.from_pretrained` reads.

    Returns:
        Bytes of all weights.

    Raises:
        CheckpointError: If a state is incomplete, or a weight is not finite in float16.
        InvalidInputError: If the folder is not empty.
    """
    vae, transformer = VideoVae.from_config(config.vae), ScailTransformer(config.transformer)
    vae_progress, dit_progress = load_state(vae_dir, "vae", vae), load_state(dit_dir, "dit", transformer)
    write_random_checkpoint(checkpoint_dir, config, seed=ENCODER_SEED)
    write_model_config(checkpoint_dir, config)
    _save(checkpoint_dir, VAE, vae.model, vae_progress)
    _save(checkpoint_dir, TRANSFORMER, transformer, dit_progress)
    record_hashes(checkpoint_dir)
    return sum(path.stat().st_size for path in checkpoint_dir.rglob("*.safetensors"))


def _save(checkpoint_dir: Path, component: Component, network: nn.Module, progress: Progress) -> None:
    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in sorted(network.state_dict().items())}
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{component.folder}: {', '.join(broken[:3])} is not finite in float16.")
    path = checkpoint_dir / component.folder / f"{component.weights}.safetensors"
    save_file(state, path, metadata={"format": "pt", "progress": json.dumps(asdict(progress))})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scail.mini.assemble", description="Write the checkpoint folder.")
    for name in ("vae", "dit", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    assemble(options.vae, options.dit, options.out)


if __name__ == "__main__":
    main()
