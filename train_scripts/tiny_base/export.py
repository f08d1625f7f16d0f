"""Stage four of the embedded base: the trained pipeline in float16, with the logs of its training."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline


def export(out: Path, target: Path) -> None:
    """Save the pipeline in `out` to `target` in float16, with the logs of its training.

    The text encoder's configuration says float32, because transformers would otherwise load it in the type of its
    file, and diffusers loads the rest in float32.
    """
    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float16, safety_checker=None)
    pipe.save_pretrained(target)
    config = target / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for file in target.rglob("*.json"):  # diffusers writes down where the weights were loaded from
        if file.name in ("config.json", "model_index.json"):
            table = json.loads(file.read_text())
            table.pop("_name_or_path", None)
            file.write_text(json.dumps(table, indent=2) + "\n")
    for log in sorted(out.glob("training_*.jsonl")):
        shutil.copyfile(log, target / log.name)
