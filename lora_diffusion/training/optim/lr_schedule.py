"""The learning rate over a run, in closed form: a step's rate needs nothing but its number."""

import math

from lora_diffusion.config.train import OptimizerConfig


def lr_fraction(step: int, config: OptimizerConfig, steps: int) -> float:
    """Share of the peak rate, 0..1, at step 0..steps of a run of `steps`.

    Warm-up is linear and reaches the peak at step `warmup_steps`; no step has rate 0, as a first step at 0 would be
    wasted. Then, with p going from 0 to 1 at the last step: constant 1; linear 1 - p; cosine (1 + cos(pi p)) / 2
    [arXiv 1608.03983]; restarts, that cosine `restarts` + 1 times over, each from 1 to 0.
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
