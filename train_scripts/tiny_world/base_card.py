"""The embedded base's model card, written from the measured figures and the logs of its training."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

HEADS = ("subject", "colour", "setting", "time", "all_three")

CARD = """# tiny-sd: the embedded base

A Stable Diffusion in miniature, in diffusers' folder layout: AutoencoderKL (8 latent channels, a quarter of the
picture's side), CLIPTextModel (2 layers, width 128), CLIPTokenizer (one token for every word of the world),
UNet2DConditionModel (48, 96 and 192 channels, cross-attention at every resolution, 9.5 million parameters),
v-prediction with zero terminal SNR. It draws 64 px pictures of a world that this project draws itself
(`train_scripts/tiny_world`): 12 subjects, 9 colours, 7 settings, 3 times of day, 3 kinds of weather. It knows nothing
else. {bytes} bytes in float16. Licence: Apache-2.0, as the code; no picture or weight comes from elsewhere.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("sample_data/tiny-sd")
pipe("a red cat on a beach at sunset", num_inference_steps=20, guidance_scale=4.0).images[0].save("cat.png")
```

![The first pictures of the measurement; a red frame means that the subject was read wrong](contact_sheet.png)

## Does it draw what the prompt says?

{prompts} prompts with {steps} steps and guidance {guidance:g}, half of them with combinations of subject, colour and
setting that were held out of training. Read by the classifier in `../tiny-world-reader`, which calls a blob `nothing`.
Brackets: 95 % interval. The last column is what the classifier reads off true renderings of the same scenes after the
autoencoder.

| | combinations seen in training | held-out combinations | ceiling |
|---|---|---|---|
{accuracy}

Subjects, from the best drawn to the worst: {subjects}.

## How faithful is the autoencoder?

{psnr}

PSNR on pictures that no training saw: {flat_count} flat scenes, {style_count} of each style. None of the styles is
among its training pictures.

## How fast is it?

One picture of {time_steps} steps with guidance: {seconds} s (median of {runs}, {time_threads} threads; load
average before: {load}).

## How was it made?

`python -m train_scripts.train_tiny_base` in three stages; the logs are `training_vae.jsonl` and `training_unet.jsonl`.

{training}

{history}
Measured by `python -m train_scripts.evaluate_tiny_base` on {cpu}, {cores} cores, torch {torch}.
"""


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """Write `folder/README.md` from the figures of `evaluate_tiny_base`."""
    settings, timing, machine = figures["settings"], figures["seconds_per_image"], figures["machine"]
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".txt")]
    best = sorted(figures["subjects"].items(), key=lambda item: -item[1]["accuracy"])
    text = CARD.format(
        bytes=f"{sum(p.stat().st_size for p in files):,}",
        accuracy="\n".join(accuracy_row(head, figures) for head in HEADS),
        subjects=", ".join(f"{name} {100 * share['accuracy']:.0f} %" for name, share in best),
        psnr=psnr_table(figures["autoencoder"]),
        flat_count=figures["autoencoder"]["flat_count"],
        style_count=figures["autoencoder"]["style_count"],
        seconds=timing["median"],
        time_steps=timing["steps"],
        runs=timing["runs"],
        load=timing["load_before"],
        time_threads=timing["threads"],
        history=history(folder),
        training="\n".join(training_row(folder, stage) for stage in ("vae", "unet")),
        **{key: settings[key] for key in ("prompts", "steps", "guidance")},
        **{key: machine[key] for key in ("cpu", "cores", "torch")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def accuracy_row(head: str, figures: dict[str, Any]) -> str:
    parts = [figures["generated"][part][head] for part in ("seen", "held_out")]
    cells = [share_text(part) for part in parts]
    ceiling = figures["ceiling"]["autoencoded"][head]["accuracy"]
    return f"| {head.replace('_', ' ')} | {' | '.join(cells)} | {100 * ceiling:.1f} % |"


def share_text(part: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in part["interval95"])
    return f"{100 * part['accuracy']:.1f} % ({part['right']} of {part['count']}; {low:.1f} to {high:.1f})"


def psnr_table(autoencoder: dict[str, Any]) -> str:
    rows = {"flat scenes": autoencoder["flat_db"], **autoencoder["styles_db"]}
    lines = "\n".join(f"| {name} | {value:.1f} dB |" for name, value in rows.items())
    return f"| pictures | PSNR |\n|---|---|\n{lines}"


def training_row(folder: Path, stage: str) -> str:
    """Steps, minutes and last loss of a stage, from its log; a step number that falls back begins a further run."""
    log = folder / f"training_{stage}.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    ends = [row for row, following in pairwise([*rows, {"step": 0}]) if following["step"] < row["step"]]
    steps, minutes = sum(row["step"] for row in ends), sum(row["minutes"] for row in ends)
    return f"- {stage}: {steps} steps in {len(ends)} run(s) of {minutes:.0f} minutes, last loss {rows[-1]['loss']:.3f}"


def history(folder: Path) -> str:
    """What `history.md` says of runs with other settings than the script's own, if it is there."""
    path = folder / "history.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
