"""Comparison of a run that is killed and resumed twenty times with an uninterrupted run.

    python -m tests.benchmarks.resuming

The runs use the tests' random base and everything that draws random numbers or has a state, and save a state after each
step. The adapters must be equal. Writes `resuming.json` beside this script.
"""

import random
import sys
import tempfile
from pathlib import Path

import torch

from lora_diffusion.adapters.adapter import adapter_hash
from lora_diffusion.config.settings import deep_merge
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.training.train import train
from tests.benchmarks.goals import at_least, write_report
from tests.benchmarks.measuring import machine
from tests.helpers.picture_folders import write_pictures
from tests.helpers.random_bases import write_random_sd
from tests.training.test_loop import settings
from tests.training.test_resuming import EVERYTHING, kill_runs

KILLS, STEPS, SEED = 20, 400, 0
GOALS = {"kills": at_least(KILLS), "same_adapter": at_least(True)}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, pictures = write_random_sd(folder / "base"), write_pictures(folder / "pictures")
        changes = deep_merge(EVERYTHING, {"data": {"folder": str(pictures)}})
        whole = train(settings(pictures, base, changes, steps=STEPS, save_precision="float32"))
        output = folder / "again" / "style.safetensors"
        config = settings(pictures, base, changes, steps=STEPS, save_precision="float32", output=output, state_every=1)
        reached = kill_runs(config, kills=KILLS, rng=random.Random(SEED))
        train(config)
        same = adapter_hash(load_adapter(output)) == adapter_hash(whole.adapter)
    facts = {"machine": machine(), "kills": len(reached), "steps_when_killed": reached, "same_adapter": same}
    sys.exit(write_report(Path(__file__).with_suffix(".json"), facts, GOALS))


if __name__ == "__main__":
    main()
