"""Checks of the networks, the sampler, the preprocessing and the whole pipeline against the official code's tensors.

Every fixture holds weights, inputs and outputs; its metadata says of what kind it is and which cases it has. Weights
are bfloat16 and exact; everything runs in float32 on the CPU. The limits are those under which no known mistake
passes: the smallest one, another LayerNorm eps in the CLIP projection, moves the output by 2e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scail import pipeline as pipeline_module
from scail import preprocess
from scail.config import ImageEncoderConfig, SamplingParams, TextEncoderConfig, TransformerConfig, VaeConfig
from scail.conversion import (
    convert_image_encoder_state,
    convert_text_encoder_state,
    convert_transformer_state,
    convert_vae_state,
)
from scail.geometry import target_size
from scail.kernels.reference import rotate_pairs
from scail.models import rope
from scail.models.image_encoder import ImageEncoder
from scail.models.text_encoder import TextEncoder, clean_prompt
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.pipeline import ScailPipeline
from scail.sampling import denoise, flow_sigmas, guide
from scail.types import Conditioning
from tests.golden.measure import Measured, max_abs

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fixture:
    """A recorded file: its metadata and tensors."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Fixture:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["meta"])
        return cls(meta, load_file(path))

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): tensor.float() for key, tensor in self.tensors.items() if key.startswith(prefix)
        }

    def case(self, index: int) -> dict[str, Tensor]:
        prefix = f"case{index}."
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def cases(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
        for index, meta in enumerate(self.meta["cases"]):
            yield f"case {index}", meta, self.case(index)


def check_dit(fixture: Fixture) -> Iterator[Measured]:
    transformer = transformer_of(fixture, fixture.meta["config"])
    for case, _, tensors in fixture.cases():
        traced = {key.removeprefix("trace."): value for key, value in tensors.items() if key.startswith("trace.")}
        with recorded_outputs(transformer, traced) as outputs:
            out = run_transformer(transformer, tensors, torch.float32)
        yield max_abs(case, "velocity", out, tensors["out"], 1e-5)
        for name, value in outputs.items():
            theirs = traced[name]
            if name == "tokens_out":  # of the last block ours computes the video tokens alone
                num_reference = tensors["ref"].shape[-2] * tensors["ref"].shape[-1] // 4
                theirs = theirs[:, num_reference : num_reference + value.shape[1]]
            yield max_abs(case, f"trace {name}", value, theirs, 1e-5)
    transformer = transformer.to(torch.bfloat16)
    for case, _, tensors in fixture.cases():
        out = run_transformer(transformer, tensors, torch.bfloat16).float()
        error = (out - tensors["out"]).norm() / tensors["out"].norm()
        yield Measured(f"{case} bf16", "velocity, relative", float(error), 0.015)


def check_rope(fixture: Fixture) -> Iterator[Measured]:
    for case, meta, tensors in fixture.cases():
        config = TransformerConfig(hidden_size=meta["head_dim"], num_heads=1)
        num_frames, height, width = meta["t"], meta["grid_h"], meta["grid_w"]
        tables = {
            "ref": rope.reference_rotary(config, height, width),
            "video": rope.video_rotary(config, num_frames, height, width),
            "pose": rope.pose_rotary(config, num_frames, height, width),
        }
        for part, table in tables.items():
            yield max_abs(case, f"{part} cos", table.cos, tensors[f"{part}.cos"], 1e-6)
            yield max_abs(case, f"{part} sin", table.sin, tensors[f"{part}.sin"], 1e-6)
            if f"{part}.x" in tensors:
                rotated = rotate_pairs(tensors[f"{part}.x"][None, :, None], table.cos, table.sin)[0, :, 0]
                yield max_abs(case, f"{part} rotated", rotated, tensors[f"{part}.rotated"], 1e-6)
        whole = rope.rotary_table(config, num_frames, height, width)
        joined = torch.cat([tensors[f"{part}.cos"] for part in tables])
        yield max_abs(case, "whole sequence cos", whole.cos, joined, 1e-6)


def check_sampler(fixture: Fixture) -> Iterator[Measured]:
    for key, theirs in fixture.tensors.items():
        if key.startswith("sigmas."):
            _, steps, shift = key.split(".", 2)
            ours = flow_sigmas(int(steps.removeprefix("steps")), float(shift.removeprefix("shift")))
            yield max_abs("table", f"{steps} {shift}", ours, theirs, 1e-7)
    for case, meta, tensors in fixture.cases():
        sigmas = flow_sigmas(meta["steps"], meta["shift"])
        seen: list[tuple[Tensor, Tensor]] = []

        def recorded_velocity(latents: Tensor, timestep: Tensor, tensors=tensors, meta=meta, seen=seen) -> Tensor:
            step = len(seen)
            seen.append((latents, timestep))
            return guide(tensors["v_uncond"][step], tensors["v_cond"][step], meta["cfg"])

        out = denoise(recorded_velocity, tensors["x0"], sigmas)
        yield max_abs(case, "sigmas", sigmas, tensors["sigmas"], 1e-7)
        yield max_abs(case, "timesteps", torch.stack([t for _, t in seen]), tensors["timesteps"], 1e-4)
        yield max_abs(case, "latents before each step", torch.stack([x for x, _ in seen]), tensors["x_in"], 5e-6)
        yield max_abs(case, "latents", out, tensors["out"], 5e-6)


def check_e2e_latents(fixture: Fixture) -> Iterator[Measured]:
    transformer = transformer_of(fixture, fixture.meta["config"])
    for case, meta, tensors in fixture.cases():
        conditioning = Conditioning(tensors["context"], tensors["clip"], tensors["ref"], tensors["pose"])
        negative = tensors["context_uncond"] if meta["cfg"] > 1 else None
        sigmas = flow_sigmas(meta["steps"], meta["shift"])
        out = pipeline_around(transformer).generate(
            conditioning, negative, tensors["noise"], sigmas, guidance_scale=meta["cfg"]
        )
        yield max_abs(case, "latents", out, tensors["out"], 1e-4)


def check_vae(fixture: Fixture) -> Iterator[Measured]:
    vae = vae_of(fixture, fixture.meta["config"])
    for case, _, tensors in fixture.cases():
        latents = vae.encode(tensors["x_u8"].float() / 127.5 - 1)
        yield max_abs(case, "latents", latents, tensors["latent"], 1e-5)
        yield max_abs(case, "decoded", vae.decode(tensors["latent"]), tensors["decoded"], 1e-5)


def check_umt5(fixture: Fixture) -> Iterator[Measured]:
    encoder = text_encoder_of(fixture, fixture.meta["config"])
    for case, _, tensors in fixture.cases():
        yield max_abs(case, "context", encoder(tensors["ids"], tensors["mask"]), tensors["context"], 2e-5)


def check_clip(fixture: Fixture) -> Iterator[Measured]:
    encoder = image_encoder_of(fixture, fixture.meta["config"])
    for case, _, tensors in fixture.cases():
        pixels = tensors["image_u8"].float() / 127.5 - 1
        yield max_abs(case, "features", encoder(pixels), tensors["features"], 2e-5)


def check_preprocess(fixture: Fixture) -> Iterator[Measured]:
    for index, meta in enumerate(fixture.meta["images"]):
        image = fixture.tensors[f"image{index}.u8"]
        size = target_size(*image.shape[:2], tuple(meta["sampling_image_size"]))
        ours = preprocess.reference_pixels(image.numpy(), *size)[0, :, 0]
        yield max_abs(f"image {index}", "pixels", ours, fixture.tensors[f"image{index}.out"], 1e-5)
    for index, meta in enumerate(fixture.meta["videos"]):
        frames = fixture.tensors[f"video{index}.u8"].numpy()
        cropped = preprocess.crop_pose(frames, *meta["target_hw"])
        half = preprocess.pose_pixels(frames, *meta["target_hw"])[0].transpose(0, 1)
        yield max_abs(f"video {index}", "cropped", cropped, fixture.tensors[f"video{index}.cropped_u8"], 0)
        yield max_abs(f"video {index}", "half size", half, fixture.tensors[f"video{index}.half"], 1e-5)


def check_pipeline(fixture: Fixture) -> Iterator[Measured]:
    config = fixture.meta["config"]
    for case, meta, tensors in fixture.cases():
        pipeline = ScailPipeline(
            transformer=transformer_of(fixture, config["dit"]),
            vae=vae_of(fixture, config["vae"]),
            text_encoder=text_encoder_of(fixture, config["tcfg"]),
            image_encoder=image_encoder_of(fixture, config["ccfg"]),
            tokenizer=RecordedTokenizer(tensors),
            device=CPU,
            dtype=torch.float32,
        )
        prompt = clean_prompt(meta["prompt"])
        reference, pose = tensors["ref_u8"].numpy(), tensors["pose_u8"].numpy()
        height, width = target_size(*reference.shape[:2], tuple(meta["size"]))
        params = SamplingParams(config["steps"], config["cfg"], config["shift"])

        reference_pixels = preprocess.reference_pixels(reference, height, width)
        pose_pixels = preprocess.pose_pixels(pose, height, width)
        yield max_abs(case, "reference pixels", reference_pixels, tensors["ref_pixels"], 1e-5)
        yield max_abs(case, "pose pixels", pose_pixels[:, :, [0, -1]], tensors["pose_pixels_half_ends"], 1e-5)
        yield max_abs(case, "context", pipeline.encode_prompt(prompt), tensors["context"], 2e-5)
        yield max_abs(case, "context, negative", pipeline.encode_prompt(""), tensors["context_uncond"], 2e-5)
        yield max_abs(case, "image embeds", pipeline.encode_image(reference_pixels), tensors["clip"], 2e-5)
        yield max_abs(case, "reference latents", pipeline.encode_latents(reference_pixels), tensors["ref_latent"], 1e-5)
        yield max_abs(case, "pose latents", pipeline.encode_latents(pose_pixels), tensors["pose_latent"], 1e-5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_module, "seeded_noise", lambda *_args, tensors=tensors: tensors["noise"])
            output = pipeline(reference, pose, prompt, params=params, size=(height, width))
        yield max_abs(case, "latents", output.latents, tensors["latents"], 1e-4)
        decoded = pipeline.vae.decode(output.latents)[:, :, [0, -1]]
        yield max_abs(case, "decoded", decoded, tensors["decoded_ends"], 1e-4)
        frames, theirs = torch.from_numpy(output.frames), tensors["frames_u8"]
        yield max_abs(case, "frames, levels", frames, theirs, 1)
        off = (frames != theirs).float().mean() if frames.shape == theirs.shape else torch.tensor(1.0)
        yield Measured(case, "frames, share that differs", float(off), 1e-3)


def check_text_clean(path: Path) -> Iterator[Measured]:
    for index, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        cleaned = clean_prompt(entry["text"])
        yield Measured(f"case {index}", f"{entry['text']!r} → {cleaned!r}", float(cleaned != entry["cleaned"]), 0)


CHECKS: dict[str, Callable[[Fixture], Iterator[Measured]]] = {
    "dit": check_dit,
    "rope": check_rope,
    "sampler": check_sampler,
    "e2e_latents": check_e2e_latents,
    "vae": check_vae,
    "umt5_encoder": check_umt5,
    "clip_visual": check_clip,
    "preprocess": check_preprocess,
    "pipeline": check_pipeline,
}


def check_safetensors(path: Path) -> Iterator[Measured]:
    fixture = Fixture.read(path)
    kind = fixture.meta["kind"]
    if kind not in CHECKS:
        pytest.fail(f"{path.name} is of the kind {kind!r}; known are {', '.join(CHECKS)}")
    with torch.inference_mode():
        yield from CHECKS[kind](fixture)


class RecordedTokenizer:
    """Gives the token ids that the official tokenizer stand-in gave; padded to the fixture's own length."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        prefix = "" if prompt else "uncond_"
        return self.tensors[f"{prefix}ids"], self.tensors[f"{prefix}mask"]


class recorded_outputs:  # noqa: N801  # used as `with recorded_outputs(…)`
    """Records what the layers named in a trace give during one forward pass."""

    LAYERS: ClassVar[dict[str, str]] = {
        "time_embed": "time_embedding",
        "time_proj": "time_projection",
        "text_embed": "text_embedding",
        "clip_embed": "image_embedding",
        "block0.self_attn": "blocks.0.self_attn",
        "block0.cross_attn": "blocks.0.cross_attn",
    }

    def __init__(self, transformer: ScailTransformer, traced: dict[str, Tensor]) -> None:
        self.transformer, self.traced = transformer, traced
        self.outputs: dict[str, Tensor] = {}
        self.undo: list[Callable[[], None]] = []

    def __enter__(self) -> dict[str, Tensor]:
        blocks = self.transformer.blocks
        for name in self.traced:
            if name == "tokens_in":
                self._wrap(blocks[0], "attend", lambda args, _output: self.outputs.setdefault("tokens_in", args[0]))
            elif name == "tokens_out":
                self._wrap(blocks[-1], "finish", lambda _args, output: self.outputs.setdefault("tokens_out", output))
            else:
                self._hook(self.LAYERS[name], name)
        return self.outputs

    def __exit__(self, *_error: object) -> None:
        for undo in self.undo:
            undo()

    def _wrap(self, block: nn.Module, method: str, record: Callable[[Any, Tensor], object]) -> None:
        original = getattr(block, method)

        def wrapped(*args: Any) -> Tensor:
            output = original(*args)
            record(args, output)
            return output

        setattr(block, method, wrapped)
        self.undo.append(lambda: delattr(block, method))

    def _hook(self, layer: str, name: str) -> None:
        def record(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs[name] = output

        self.undo.append(self.transformer.get_submodule(layer).register_forward_hook(record).remove)


def run_transformer(transformer: ScailTransformer, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    conditioning = Conditioning(*(tensors[name].to(dtype) for name in ("context", "clip", "ref", "pose")))
    prepared = transformer.prepare(conditioning)
    return transformer(tensors["x"].to(dtype), tensors["t"], prepared, tensors.get("history_mask"))


def transformer_of(fixture: Fixture, config: dict[str, Any]) -> ScailTransformer:
    transformer = ScailTransformer(
        TransformerConfig(
            num_layers=config["layers"],
            hidden_size=config["hidden"],
            num_heads=config["heads"],
            ffn_size=config["ffn"],
            text_size=config["text_dim"],
            image_size=config["clip_dim"],
            time_freq_size=config["time_freq_dim"],
            latent_channels=config["out_channels"],
            mask_channels=config["in_channels"] - config["out_channels"],
            patch_size=config["patch"][-1],
            eps=config["eps"],
        )
    )
    return _loaded(transformer, convert_transformer_state(fixture.weights("module.model.diffusion_model.")))


def vae_of(fixture: Fixture, config: dict[str, Any]) -> VideoVae:
    defaults = VaeConfig()
    vae = VideoVae.from_config(
        VaeConfig(
            base_size=config["dim"],
            latent_channels=config["z_dim"],
            channel_multipliers=tuple(config.get("dim_mult", defaults.channel_multipliers)),
            num_res_blocks=config.get("num_res_blocks", defaults.num_res_blocks),
            temporal_downsample=tuple(config.get("temporal_downsample", defaults.temporal_downsample)),
        )
    )
    return _loaded(vae, convert_vae_state(fixture.weights("vae.")))


def text_encoder_of(fixture: Fixture, config: dict[str, Any]) -> TextEncoder:
    encoder = TextEncoder.from_config(
        TextEncoderConfig(
            vocab_size=config["vocab"],
            hidden_size=config["dim"],
            attention_size=config["dim_attn"],
            ffn_size=config["dim_ffn"],
            num_heads=config["heads"],
            num_layers=config["layers"],
            num_buckets=config["buckets"],
        )
    )
    return _loaded(encoder, convert_text_encoder_state(fixture.weights("t5.")))


def image_encoder_of(fixture: Fixture, config: dict[str, Any]) -> ImageEncoder:
    encoder = ImageEncoder.from_config(
        ImageEncoderConfig(
            image_size=config["image"],
            patch_size=config["patch"],
            hidden_size=config["dim"],
            ffn_size=config["dim"] * config["ratio"],
            num_heads=config["heads"],
            num_layers=config["layers"],
        )
    )
    return _loaded(encoder, convert_image_encoder_state(fixture.weights("clip.")))


def pipeline_around(transformer: ScailTransformer) -> ScailPipeline:
    """A pipeline of which only `generate` is used."""
    absent: Any = None
    return ScailPipeline(transformer, absent, absent, absent, absent, CPU, torch.float32)


def _loaded(module: Any, state: dict[str, Tensor]) -> Any:
    getattr(module, "model", module).load_state_dict(state, strict=True)  # three are thin shells around a library's
    return module.eval()
