"""The price list: what is measured, who may be a default, and that the defaults in the code may."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scail.checkpoint import write_random_checkpoint
from scail.config import EXACT, PROFILES, SCAIL_TINY, SamplingParams
from scail.mini.fidelity import CPU, Trial, measure, merge, runs_on
from scail.mini.price_list import is_too_dear, page
from scail.mini.shortcuts import DEFAULT_PRECISION, SHORTCUTS, Shortcut
from scail.models.attention import FLOAT8_BACKENDS
from scail.pipeline import ScailPipeline

DOCS = Path(__file__).parents[3] / "docs"
OWN_VAE = "our VAE pass, streamed"
BY_NAME = {shortcut.name: shortcut for shortcut in SHORTCUTS}


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(folder, SCAIL_TINY, seed=0)
    params = SamplingParams(num_inference_steps=3, guidance_scale=2.0)
    return Trial(str(folder), "cpu", num_clips=1, num_frames=1, params=params)


@pytest.fixture(scope="module")
def saved() -> list[int]:
    """How many rows there were each time when the report was saved."""
    return []


@pytest.fixture(scope="module")
def report(trial, saved) -> dict:
    names = (
        "encodings kept from an earlier clip",
        "no guidance",
        "bfloat16",
        "8 steps, dpm++",
        "VAE in bfloat16",
        OWN_VAE,
    )
    broken = Shortcut("broken", "precision", sampling={"shift": -1.0})
    return measure(trial, [broken, *(BY_NAME[name] for name in names)], save=lambda it: saved.append(len(it["rows"])))


def rows_of(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"]}


def test_what_changes_nothing_is_equal_and_what_changes_something_is_not(report):
    rows = rows_of(report)

    kept = rows["encodings kept from an earlier clip"]
    assert (kept["latent_rms"], kept["psnr"]) == (0, None)
    assert kept["limb_error_percent"] == report["exact"]["limb_error_percent"]
    assert rows["no guidance"]["latent_rms"] > rows["bfloat16"]["latent_rms"] > 1e-4
    assert rows["8 steps, dpm++"]["latent_rms"] > 1e-4
    assert rows["VAE in bfloat16"]["psnr"] > 30
    assert rows[OWN_VAE]["latent_rms"] < 1e-4
    assert rows[OWN_VAE]["psnr"] is None or rows[OWN_VAE]["psnr"] > 60
    assert all(row["worst_psnr"] <= row["psnr"] for row in rows.values() if row.get("psnr"))


def test_clips_of_two_processes_are_those_of_one(trial):
    two = replace(trial, num_clips=2)

    row = measure(two, [BY_NAME["two processes share the clips"]], save=lambda _report: None)["rows"][0]

    assert (row["latent_rms"], row["psnr"]) == (0, None)


def test_a_row_that_cannot_be_measured_says_why_and_the_others_go_on(report, saved):
    assert "shift is -1.0" in rows_of(report)["broken"]["failed"]
    assert saved == [1, 2, 3, 4, 5, 6, 7]  # whoever is stopped keeps what there was


def test_rows_for_a_gpu_are_left_out_on_a_cpu():
    assert not runs_on(BY_NAME["bfloat16, compiled"], CPU)
    assert not runs_on(BY_NAME["bfloat16, cudnn"], CPU)
    assert runs_on(BY_NAME["bfloat16"], CPU)


def test_reports_of_several_devices_become_one_page_and_newer_rows_replace_older(report):
    gpu = report | {"device": "GPU 1", "rows": [row | {"psnr": 41.0} for row in report["rows"][1:]]}
    newer = gpu | {"rows": [rows_of(gpu)["bfloat16"] | {"psnr": 33.0}]}

    merged = merge([report, gpu, {"runs": [newer]}])

    assert [run["device"] for run in merged["runs"]] == ["cpu", "GPU 1"]
    lines = page(merged).splitlines()
    assert any(line.startswith("| bfloat16 | GPU 1 |") and "33.0 dB" in line and "| no |" in line for line in lines)
    assert any(line.startswith("| no guidance | GPU 1 |") and "41.0 dB" in line for line in lines)
    assert any(line.startswith("| encodings kept from an earlier clip | cpu | 0 % | equal |") for line in lines)


def test_a_run_of_other_clips_replaces_the_one_before(report):
    other = report | {"num_clips": report["num_clips"] + 1, "rows": report["rows"][:1]}

    [run] = merge([report, other])["runs"]

    assert (run["num_clips"], run["rows"]) == (other["num_clips"], other["rows"])


@pytest.mark.parametrize(
    ("changes", "too_dear"),
    [
        ({}, False),
        ({"psnr": None}, False),
        ({"psnr": 34.9}, True),
        ({"limb_error_percent": 1.31}, True),
        ({"limb_error_percent": 0.5}, False),
        ({"limb_error_percent": float("nan")}, True),
        ({"failed": "RuntimeError"}, True),
    ],
)
def test_what_costs_too_much_may_not_be_a_default(changes, too_dear):
    row = {"psnr": 40.0, "limb_error_percent": 1.2} | changes

    assert is_too_dear(row, {"limb_error_percent": 1.0}) is too_dear


def test_what_is_called_a_default_is_one_in_the_code():
    signature = inspect.signature(ScailPipeline.from_pretrained)

    assert signature.parameters["dtype"].default == getattr(torch, DEFAULT_PRECISION)
    assert signature.parameters["runtime"].default == EXACT
    defaults = {shortcut.name for shortcut in SHORTCUTS if shortcut.is_default}
    assert {"bfloat16", "as installed", "bfloat16, cudnn", "bfloat16, flash_attention_3"} <= defaults
    assert not {"8 steps", "no guidance", "bfloat16, fp8 products", "bfloat16, flash_attention_3_float8"} & defaults


def test_names_of_shortcuts_are_their_own():
    assert len(BY_NAME) == len(SHORTCUTS)


def test_a_shortcut_differs_from_the_exact_path_in_what_it_says_alone():
    shortcut = BY_NAME["bfloat16, fp8 products"]

    assert shortcut.runtime_config() == replace(EXACT, attention="sdpa", memory="resident", quantization="fp8")


def test_the_row_of_profile_quality_is_that_profile():
    runtime = BY_NAME["as installed, profile quality: fp8 products and attention"].runtime_config()

    quality = PROFILES["quality"]
    assert (runtime.quantization, runtime.attention in FLOAT8_BACKENDS) == (quality.quantization, True)
    assert quality.attention == "float8"


class TestThePage:
    report = json.loads((DOCS / "fidelity.json").read_text(encoding="utf-8"))

    def test_is_what_was_measured(self):
        assert (DOCS / "fidelity.md").read_text(encoding="utf-8") == page(self.report)

    def test_no_default_costs_more_than_a_default_may(self):
        dear = [
            f"{row['name']} on {run['device']}"
            for run in self.report["runs"]
            for row in run["rows"]
            if BY_NAME[row["name"]].is_default and is_too_dear(row, run["exact"])
        ]

        assert dear == []

    def test_names_what_is_not_measured(self):
        run = self.report["runs"][0]
        rest = [row for row in run["rows"] if row["name"] != "no guidance"]

        _, gaps = page({"runs": [run | {"rows": rest}]}).split("## Not measured yet")
        assert "no guidance" in gaps
        assert not any(row["name"] in gaps.strip(". \n").split("; ") for row in rest)
