"""The HTML report of a training run: outcome, curves, samples, settings and data in one self-contained page."""

import base64
import json
import os
from collections.abc import Mapping
from typing import Any, cast

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.templates import render_template
from lora_diffusion.workflows.training.curves import LogLines, draw_curves
from lora_diffusion.workflows.training.rank_allocation import draw_allocation
from lora_diffusion.workflows.training.sample_sheet import sheet_path


def render_report(folder: str | os.PathLike[str], summary: Mapping[str, Any], log: LogLines) -> str:
    """Render the report of a run as HTML, with all images inside.

    Args:
        folder: Folder of the run, which may hold a sheet of samples.
        summary: Content of `run.json`.
        log: Lines of the training log.
    """
    sheet = sheet_path(folder)
    ranks: Mapping[str, list[int]] = summary.get("allocation") or {}
    return render_template(
        "lora_diffusion.workflows",
        "report.html.j2",
        name=summary["name"],
        finished=summary["finished"],
        outcome=[*_describe_outcome(summary, log), *_make_advice(log)],
        curves=_data_uri(draw_curves(log)),
        samples=_data_uri(sheet.read_bytes()) if sheet.is_file() else "",
        prompts=summary["settings"]["samples"]["prompts"],
        ranks=_data_uri(draw_allocation(ranks)) if ranks else "",
        changed_settings=_changed_settings(summary["settings"]),
        all_settings=json.dumps(summary["settings"], indent=2),
        run=_describe_run(summary),
    )


def _changed_settings(settings: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return the settings that differ from their defaults, and always the data folder and the output."""
    required = {"data": {"folder": settings["data"]["folder"]}, "output": settings["output"]}
    defaults = _flatten(TrainConfig.model_validate(required).model_dump(mode="json"))
    always = ("data.folder", "output")
    return [(key, value) for key, value in _flatten(settings).items() if key in always or defaults.get(key) != value]


def _flatten(table: Mapping[str, Any]) -> dict[str, object]:
    """Flatten nested settings to `section.key`."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in cast(dict[str, object], value).items()}
        else:
            flat[key] = value
    return flat


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _data_wait_share(log: LogLines) -> float:
    """Return the fraction of the steps' time that was spent waiting for data."""
    seconds = [(line["seconds"], line.get("data_seconds", 0.0)) for line in log if "seconds" in line]
    return sum(data for _, data in seconds) / max(1e-9, sum(step for step, _ in seconds))


def _list_validations(log: LogLines) -> list[tuple[int, float]]:
    """Return the steps at which the validation loss was measured, with the losses."""
    return [(line["step"], line["validation"]["loss"]) for line in log if "validation" in line]


def _describe_outcome(summary: Mapping[str, Any], log: LogLines) -> list[str]:
    """Describe the outcome of the run in sentences."""
    sentences = [
        f"{summary['steps_done']} steps in {summary['seconds']:.0f} s, {summary['seconds_per_step']:.2f} s each; "
        f"{summary['memory_mb']:.0f} MB of memory at most; {_data_wait_share(log):.0%} of the time was spent waiting "
        "for data.",
        f"Training loss {summary['first_loss']:.4f} at the start, {summary['last_loss']:.4f} at the end.",
    ]
    validations = _list_validations(log)
    if validations:
        step, best = min(validations, key=lambda item: item[1])
        sentences.append(
            f"Validation loss {validations[0][1]:.4f} at the start; the lowest was {best:.4f}, after step {step}."
        )
    by_rank = [line["loss_by_rank"] for line in log if "loss_by_rank" in line]
    if by_rank:
        sentences.append(
            "Loss by rank: " + ", ".join(f"{rank}: {loss:.4f}" for rank, loss in by_rank[-1].items()) + "."
        )
    return sentences


def _make_advice(log: LogLines) -> list[str]:
    """Suggest what to try next, as far as the measurements support it."""
    validations = _list_validations(log)
    if not validations:
        return ["There was no validation set, so overfitting cannot be detected; set validation.share to 0.1 or more."]
    step, best = min(validations, key=lambda item: item[1])
    last_step, last = validations[-1]
    sentences: list[str] = []
    if step == last_step and len(validations) > 2:
        sentences.append("The validation loss was still falling at the end: more steps may help.")
    if last > 1.02 * best:
        sentences.append(
            f"The validation loss rose by {last / best - 1:.0%} after its lowest value: train for fewer steps or with "
            "a lower learning rate."
        )
    drifts = [line["validation"]["drift"] for line in log if "validation" in line and line["validation"]["drift"]]
    if drifts and drifts[-1] > 0.1:
        sentences.append(
            f"Predictions for other prompts changed by {drifts[-1]:.0%} of their energy: prior.mode 'prediction' "
            "preserves them."
        )
    return sentences


def _describe_run(summary: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return the rows of the table on base, data and machine."""
    keys = ("base", "base_hash", "adapter", "adapter_hash", "pictures", "held_out", "buckets", "parameters", "machine")
    return [(key.replace("_", " "), summary[key]) for key in keys] + list(summary["versions"].items())
