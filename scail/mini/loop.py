"""The loop that both stages of training share: a time box, a schedule, averages, logs and saved states."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scail.errors import GenerationError
from scail.mini.muon import make_optimisers
from scail.mini.state import AveragedWeights, Progress, RunLog, save_state

logger = logging.getLogger(__name__)

GRADIENT_NORM = 1.0
FINAL_RATE = 0.02  # of the learning rate, at the end of a run


@dataclass(frozen=True)
class RunPlan:
    """One run of a stage; what it does at a time depends on the share of its time that has passed.

    Attributes:
        minutes: Wall-clock time of all steps of the run; what follows, a last evaluation, is not in it.
        max_steps: Steps after which it ends in any case.
    """

    stage: str
    folder: Path
    minutes: float
    learning_rate: float
    max_steps: int = 1_000_000
    warmup_steps: int = 200
    save_every_seconds: float = 150.0
    log_every_seconds: float = 10.0


@dataclass(frozen=True)
class Moment:
    """Where a run is."""

    step: int  # over all runs of the stage
    run_step: int
    share: float  # of this run, 0 … 1


def train(
    plan: RunPlan,
    module: nn.Module,
    progress: Progress,
    loss_at: Callable[[Moment], dict[str, Tensor]],
    *,
    weight_decay: float = 0.0,
    every_save: Callable[[AveragedWeights, RunLog], None] | None = None,
) -> tuple[AveragedWeights, Progress]:
    """Train until the time is over.

    Args:
        plan: Of this run.
        module: What is trained, in float32.
        progress: From earlier runs.
        loss_at: The loss under the name `loss`, and whatever else is to be logged.
        weight_decay: Of the matrices.
        every_save: Called after each state was saved, such as to evaluate.

    Returns:
        The averaged weights and how far the stage is. The state has been saved.
    """
    optimisers = make_optimisers(module, lr=plan.learning_rate, weight_decay=weight_decay)
    average, log = AveragedWeights(module), RunLog(plan.folder, plan.stage)
    start = last_log = last_save = time.perf_counter()
    before, good, num_summed = progress, average.snapshot(), 0
    sums: dict[str, Tensor] = {}
    progress = replace(progress, num_runs=before.num_runs + 1)
    for run_step in range(plan.max_steps):
        elapsed = time.perf_counter() - start
        share = max(elapsed / (60 * plan.minutes), run_step / plan.max_steps)
        if share >= 1:
            break
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = learning_rate(plan, run_step, share)
        terms = loss_at(Moment(before.num_steps + run_step, run_step, share))
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(terms["loss"])
        if run_step == 0:
            check_gradients(module)
        terms["gradient_norm"] = nn.utils.clip_grad_norm_(module.parameters(), GRADIENT_NORM)
        for optimiser in optimisers:
            optimiser.step()
        average.update()
        sums = {name: sums[name] + value.detach() if sums else value.detach() for name, value in terms.items()}
        num_summed += 1
        now = time.perf_counter()
        progress = replace(progress, num_steps=before.num_steps + run_step + 1, seconds=before.seconds + now - start)
        if now - last_log >= plan.log_every_seconds:
            means = {name: float(value) / num_summed for name, value in sums.items()}
            rate = num_summed / (now - last_log)
            good = _log(log, progress, means, rate, average, good, optimisers)
            last_log, sums, num_summed = time.perf_counter(), {}, 0
        if now - last_save >= plan.save_every_seconds:
            save_state(plan.folder, plan.stage, module, average, progress)
            if every_save:
                every_save(average, log)
            last_save = last_log = time.perf_counter()
            sums, num_summed = {}, 0
    if any(not torch.isfinite(values).all() for values in average.average):
        average.restore(good)
    save_state(plan.folder, plan.stage, module, average, progress)
    log.write(event="end", **vars(progress))
    return average, progress


def learning_rate(plan: RunPlan, run_step: int, share: float) -> float:
    """A linear warm-up over steps, then half a cosine over the time of the run."""
    warm = min(1.0, (run_step + 1) / plan.warmup_steps)
    return plan.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * (0.5 + 0.5 * math.cos(math.pi * share)))


def check_gradients(module: nn.Module) -> None:
    """A layer that gradients do not reach, such as behind a kernel that has no backward pass, would stay as it is.

    Raises:
        GenerationError: With the names of such layers.
    """
    lost = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    if lost:
        raise GenerationError(f"no gradient reaches {len(lost)} parameters, such as {', '.join(lost[:3])}.")


def _log(
    log: RunLog,
    progress: Progress,
    means: dict[str, float],
    rate: float,
    average: AveragedWeights,
    good: list[Tensor],
    optimisers: list[Optimizer],
) -> list[Tensor]:
    """Write a line and return the average to go back to; one that is not finite is left for the last good one."""
    text = " ".join(f"{name} {value:.4f}" for name, value in means.items())
    learning = optimisers[0].param_groups[0]["lr"]
    logger.info("step %d, %.0f s, %.1f/s, rate %.1e: %s", progress.num_steps, progress.seconds, rate, learning, text)
    log.write(step=progress.num_steps, seconds=progress.seconds, rate=rate, learning_rate=learning, **means)
    if all(math.isfinite(value) for value in means.values()):
        return average.snapshot()
    logger.warning("not finite: back to the weights of the last line")
    average.restore(good)
    for optimiser in optimisers:
        optimiser.state.clear()
    return good


def parameters_of(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
