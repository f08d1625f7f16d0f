"""Which timesteps a run trains on, and how often each."""

import torch
from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.errors import ConfigError


def timestep_range(config: ObjectiveConfig, num_timesteps: int) -> tuple[int, int]:
    """Lowest and highest timestep that are drawn."""
    return config.first_timestep, num_timesteps - 1 if config.last_timestep is None else config.last_timestep


def check_timesteps(config: ObjectiveConfig, num_timesteps: int) -> None:
    """Raises ConfigError if the range of timesteps is empty or leaves the base's 0..num_timesteps - 1."""
    first, last = timestep_range(config, num_timesteps)
    for name, value in (("first_timestep", first), ("last_timestep", last)):
        if value >= num_timesteps:
            raise ConfigError(
                f"objective.{name} is {value}, but the base has {num_timesteps} timesteps; "
                f"give at most {num_timesteps - 1}"
            )
    if first > last:
        raise ConfigError(
            f"objective.first_timestep {first} is above last_timestep {last}, so no timestep is left; swap the two"
        )


def draw_timestep(config: ObjectiveConfig, num_timesteps: int, rng: torch.Generator) -> Tensor:
    """A timestep (), int64, of the range that `check_timesteps` has checked; higher ones are noisier.

    The range's n timesteps share the line 0..1 equally, and a point x of it is drawn, from u uniform and z normal:

    - uniform: each timestep alike;
    - logit-normal: x = 1 / (1 + exp(-z)), which favors the middle [arXiv 2403.03206, section 3.1, m = 0, s = 1];
    - content: x = 1 - u^3, which favors high noise, where composition is decided [arXiv 2302.08453, section 3.4];
    - style: x = u^3, which favors low noise, where surfaces are. P(x <= p) is the cube root of p.
    """
    first, last = timestep_range(config, num_timesteps)
    if config.timesteps == "uniform":
        return torch.randint(first, last + 1, (), generator=rng)
    if config.timesteps == "logit-normal":
        point = torch.randn((), generator=rng).sigmoid()
    else:
        cube = torch.rand((), generator=rng) ** 3
        point = cube if config.timesteps == "style" else 1 - cube
    return (first + (point * (last - first + 1)).long()).clamp(max=last)  # the point may be rounded to 1
