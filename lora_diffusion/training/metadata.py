"""Metadata of a trained adapter: what the file records about the run that made it."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.config.adapter import TIMESTEP_KINDS
from lora_diffusion.library.recipe import library_versions
from lora_diffusion.training.loop import recent_loss
from lora_diffusion.training.setup import TrainingContext
from lora_diffusion.training.validation import EarlyStopping


def make_training_metadata(run: TrainingContext, losses: Sequence[float], best: EarlyStopping) -> AdapterMetadata:
    """Make the metadata of the adapter in its current state.

    Absolute paths are reduced to file names, and settings that do not affect the result are left out.

    Args:
        run: The run.
        losses: Loss of every step so far.
        best: The best validation so far.
    """
    config, base = run.config, run.base
    validation = {"best": asdict(best)} if best.step else {}
    initial = config.adapter.init_from
    record = {
        **config.model_dump(mode="json", exclude={"output", "resume", "state_every", "samples", "tracking"}),
        "data": {**config.data.model_dump(mode="json"), "folder": config.data.folder.name, "cache_folder": None},
        "base_adapters": {Path(file).name: weight for file, weight in config.base_adapters.items()},
        "adapter": {**config.adapter.model_dump(mode="json"), "init_from": initial.name if initial else None},
        "data_hash": run.data_hash,
        "steps_done": len(losses),
        "loss": round(recent_loss(losses), 6),
        **validation,
        **({"method": run.callbacks.report()} if run.callbacks.report() else {}),
        "versions": library_versions(),
    }
    return AdapterMetadata(
        name=config.name or config.output.stem,
        family=base.family.name,
        variant="v-prediction" if run.denoiser.predicts == "v_prediction" else "",
        base_name=base.name,
        base_hash=base.hash,
        trigger_words=config.trigger_words,
        min_rank=config.adapter.min_rank
        if config.adapter.kind in TIMESTEP_KINDS and not config.trains_embeddings_only
        else 0,
        training=record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
