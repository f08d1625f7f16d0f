"""Time of a training step of this library and of diffusers' example script, with all overhead.

    python -m tests.benchmarks.trainers train_text_to_image_lora.py

The script is in diffusers' repository under `examples/text_to_image`. Both trainers are started from the command line,
in processes of their own: a short run and a long run. The difference of their durations divided by the difference of
their steps is the time of a step with all overhead. This library reads and encodes the images once, in the short run as
well; the script has no cache and does so in every step. One thread, float32, batch 1, rank 4 on the UNet's attention
projections. The bases are the embedded one and one of SD 1.5's size (UNet, autoencoder and text encoder) with random
weights, at 256 pixels. Writes `trainers.json` beside this script.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.models.load import quiet_libraries
from tests.benchmarks.full_size import new_unet
from tests.benchmarks.goals import at_least, at_most, write_report
from tests.benchmarks.measuring import machine
from train_scripts.write_configs import toml

RANK, PICTURES, ROUNDS = 4, 2, 5
STEPS = {"tiny": (8, 88), "sd1": (3, 8)}
SIZES_PX = {"tiny": 64, "sd1": 256}
GOALS = {
    f"{size}/{figure}": goal
    for size in STEPS
    for figure, goal in (("times_their_throughput", at_least(1.5)), ("of_their_memory", at_most(1.0)))
}


def write_sd1(folder: Path) -> Path:
    """Write a base of SD 1.5's size with random weights, and the tokenizer and scheduler of the embedded base."""
    tiny = sample_data_folder() / "tiny-sd"
    tokenizer: Any = CLIPTokenizer.from_pretrained(tiny / "tokenizer", model_max_length=77)
    with quiet_libraries():
        text = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
        down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        widths = (128, 256, 512, 512)
        unet = new_unet("sd1")
        unet.register_to_config(sample_size=64)
        vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2)
        pipe: Any = StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDPMScheduler.from_pretrained(tiny, subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(folder)
    return folder


def ours(base: Path, pictures: Path, steps: int, size_px: int, folder: Path) -> list[str]:
    settings = {
        "base": str(base),
        "output": "ours.safetensors",
        "steps": steps,
        "state_every": 0,
        "resume": False,
        "data": {"folder": str(pictures), "resolution": size_px},
        "captions": {"dropout": 0.0},
        "adapter": {"rank": RANK, "unet_target_modules": ["attention"]},
        "tracking": {"report": False},
    }
    config = folder / "ours.toml"
    config.write_text(toml(settings))
    return [sys.executable, "-m", "lora_diffusion.cli", "train", str(config)]


def theirs(script: Path, base: Path, pictures: Path, steps: int, size_px: int, folder: Path) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": pictures,
        "resolution": size_px,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "rank": RANK,
        "seed": 0,
        "output_dir": folder / "theirs",
    }
    told = [f"--{key}={value}" for key, value in flags.items()]
    return [sys.executable, "-m", "tests.benchmarks.peer_script", str(script), "--center_crop", *told]


def taken(command: list[str]) -> tuple[float, float]:
    """Return the duration of a process in seconds and its peak size in MB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=environment) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command[:4]} failed:\n{said.read()[-3000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def compared(script: Path, base: Path, size: str, pictures: Path, folder: Path) -> dict[str, Any]:
    """Measure a step of both trainers on one base, alternating."""
    short, long = STEPS[size]
    size_px = SIZES_PX[size]
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    memory = {"ours": 0.0, "theirs": 0.0}
    for _ in range(ROUNDS if size == "tiny" else 1):
        for who in seconds:
            runs = []
            for steps in (short, long):
                command = (
                    ours(base, pictures, steps, size_px, folder)
                    if who == "ours"
                    else theirs(script, base, pictures, steps, size_px, folder)
                )
                runs.append(taken(command))
                shutil.rmtree(folder / "ours-run", ignore_errors=True)
            seconds[who].append((runs[1][0] - runs[0][0]) / (long - short))
            memory[who] = max(memory[who], *(mb for _, mb in runs))
    step = {who: statistics.median(values) for who, values in seconds.items()}
    return {
        "seconds_per_step": {who: round(value, 4) for who, value in step.items()},
        "times_their_throughput": round(step["theirs"] / step["ours"], 3),
        "memory_mb": {who: round(value) for who, value in memory.items()},
        "of_their_memory": round(memory["ours"] / memory["theirs"], 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    script = Path(sys.argv[1])
    facts: dict[str, Any] = {"machine": machine(), "script": hashlib.sha256(script.read_bytes()).hexdigest()[:16]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = folder / "pictures"
        pictures.mkdir()
        for path in sorted((sample_data_folder() / "styles" / "neon").glob("*.png"))[:PICTURES]:
            for each in (path, path.with_suffix(".txt")):
                shutil.copy(each, pictures)
        facts["tiny"] = compared(script, sample_data_folder() / "tiny-sd", "tiny", pictures, folder)
        print(json.dumps(facts["tiny"]), flush=True)
        facts["sd1"] = compared(script, write_sd1(folder / "sd1"), "sd1", pictures, folder)
    sys.exit(write_report(Path(__file__).with_suffix(".json"), facts, GOALS))


if __name__ == "__main__":
    main()
