"""Every method on one style and one subject of the embedded base: same steps, same pictures per step.

    python -m train_scripts.compare_methods                # quality: hours; goes on where it was stopped
    python -m train_scripts.compare_methods --part rates   # which learning rate suits each; hours, goes on as well
    python -m train_scripts.compare_methods --part cost    # seconds and memory of a step; minutes on an idle machine
    python -m train_scripts.compare_methods --part table   # as Markdown

Learning rates are each method's own (`lora_diffusion/config/methods.py`), as one for all would compare rates; they are
chosen on a seed that the comparison does not use. The style is judged by the distance to its pictures, the subject by
how often the picture world's reader reads it in new places; both over several seeds of the run. Writes `methods.json`
beside this script, which `train_scripts/README.md` shows.
"""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import tyro

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.defaults import default_settings
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.methods import METHODS, Method, with_method
from lora_diffusion.config.settings import EMBEDDED_BASE, deep_merge, validate
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.evaluation.style_distance import list_style_images, style_distance
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import load_base
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.train import train
from lora_diffusion.workflows.training.method_sizes import measure_config
from train_scripts.evaluate_routing import prompts as places
from train_scripts.tiny_world.reader import load_reader, machine, read

OUTPUT = Path(__file__).with_name("methods.json")
STYLE, TRIGGER, SUBJECT = "neon", "zwx", "gloop"
NOT_COMPARED = ("slider", "b-lora")
"""A slider learns no set, and B-LoRA's places are SDXL's."""
STEPS, BATCH, SEEDS = 150, 2, (0, 1, 2)
RATES, RATE_SEED = (0.5, 1.0, 2.0), 7
"""Factors that are tried on the rate a method has, and the seed of these runs."""
TIMED_STEPS = 24
SAMPLED_STEPS, PICTURES = 12, 13
KINDS = ("style", "subject")
Kind = Literal["style", "subject"]


def config_of(method: Method, kind: Kind, seed: int, output: Path, steps: int) -> TrainConfig:
    """A run: the family's defaults for the purpose, the method, and nothing else that differs."""
    purpose = "style" if kind == "style" else "dreambooth"
    told: dict[str, Any] = {
        "output": output,
        "base": EMBEDDED_BASE,
        "steps": steps,
        "batch_size": BATCH,
        "seed": seed,
        "state_every": 0,
        "tracking": {"trackers": [], "report": False},
        "adapter": {"text_encoder_target_modules": []},
        "optimizer": {"text_encoder_learning_rate": None},
        "data": {"folder": sample_data_folder() / "styles" / STYLE}
        if kind == "style"
        else {"folder": sample_data_folder() / "subjects" / SUBJECT, "instance_prompt": f"a {SUBJECT} character"},
    }
    table = deep_merge(default_settings(purpose, "tiny-sd"), told)
    table["prior"] = {"mode": "none"}
    table = with_method(table, method)
    if "textual_inversion" in table:
        table["textual_inversion"] = {
            **table["textual_inversion"],
            "placeholder_tokens": [TRIGGER if kind == "style" else SUBJECT],
        }
    return validate(TrainConfig, table, source=method.name)


def in_child(config: TrainConfig) -> tuple[float, float]:
    """Train in a process of its own; returns the median seconds of a step and the peak of its memory in MB."""
    child = os.fork()
    if child == 0:
        try:
            train(config)
            os._exit(0)
        finally:
            os._exit(1)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{config.output}: the run failed")
    log = read_log(config.output.with_name(f"{config.output.stem}-run") / LOG)
    return median(line["seconds"] for line in log[2:]), usage.ru_maxrss / 1024


