"""What a trained checkpoint has to reach on held-out clips, and whether a report of `scail.mini.evaluate` says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scail.mini.evaluate import MAX_DELTA_E, MAX_LIMB_ERROR_PERCENT, MIN_BACKGROUND_PSNR

MAX_SHARE_OF_OTHER = 0.5  # after an exchange, a clip is at least twice as near to what it was given as to the other


@dataclass(frozen=True)
class Goal:
    """One goal and what was reached; it may not be more than the limit, or not less."""

    name: str
    reached: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """What is no number is not met."""
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "met" if self.met else "MISSED"
        return f"{self.name:<42} {self.reached:8.2f}   goal {sign} {self.limit:<4g} {self.unit:<22} {verdict}"


def goals_of(report: dict[str, Any]) -> list[Goal]:
    """The goals over a report's means; those of the exchanges only if there were any."""
    mean, exchanged = report["mean"], report["exchanges"]
    goals = [
        Goal("limb centres off", mean["limb_error_percent"], MAX_LIMB_ERROR_PERCENT, "% of frame height"),
        Goal("limb colours off their reference", mean["delta_e"], MAX_DELTA_E, "CIE76"),
        Goal("background kept", mean["background_psnr"], MIN_BACKGROUND_PSNR, "dB", at_least=True),
    ]
    if exchanged:
        motion = exchanged["limb_error_percent"] / exchanged["limb_error_before_percent"]
        colour = exchanged["delta_e"] / exchanged["delta_e_of_other"]
        goals += [
            Goal(
                "another pose: limb centres off", exchanged["limb_error_percent"], MAX_LIMB_ERROR_PERCENT, "% of height"
            ),
            Goal("another pose: by their error to the old one", motion, MAX_SHARE_OF_OTHER, "times"),
            Goal("another reference: limb colours off", exchanged["delta_e"], MAX_DELTA_E, "CIE76"),
            Goal("another reference: by those of the old one", colour, MAX_SHARE_OF_OTHER, "times"),
        ]
    return goals


def table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    params, ceiling = report["params"], report["vae_alone"]
    lines = [
        f"{report['clips']} held-out clips of {report['num_frames']} frames, {' x '.join(map(str, report['size']))}, "
        f"{params['num_inference_steps']} steps, guidance {params['guidance_scale']:g}",
        *map(str, goals_of(report)),
        f"{'the VAE alone would reach':<42} {ceiling['limb_error_percent']:8.2f} %, {ceiling['delta_e']:.1f} CIE76, "
        f"{ceiling['background_psnr']:.1f} dB",
        f"{'clips within every limit':<42} {report['passing_percent']:8.0f} %",
    ]
    return "\n".join(lines)
