"""Distribution of the timesteps that a run trains on."""

import torch
from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.errors import ConfigError


def timestep_range(config: ObjectiveConfig, num_timesteps: int) -> tuple[int, int]:
    """Return the lowest and the highest timestep that are drawn, both inclusive."""
    return config.first_timestep, num_timesteps - 1 if config.last_timestep is None else config.last_timestep


def check_timesteps(config: ObjectiveConfig, num_timesteps: int) -> None:
    """Check the range of timesteps.

    Raises:
        ConfigError: The range is empty or exceeds the timesteps of the base, 0..num_timesteps - 1.
    """
    first, last = timestep_range(config, num_timesteps)
    for name, value in (("first_timestep", first), ("last_timestep", last)):
        if value >= num_timesteps:
            raise ConfigError(
                f"objective.{name} is {value}, but the base has {num_timesteps} timesteps; "
                f"expected at most {num_timesteps - 1}"
            )
    if first > last:
        raise ConfigError(f"objective.first_timestep {first} is above last_timestep {last}; expected at most {last}")


def draw_timestep(config: ObjectiveConfig, num_timesteps: int, rng: torch.Generator) -> Tensor:
    """Draw a timestep; higher timesteps are noisier.

    The interval 0..1 is divided equally among the timesteps of the range. With u uniform on 0..1 and z standard normal,
    the distributions draw a point x of the interval:

    - uniform: x = u;
    - logit-normal: x = 1 / (1 + exp(-z)), which favors medium noise [arXiv:2403.03206, section 3.1, m = 0, s = 1];
    - content: x = 1 - u^3, which favors high noise, where the composition is decided [arXiv:2302.08453, section 3.4];
    - style: x = u^3, which favors low noise, where textures are decided; P(x <= p) is the cube root of p.

    Args:
        config: Gives the distribution and the range, which must have passed `check_timesteps`.
        num_timesteps: Number of timesteps of the base.
        rng: Random generator.

    Returns:
        A scalar tensor, int64.
    """
    first, last = timestep_range(config, num_timesteps)
    if config.timesteps == "uniform":
        return torch.randint(first, last + 1, (), generator=rng)
    if config.timesteps == "logit-normal":
        point = torch.randn((), generator=rng).sigmoid()
    else:
        cube = torch.rand((), generator=rng) ** 3
        point = cube if config.timesteps == "style" else 1 - cube
    return (first + (point * (last - first + 1)).long()).clamp(max=last)  # the point may round to 1
