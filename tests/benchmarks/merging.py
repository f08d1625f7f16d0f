"""Cost of merging four adapters into a checkpoint, compared with copying the files, and with diffusers and PEFT.

    python -m tests.benchmarks.merging

UNets of SD 1.5's and SDXL's size with random weights in float16, with small text encoders and autoencoders; adapters of
rank 16 on all attention projections. Each variant runs in a process of its own, alternating, and writes to disk and
syncs. Times are wall time, since the work is dominated by files. Memory is the growth of the process above its initial
size, which includes the adapters for this library. Writes `merging.json` beside this script.
"""

import argparse
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
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.core.atomic_files import sync_to_disk
from lora_diffusion.core.malloc import keep_freed_memory
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import quiet_libraries
from tests.benchmarks.full_size import base_around, new_unet, pipeline_around, write_adapters
from tests.benchmarks.goals import at_most, write_report
from tests.benchmarks.measuring import machine, status_mb
from tests.helpers.random_bases import write_random_sdxl

WEIGHTS = (0.9, 0.8, 0.7, 0.6)
ROUNDS = 5
GOALS = {
    f"{family}/{figure}/ours": at_most(limit)
    for family in ("sd1", "sdxl")
    for figure, limit in (("times_copying", 1.8), ("memory_of_checkpoint", 0.15))
}


def prepare(folder: Path) -> None:
    """Write the base, of the family that the folder is named after, and the adapters."""
    family = folder.name
    unet = new_unet(family, torch.float16)
    (pipeline_around if family == "sd1" else xl_pipeline_around)(unet).save_pretrained(folder / "base")
    write_adapters(base_around(unet, family), folder, len(WEIGHTS))


def xl_pipeline_around(unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """Return diffusers' SDXL pipeline with this UNet and the other components of the tests' random base."""
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        small: Any = StableDiffusionXLPipeline.from_pretrained(write_random_sdxl(Path(scratch) / "xl"))
        return StableDiffusionXLPipeline(**{**small.components, "unet": unet})


def copied(folder: Path, output: Path) -> None:
    shutil.copytree(folder / "base", output)


def ours(folder: Path, output: Path) -> None:
    keep_freed_memory()  # as every command does
    pairs = zip(adapters_in(folder), WEIGHTS, strict=True)
    entries = [WeightedAdapter(adapter=load_adapter(file), weight=weight, path=file) for file, weight in pairs]
    merge(str(folder / "base"), Blend(entries=tuple(entries)), output)


def peer(folder: Path, output: Path) -> None:
    """Load, fuse and save with diffusers as documented."""
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder / "base", torch_dtype=torch.float16)
    files = adapters_in(folder)
    for file in files:
        pipe.load_lora_weights(file, adapter_name=file.stem)
    pipe.set_adapters([file.stem for file in files], list(WEIGHTS))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(output)


WAYS = {"copy": copied, "ours": ours, "peer": peer}


def adapters_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("a0*.safetensors"))


def measured(way: str, folder: Path) -> dict[str, float]:
    """Return wall seconds until everything is synced, and the growth of the process in MB."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output, before, started = Path(scratch) / "out", status_mb("VmRSS"), time.perf_counter()
        WAYS[way](folder, output)
        for file in output.rglob("*"):
            if file.is_file():
                sync_to_disk(file)
        return {"seconds": time.perf_counter() - started, "mb": status_mb("VmHWM") - before}


def in_own_process(way: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.merging", "--worker", way, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        way, folder = options.worker
        if way == "prepare":
            return prepare(Path(folder))
        return print(json.dumps(measured(way, Path(folder))))
    facts = {"machine": machine(), "rounds": ROUNDS, **{family: compared(family) for family in ("sd1", "sdxl")}}
    sys.exit(write_report(Path(__file__).with_suffix(".json"), facts, GOALS))


def compared(family: str) -> dict[str, object]:
    """Return medians over rounds in which the variants alternate."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / family
        folder.mkdir()
        command = [sys.executable, "-m", "tests.benchmarks.merging", "--worker", "prepare", str(folder)]
        subprocess.run(command, check=True)
        size = sum(file.stat().st_size for file in (folder / "base").rglob("*") if file.is_file()) / 1e6
        rounds = [{way: in_own_process(way, folder) for way in WAYS} for _ in range(ROUNDS)]
    seconds = {way: statistics.median(found[way]["seconds"] for found in rounds) for way in WAYS}
    grown = {way: statistics.median(found[way]["mb"] for found in rounds) for way in WAYS}
    return {
        "checkpoint_mb": round(size),
        "seconds": {way: round(value, 2) for way, value in seconds.items()},
        "times_copying": {way: round(seconds[way] / seconds["copy"], 2) for way in ("ours", "peer")},
        "memory_of_checkpoint": {way: round(grown[way] * 1.048576 / size, 3) for way in ("ours", "peer")},
    }


if __name__ == "__main__":
    main()
