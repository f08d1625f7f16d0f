"""Time the embedded base on an idle machine, and put the figure into its card.

    python -m train_scripts.time_tiny_base

Apart from `evaluate_tiny_base`, because the machine must have nothing else to do.
"""

import json

import torch
import tyro
from diffusers import StableDiffusionPipeline

from train_scripts.evaluate_tiny_base import Config, seconds_per_image
from train_scripts.tiny_world.base_card import write_card


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    pipe = StableDiffusionPipeline.from_pretrained(config.base, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    path = config.out / "figures.json"
    figures = json.loads(path.read_text())
    figures["seconds_per_image"] = seconds_per_image(pipe, config)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    write_card(config.out, figures)
    print(json.dumps(figures["seconds_per_image"]))


if __name__ == "__main__":
    main()
