"""Measure what the defaults for a style and a subject come to on the embedded base, beside the ready adapters.

    python -m train_scripts.evaluate_defaults

Styles: the distance to the training set in the autoencoder's features, on the style's sample prompts. Subjects: how
often the picture world's reader reads the subject, in places that its training set does not show. Writes
`defaults.json` beside this script.
"""

import json
import tempfile
import time
from pathlib import Path

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.evaluation.style_distance import list_style_images, style_distance
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.training.default_settings import make_settings, subject_settings
from lora_diffusion.training.train import train
from train_scripts.evaluate_routing import prompts as places
from train_scripts.tiny_world.reader import load_reader, machine, read

STYLES = {"neon": "zwx"}
SUBJECTS = {"gloop": "a gloop character"}
STEPS = 20


def pictures(base: Base, texts: list[str], adapter: Adapter | None) -> list:
    blend = Blend(entries=(WeightedAdapter(adapter=adapter),)) if adapter else Blend()
    configs = [GenerateConfig(prompt=text, seed=seed, num_inference_steps=STEPS) for seed, text in enumerate(texts)]
    return [picture.image for picture in generate(base, configs, blend)]


def measured(kind: str, name: str, base: Base, adapter: Adapter | None) -> float:
    """The style distance, lower is nearer, or the share of pictures in which the subject is read."""
    if kind == "style":
        texts = (sample_data_folder() / "prompts" / f"{name}.txt").read_text().splitlines()
        return style_distance(
            base, pictures(base, texts, adapter), list_style_images(sample_data_folder() / "styles" / name)
        )
    texts = [text.removesuffix(", in zwx style").replace("gloop", name) for text in places()]
    readings = read(load_reader(sample_data_folder() / "tiny-world-reader"), pictures(base, texts, adapter))
    return sum(reading.subject == name for reading in readings) / len(readings)


def trained(kind: str, name: str, folder: Path) -> tuple[Adapter, float]:
    """The adapter of the defaults, and the seconds that it took."""
    output, started = folder / f"{name}.safetensors", time.perf_counter()
    if kind == "style":
        told = {
            "data": {"folder": sample_data_folder() / "styles" / name},
            "output": output,
            "trigger_words": [STYLES[name]],
        }
        config = make_settings("style", told, base=EMBEDDED_BASE)
    else:
        data = sample_data_folder() / "subjects" / name
        told = subject_settings(data, output, instance=SUBJECTS[name], class_prompt="a cat")
        config = make_settings("dreambooth", told, base=EMBEDDED_BASE)
    result = train(config)
    if result.stopped:
        raise SystemExit("stopped; nothing is measured of a part of a run")
    return result.adapter, time.perf_counter() - started


def evaluate() -> None:
    """Train each with the defaults, measure, and write the figures."""
    base, rows = load_base(), []
    output = Path(__file__).with_name("defaults.json")
    for kind, names in (("style", STYLES), ("subject", SUBJECTS)):
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                adapter, seconds = trained(kind, name, Path(scratch))
            ready = load_adapter(sample_data_folder() / "adapters" / f"{name}.safetensors")
            found = {"base": None, "defaults": adapter, "ready adapter": ready}
            rows.append(
                {
                    "kind": kind,
                    "name": name,
                    "steps": adapter.metadata.training["steps_done"],
                    "seconds": round(seconds),
                    **{key: round(measured(kind, name, base, one), 3) for key, one in found.items()},
                }
            )
            print(rows[-1], flush=True)
            output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    evaluate()
