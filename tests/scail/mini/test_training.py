from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from scail.checkpoint import shapes_of
from scail.config import SCAIL_MINI, SamplingParams
from scail.errors import CheckpointError, GenerationError
from scail.fingerprint import check_folder, read_model_config, read_notice
from scail.mini.assemble import assemble
from scail.mini.data import draw_scenes
from scail.mini.dit_stage import Encoders, PoolKind, encode_scenes, flow_loss, sample, start_from_nothing
from scail.mini.evaluate import clip_inputs
from scail.mini.loop import Moment, RunPlan, check_gradients, learning_rate, train
from scail.mini.state import AveragedWeights, Progress, load_state, save_state
from scail.mini.train import parse, run_dit, run_vae
from scail.mini.vae_stage import BatchKind, batch_kinds, draw_pixels, vae_loss
from scail.mini.vae_stage import start_from_nothing as new_vae
from scail.models.transformer import ScailTransformer
from scail.models.vae import VideoVae
from scail.pipeline import ScailPipeline

CPU = torch.device("cpu")
SIZE = (64, 32)
VAE_KINDS = [
    BatchKind(1, 2, SIZE, (32, 32), pose=False, weight=0.3),
    BatchKind(9, 1, SIZE, SIZE, pose=False, weight=0.5),
    BatchKind(5, 2, SIZE, (32, 32), pose=True, weight=0.2),
]
DIT_KINDS = [PoolKind(5, SIZE, 4, 0.7), PoolKind(9, SIZE[::-1], 3, 0.3)]


def plan(stage: str, folder: Path, max_steps: int, **changes) -> RunPlan:
    return RunPlan(stage, folder, minutes=10, learning_rate=1e-3, max_steps=max_steps, log_every_seconds=0, **changes)


def vae(folder: Path, max_steps: int, resume: Path | None = None) -> Progress:
    return run_vae(plan("vae", folder, max_steps), VAE_KINDS, resume=resume, device=CPU, pool_scale=0.002)


def dit(runs: Path, folder: Path, max_steps: int, resume: Path | None = None) -> Progress:
    return run_dit(
        plan("dit", folder, max_steps),
        DIT_KINDS,
        vae_folder=runs / "vae",
        resume=resume,
        device=CPU,
        tokens_per_batch=200,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two steps of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    vae(folder / "vae", 2)
    dit(folder, folder / "dit", 2)
    return folder


@pytest.fixture(scope="module")
def checkpoint(runs) -> Path:
    assemble(runs / "vae", runs / "dit", runs / "checkpoint")
    return runs / "checkpoint"


def test_steps_on_one_batch_lower_the_loss_of_the_vae():
    torch.manual_seed(0)
    network = new_vae(SCAIL_MINI.vae)
    pixels = draw_pixels(VAE_KINDS[1], 1, (0,), held_out=False, device=CPU)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-4)
    losses = []
    for _ in range(8):
        loss = vae_loss(network, pixels)["loss"]
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    assert losses[-1] < 0.8 * losses[0]


def test_steps_on_one_batch_lower_the_loss_of_the_transformer():
    torch.manual_seed(0)
    transformer = start_from_nothing(SCAIL_MINI)
    encoders = Encoders.around(new_vae(SCAIL_MINI.vae), SCAIL_MINI, CPU)
    scenes = draw_scenes(0, 4, num_frames=5, size=SIZE, held_out=False, device=CPU)
    examples, _ = encode_scenes(scenes, encoders)
    examples = examples._replace(latents=(examples.latents / examples.latents.std()).detach())
    empty = encoders.contexts(("",), CPU)
    optimiser = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(1)  # the same noise and the same noise levels
        loss = flow_loss(transformer, examples, empty)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    assert losses[-1] < 0.8 * losses[0]


