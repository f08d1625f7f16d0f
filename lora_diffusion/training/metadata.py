"""What an adapter's header tells of the run that made it."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.config.adapter import TIMESTEP_KINDS
from lora_diffusion.library.recipe import library_versions
from lora_diffusion.training.setup import TrainingContext
from lora_diffusion.training.validation import EarlyStopping

RECENT = 20
"""Steps whose mean loss is shown and recorded."""


def make_metadata(run: TrainingContext, losses: Sequence[float], best: EarlyStopping) -> AdapterMetadata:
    """The header's record after as many steps as there are losses."""
    config, base = run.config, run.base
    validation = {"best": asdict(best)} if best.step else {}
    begun = config.adapter.begin_with
    record = {
        **config.model_dump(mode="json", exclude={"output", "resume", "state_every", "samples", "tracking"}),
        "data": {**config.data.model_dump(mode="json"), "folder": config.data.folder.name, "cache_folder": None},
        "on_top_of": {Path(file).name: weight for file, weight in config.on_top_of.items()},
        "adapter": {**config.adapter.model_dump(mode="json"), "begin_with": begun.name if begun else None},
        "data_hash": run.data_hash,
        "steps_done": len(losses),
        "loss": round(recent_loss(losses), 6),
        **validation,
        **({"method": run.rules.report()} if run.rules.report() else {}),
        "versions": library_versions(),
    }
    return AdapterMetadata(
        name=config.name or config.output.stem,
        family=base.family.name,
        variant="v-prediction" if run.denoiser.predicts == "v_prediction" else "",
        base_name=base.name,
        base_hash=base.hash,
        trigger_words=config.trigger_words,
        least_rank=config.adapter.least_rank
        if config.adapter.kind in TIMESTEP_KINDS and not config.trains_embeddings_only
        else 0,
        training=record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def recent_loss(losses: Sequence[float]) -> float:
    """Mean loss of the last steps."""
    return sum(losses[-RECENT:]) / len(losses[-RECENT:])
