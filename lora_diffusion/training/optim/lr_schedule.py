"""Learning rate schedules with warmup, as functions of the step."""

import math

from lora_diffusion.config.train import OptimizerConfig


def lr_fraction(step: int, config: OptimizerConfig, steps: int) -> float:
    """Compute the learning rate of a step as a fraction of the peak rate.

    Warmup is linear and reaches the peak at step `warmup_steps`. It starts above 0, because a step with rate 0 would be
    wasted. After warmup, p rises from 0 to 1 at the end of the run, and the fraction is

    - constant: 1;
    - linear: 1 - p;
    - cosine: (1 + cos(pi p)) / 2 [arXiv:1608.03983];
    - restarts: the cosine schedule `restarts` + 1 times in a row.

    Args:
        step: Number of the step, 0..steps.
        config: Gives the schedule, `warmup_steps` and `restarts`.
        steps: Number of steps of the run.

    Returns:
        A fraction, 0..1.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "restarts" and progress < 1:
        progress = progress * (config.restarts + 1) % 1
    return 0.5 * (1 + math.cos(math.pi * progress))