def judged(path: Path, kind: Kind) -> float:
    """The style distance, lower is nearer, or the share of pictures in which the subject is read."""
    base = load_base()
    texts = (sample_data_folder() / "prompts" / f"{STYLE}.txt").read_text().splitlines()
    if kind == "subject":
        texts = [text.removesuffix(", in zwx style") for text in places()]
    texts = texts[:: max(1, len(texts) // PICTURES)][:PICTURES]
    configs = [
        GenerateConfig(prompt=text, seed=seed, num_inference_steps=SAMPLED_STEPS) for seed, text in enumerate(texts)
    ]
    blend = Blend(entries=(WeightedAdapter(adapter=load_adapter(path)),))
    images = [picture.image for picture in generate(base, configs, blend)]
    if kind == "style":
        return style_distance(base, images, list_style_images(sample_data_folder() / "styles" / STYLE))
    readings = read(load_reader(sample_data_folder() / "tiny-world-reader"), images)
    return mean(reading.subject == SUBJECT for reading in readings)


def known() -> dict[str, Any]:
    return json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {"methods": {}}


def write(found: dict[str, Any]) -> None:
    part = OUTPUT.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(OUTPUT)


def quality(methods: list[Method]) -> None:
    """What each method comes to, seed by seed, so that a stopped comparison is a whole one of fewer seeds."""
    for seed in SEEDS:
        for method in methods:
            for kind in KINDS:
                found = known()
                row = found["methods"].setdefault(method.name, {})
                if row.get("rate") != method.rate:  # of another rate than the method has now
                    row |= {"rate": method.rate, "style": {}, "subject": {}}
                if str(seed) in row[kind]:
                    continue
                row[kind][str(seed)], row["bytes"], row["saved_numbers"] = train_and_score(method, kind, seed)
                row["machine"] = machine()
                found["quality"] = {"steps": STEPS, "batch_size": BATCH, "pictures": PICTURES}
                write(found)
                print(seed, method.name, kind, row[kind][str(seed)], flush=True)


def rates(methods: list[Method]) -> None:
    """What each method comes to at other rates, on a seed of its own."""
    for factor in RATES:
        for method in methods:
            other = replace(method, rate=method.rate * factor)
            for kind in KINDS:
                found = known()
                row = found["methods"].setdefault(method.name, {}).setdefault("rates", {}).setdefault(kind, {})
                if str(other.rate) in row:
                    continue
                row[str(other.rate)], _, _ = train_and_score(other, kind, RATE_SEED)
                write(found)
                print(method.name, other.rate, kind, row[str(other.rate)], flush=True)


def best_rate(row: dict[str, Any]) -> float:
    """Of those tried, the one with the most of the subject read and the least of the style's distance, in sum."""
    style, subject = row["rates"]["style"], row["rates"]["subject"]
    return float(max(style.keys() & subject.keys(), key=lambda rate: subject[rate] - style[rate]))


def train_and_score(method: Method, kind: Kind, seed: int) -> tuple[float, int, int]:
    """One run: how it is judged, and the file's bytes and numbers."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "it.safetensors"
        in_child(config_of(method, kind, seed, path, STEPS))
        return round(judged(path, kind), 4), path.stat().st_size, load_adapter(path).num_parameters


def cost(methods: list[Method]) -> None:
    """Seconds and memory of a step; LoRA's are taken beside each other method's, as a ratio holds when a figure does
    not."""
    plain = METHODS[0]
    for method in methods:
        with tempfile.TemporaryDirectory() as scratch:
            taken = [
                in_child(config_of(each, "style", 0, Path(scratch) / f"{place}.safetensors", TIMED_STEPS))
                for place, each in enumerate((plain, method, plain, method))
            ]
        found = known()
        row = found["methods"].setdefault(method.name, {})
        row["seconds_per_step"] = round(min(taken[1][0], taken[3][0]), 4)
        row["seconds_ratio"] = round(row["seconds_per_step"] / min(taken[0][0], taken[2][0]), 2)
        row["peak_mb"], row["lora_peak_mb"] = (round(min(taken[i][1], taken[i + 2][1])) for i in (1, 0))
        row["cost_machine"] = machine()
        found["cost"] = {"steps": TIMED_STEPS, "batch_size": BATCH}
        write(found)
        print(method.name, row, flush=True)


def table() -> str:
    """The table of `train_scripts/README.md`, from what was measured."""
    found = known()["methods"]
    rows = [
        "| method | trained parameters | file, MB | step time, x LoRA's | memory, x LoRA's | style distance "
        "| subject recognized |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        row = found.get(method.name, {})
        if len(row.get("style", {})) < 2:
            continue
        config = config_of(method, "style", 0, Path("it.safetensors"), STEPS)
        size = measure_config(method.name, EMBEDDED_BASE, config.adapter, config.textual_inversion)
        memory = row["peak_mb"] / row["lora_peak_mb"] if "peak_mb" in row else None
        costs = [f"{row['seconds_ratio']:.2f}" if "seconds_ratio" in row else "", f"{memory:.2f}" if memory else ""]
        cells = [
            method.name,
            f"{size.trained:,}",
            f"{row['bytes'] / 1e6:.2f}",
            *costs,
            *map(format_spread, (row["style"], row["subject"])),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def format_spread(values: dict[str, float]) -> str:
    """Mean, and least to most."""
    found = list(values.values())
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def all_names() -> list[str]:
    return [each.name for each in METHODS]


def main(part: Literal["quality", "rates", "cost", "table"] = "quality", only: tuple[str, ...] = ()) -> None:
    """Compare.

    Args:
        part: What is measured.
        only: Names of methods; all if empty.
    """
    methods = [each for each in METHODS if each.name in (only or set(all_names()) - {*NOT_COMPARED})]
    if part == "table":
        return print(table())
    {"quality": quality, "rates": rates, "cost": cost}[part](methods)


if __name__ == "__main__":
    tyro.cli(main)
