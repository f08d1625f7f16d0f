"""A run as one page that needs nothing but itself: what came of it, curves, samples, settings and data."""

import base64
import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.workflows.training.curves import Lines, draw_curves
from lora_diffusion.workflows.training.rank_allocation import draw_allocation
from lora_diffusion.workflows.training.sample_sheet import sheet_path

_STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfb; --ink: #1e2028; --pale: #6b7280; --line: #e2e4e8; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181d; --ink: #e6e7ea; --pale: #9aa0ab; --line: #2c3038; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
  max-width: 1080px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.pale { color: var(--pale); margin: 0; } img { max-width: 100%; border-radius: 6px; background: #fff; }
ul { padding-left: 1.2rem; } table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid var(--line); padding: .3rem .8rem .3rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--pale); white-space: nowrap; } pre { overflow-x: auto; font-size: .85rem; }
"""


def write_page(folder: Path, facts: Mapping[str, Any], log: Lines) -> str:
    """The page as HTML. `facts` are those of `run.json`; every text of the user's is escaped."""
    title = html.escape(str(facts["name"]))
    sheet = sheet_path(folder)
    samples = ""
    if sheet.is_file():
        prompts = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in facts["settings"]["samples"]["prompts"])
        picture = f"<img alt='samples by step' src='{_data_uri(sheet.read_bytes())}'>"
        samples = f"<h2>Samples</h2><ol>{prompts}</ol>{picture}"
    ranks = facts.get("allocation") or {}
    if ranks:
        samples += f"<h2>Ranks by block</h2><img alt='ranks by block' src='{_data_uri(draw_allocation(ranks))}'>"
    points = "".join(f"<li>{html.escape(text)}</li>" for text in (*_describe_outcome(facts, log), *_make_advice(log)))
    settings = html.escape(json.dumps(facts["settings"], indent=2))
    every = f"<details><summary>all of them</summary><pre>{settings}</pre></details>"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}: training report</title><style>{_STYLE}</style></head><body>"
        f"<h1>{title}</h1><p class='pale'>{html.escape(facts['finished'])}</p><ul>{points}</ul>"
        f"<h2>Curves</h2><img alt='curves' src='{_data_uri(draw_curves(log))}'>{samples}"
        f"<h2>Settings that are not the defaults</h2>{_html_table(_changed_settings(facts['settings']))}{every}"
        f"<h2>Run</h2>{_html_table(_describe_run(facts))}"
        "</body></html>\n"
    )


def _html_table(rows: Iterable[tuple[str, object]]) -> str:
    cells = (f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>" for key, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _changed_settings(settings: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return the settings that differ from their defaults."""
    told = {"data": {"folder": settings["data"]["folder"]}, "output": settings["output"]}
    plain = _flatten(TrainConfig.model_validate(told).model_dump(mode="json"))
    always = ("data.folder", "output")
    return [(key, value) for key, value in _flatten(settings).items() if key in always or plain.get(key) != value]


def _flatten(table: Mapping[str, Any]) -> dict[str, object]:
    """Flatten nested settings to `section.key`."""
    found: dict[str, object] = {}
    for key, value in table.items():
        found |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _data_wait_share(log: Lines) -> float:
    """Return the share of the steps' time spent reading and encoding data."""
    taken = [(line["seconds"], line.get("data_seconds", 0.0)) for line in log if "seconds" in line]
    return sum(data for _, data in taken) / max(1e-9, sum(whole for whole, _ in taken))


def _list_validations(log: Lines) -> list[tuple[int, float]]:
    return [(line["step"], line["validation"]["loss"]) for line in log if "validation" in line]


def _describe_outcome(facts: Mapping[str, Any], log: Lines) -> list[str]:
    """Describe the outcome of the run in sentences."""
    told = [
        f"{facts['steps_done']} steps in {facts['seconds']:.0f} s, {facts['seconds_per_step']:.2f} s each; "
        f"{facts['memory_mb']:.0f} MB at most; {_data_wait_share(log):.0%} of the time went into waiting for data.",
        f"Training loss {facts['first_loss']:.4f} at first, {facts['last_loss']:.4f} at the end.",
    ]
    found = _list_validations(log)
    if found:
        step, best = min(found, key=lambda item: item[1])
        told.append(f"Held-out loss {found[0][1]:.4f} at first, {best:.4f} at best, after step {step}.")
    by_rank = [line["loss_by_rank"] for line in log if "loss_by_rank" in line]
    if by_rank:
        told.append("By rank: " + ", ".join(f"{rank}: {loss:.4f}" for rank, loss in by_rank[-1].items()) + ".")
    return told


def _make_advice(log: Lines) -> list[str]:
    """Suggest what to try next, as far as the figures support it."""
    found = _list_validations(log)
    if not found:
        return ["Nothing was held out, so nothing here tells overfitting; set validation.share to 0.1 or more."]
    step, best = min(found, key=lambda item: item[1])
    last_step, last = found[-1]
    told: list[str] = []
    if step == last_step and len(found) > 2:
        told.append("The held-out loss was still falling at the end: more steps may help.")
    if last > 1.02 * best:
        told.append(f"It rose by {last / best - 1:.0%} after the best step: fewer steps or a lower rate would do.")
    drifts = [line["validation"]["drift"] for line in log if "validation" in line and line["validation"]["drift"]]
    if drifts and drifts[-1] > 0.1:
        told.append(
            f"Other prompts drifted by {drifts[-1]:.0%} of the prediction's energy: prior.mode 'prediction' holds them."
        )
    return told


def _describe_run(facts: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Describe the run's circumstances."""
    kept = ("base", "base_hash", "adapter", "adapter_hash", "pictures", "held_out", "buckets", "parameters", "machine")
    return [(key.replace("_", " "), facts[key]) for key in kept] + list(facts["versions"].items())