def test_an_untrained_transformer_predicts_nothing_and_its_loss_is_that_of_silence():
    transformer = start_from_nothing(SCAIL_MINI)
    encoders = Encoders.around(new_vae(SCAIL_MINI.vae), SCAIL_MINI, CPU)
    examples, film = encode_scenes(draw_scenes(0, 3, num_frames=5, size=SIZE, held_out=False, device=CPU), encoders)

    latents = sample(transformer, examples, num_steps=2)

    assert film.shape == (3, 3, 5, *SIZE)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, noise)


def test_a_run_leaves_states_that_fit_through_a_narrow_door_a_log_and_a_picture(runs):
    for stage in ("vae", "dit"):
        files = sorted((runs / stage).iterdir())
        assert len(files) <= 4
        assert all(file.stat().st_size < 15_000_000 for file in files)
        assert (runs / stage / f"{stage}.png").stat().st_size > 1000
        steps = [line["loss"] for line in lines(runs / stage / f"{stage}.jsonl") if "loss" in line]
        assert len(steps) == 2
        assert all(math.isfinite(loss) for loss in steps)


def test_a_run_is_resumed_from_its_weights_and_counters(runs, tmp_path):
    before = VideoVae.from_config(SCAIL_MINI.vae)
    first = load_state(runs / "vae", "vae", before)

    progress = vae(tmp_path, 1, resume=runs / "vae")

    after = VideoVae.from_config(SCAIL_MINI.vae)
    assert load_state(tmp_path, "vae", after) == progress
    assert (progress.num_steps, progress.num_runs) == (first.num_steps + 1, 2)
    assert progress.seconds > first.seconds
    changes = [(new - old).abs().max().item() for old, new in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(changes[2:-2]) > 0  # went on
    assert all(torch.isfinite(parameter).all() for parameter in after.parameters())


def test_a_run_is_resumed_from_an_assembled_checkpoint(runs, checkpoint, tmp_path):
    progress = vae(tmp_path, 1, resume=checkpoint)

    trained, shipped = (VideoVae.from_config(SCAIL_MINI.vae) for _ in range(2))
    assert load_state(checkpoint, "vae", shipped) == load_state(runs / "vae", "vae", trained)
    assert (progress.num_steps, progress.num_runs) == (3, 2)
    for ours, theirs in zip(shipped.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_transformers_run_is_resumed_too(runs, tmp_path):
    progress = dit(runs, tmp_path, 1, resume=runs / "dit")

    assert (progress.num_steps, progress.num_runs) == (3, 2)


def test_the_latents_of_a_run_are_normalised(runs):
    network = VideoVae.from_config(SCAIL_MINI.vae).requires_grad_(False)
    load_state(runs / "vae", "vae", network)
    pixels = draw_pixels(VAE_KINDS[1], 8, (3,), held_out=False, device=CPU)

    latents = network.encode(pixels)

    assert abs(latents.mean()) < 0.3
    assert 0.7 < latents.std() < 1.3


def test_states_of_another_network_or_with_a_file_missing_are_refused(runs, tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        load_state(runs / "vae", "vae", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"has 0 vae-\*\.safetensors files"):
        load_state(tmp_path, "vae", nn.Linear(2, 2))


def test_the_average_follows_the_weights_and_is_exchanged_with_them():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = AveragedWeights(network)
    for _ in range(3):
        network.weight.data.fill_(1.0)
        average.update()

    average.swap()

    assert 0.8 < network.weight.item() < 1.0
    assert average.average[0].item() == 1.0


def test_training_ends_with_its_time_and_saves(tmp_path):
    network = nn.Linear(3, 1)

    def loss_at(moment: Moment):
        return {"loss": network(torch.ones(4, 3)).square().mean()}

    _, progress = train(RunPlan("toy", tmp_path, minutes=0.005, learning_rate=1e-2), network, Progress(), loss_at)

    assert 0.2 < progress.seconds < 3
    assert load_state(tmp_path, "toy", network) == progress


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    network = nn.Linear(3, 1)
    start = network.weight.detach().clone()

    def loss_at(moment: Moment):
        return {"loss": network(torch.ones(4, 3)).sum() * float("nan")}

    train(RunPlan("toy", tmp_path, 1, 1e-2, max_steps=3, log_every_seconds=0), network, Progress(), loss_at)

    load_state(tmp_path, "toy", network)
    assert torch.equal(network.weight, start)


def test_the_learning_rate_rises_over_steps_and_falls_over_the_time_of_the_run(tmp_path):
    schedule = RunPlan("vae", tmp_path, 10, 1e-3, warmup_steps=100)

    assert learning_rate(schedule, 0, 0.0) == pytest.approx(1e-5)
    assert learning_rate(schedule, 99, 0.0) == pytest.approx(1e-3)
    assert learning_rate(schedule, 999, 1.0) == pytest.approx(2e-5)


def test_a_layer_that_no_gradient_reaches_is_an_error():
    network = nn.ModuleDict({"used": nn.Linear(2, 2), "lost": nn.Linear(2, 2)})
    network["used"](torch.ones(1, 2)).sum().backward()

    with pytest.raises(GenerationError, match="2 parameters, such as lost"):
        check_gradients(network)


def test_large_states_are_written_in_several_files(tmp_path, monkeypatch):
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    monkeypatch.setattr("scail.mini.state.MAX_FILE_BYTES", 300)

    save_state(tmp_path, "toy", network, AveragedWeights(network), Progress(3, 1.5, 1))

    assert len(list(tmp_path.glob("toy-*-of-00002.safetensors"))) == 2
    assert load_state(tmp_path, "toy", network) == Progress(3, 1.5, 1)


def test_the_plan_mixes_lengths_orientations_and_pose_pictures():
    kinds = batch_kinds()

    assert {kind.num_frames for kind in kinds} == {1, 5, 9, 17, 33}
    assert {kind.size for kind in kinds} == {(224, 128), (128, 224), (96, 96)}
    assert {kind.film_size for kind in kinds} == {(224, 128), (128, 224)}
    assert sum(kind.weight for kind in kinds) == pytest.approx(1, abs=0.2)
    assert all(kind.num_clips >= 1 for kind in batch_kinds(0.001))


def test_the_transformers_stage_needs_a_vae(capsys):
    with pytest.raises(SystemExit):
        parse(["--stage", "dit", "--out", "x", "--minutes", "1"])
    assert "--vae DIR" in capsys.readouterr().err


def test_the_assembled_folder_is_a_checkpoint_of_at_most_20_mb(checkpoint):
    assert check_folder(checkpoint) == []
    assert read_model_config(checkpoint) == SCAIL_MINI
    assert read_notice(checkpoint) == ""
    assert sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")) <= 20_000_000


def test_the_assembled_checkpoint_renders(checkpoint):
    pipeline = ScailPipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)
    (item,) = clip_inputs(draw_scenes(0, 1, num_frames=5, size=SIZE, held_out=True, device=CPU))

    output = pipeline(item.reference, item.pose, item.prompt, params=SamplingParams(num_inference_steps=2), size=SIZE)

    assert output.frames.shape == (5, *SIZE, 3)
    assert torch.isfinite(output.latents).all()


def test_the_assembled_networks_are_those_that_were_trained(runs, checkpoint):
    trained = ScailTransformer(SCAIL_MINI.transformer)
    load_state(runs / "dit", "dit", trained)
    pipeline = ScailPipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)

    assert shapes_of(pipeline.transformer) == shapes_of(trained)
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(value, trained.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_encoders_of_the_training_are_those_of_the_assembled_checkpoint(checkpoint):
    encoders = Encoders.around(new_vae(SCAIL_MINI.vae), SCAIL_MINI, CPU)
    pipeline = ScailPipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)
    pixels = torch.rand(1, 3, 1, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    torch.testing.assert_close(encoders.contexts(("a red shirt",), CPU), pipeline.encode_prompt("a red shirt"))
    torch.testing.assert_close(encoders.image_encoder(pixels[:, :, 0]), pipeline.encode_image(pixels))
