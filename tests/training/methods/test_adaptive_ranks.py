"""Methods that choose ranks in training: DyLoRA, AdaLoRA and sparse LoRA."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.cli import main
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.config.settings import deep_merge
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.in_place import blended_weights
from lora_diffusion.models.load import load_base
from lora_diffusion.training.checkpoint import list_states
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.methods.adalora import AdaLoRACallbacks, TrainableAdaLoRA
from lora_diffusion.training.methods.base import AdapterSize
from lora_diffusion.training.methods.dylora import DyLoRACallbacks, TrainableDyLoRA
from lora_diffusion.training.methods.injection import adapter_disabled, extract_adapter, get_layer
from lora_diffusion.training.methods.sparse import SparseCallbacks, TrainableSparseLoRA
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from lora_diffusion.training.validation import run_validation
from lora_diffusion.workflows.training.rank_allocation import draw_allocation, ranks_by_block
from lora_diffusion.workflows.training.run import train_and_report
from tests.helpers.method_cases import config_of, injected, module_of, shake
from tests.helpers.short_runs import UNET_ONLY, interrupted, settings, short_run


def test_dylora_trains_the_last_used_direction_only(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("dylora"))
    assert isinstance(made.callbacks, DyLoRACallbacks)
    update: TrainableDyLoRA = get_layer(base, paths[0])
    seen: set[int] = set()
    for step in range(60):
        made.callbacks.before_step(step)
        seen.add(update.training_rank)
        assert {get_layer(base, path).training_rank for path in paths} == {update.training_rank}
    assert seen == {1, 2, 3, 4}
    update.train()
    update.training_rank = 2
    down, up = update.factors()
    assert down.shape[0] == up.shape[1] == 2
    (down.square().sum() + up.square().sum()).backward()
    moved = update.down.grad.flatten(1).abs().sum(dim=1) > 0
    assert moved.tolist() == [False, True, False, False]


def test_dylora_file_truncated_to_a_rank_has_the_reported_loss(ink: Path, tmp_path: Path) -> None:
    """The loss that a run reports for a rank is that of the file truncated to it."""
    changes = {"save_precision": "float32", "adapter": {"kind": "dylora"}, "optimizer": {"learning_rate": 1e-2}}
    config = short_run(ink, tmp_path / "it.safetensors", 12, changes)
    result = train(config)
    by_rank = read_log(tmp_path / "it-run" / LOG)[-1]["loss_by_rank"]
    assert list(by_rank) == ["1", "2", "4"]
    cut = tmp_path / "two.safetensors"
    assert main(["resize", str(result.path), str(cut), "--first", "2"]) == 0
    adapter = load_adapter(cut)
    assert {layer.rank for layer in adapter.layers.values() if isinstance(layer, LoRALayer)} == {2}
    run = set_up(config)
    assert run.held_out
    with adapter_disabled(run.base), blended_weights(run.base, Blend(entries=(WeightedAdapter(adapter=adapter),))):
        loss = run_validation(run.denoiser, run.captions, run.held_out, config).loss
    assert loss == pytest.approx(by_rank["2"], rel=1e-4)
    assert main(["resize", str(result.path), str(tmp_path / "x.safetensors"), "--first", "2", "--rank", "2"]) == 2


def test_adalora_ends_within_its_budget_with_the_important_directions(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("adalora", unet_target_modules=("attention",)))
    callbacks = made.callbacks
    assert isinstance(callbacks, AdaLoRACallbacks)
    shake(made.parameters)
    important: TrainableAdaLoRA = get_layer(base, paths[0])
    for step in range(20):
        for name, parameter in made.parameters.items():
            parameter.grad = torch.ones_like(parameter) * (10.0 if name.startswith(paths[0]) else 1.0)
        callbacks.after_gradients(step)
        callbacks.after_step(step, lambda _strength: 1e-3)
    left = [int((get_layer(base, path).strength != 0).sum()) for path in paths]
    assert sum(left) <= callbacks.final_budget
    assert left[0] == important.strength.numel() > 4
    saved = extract_adapter(base, paths, AdapterMetadata(), torch.float32)
    ranks = {layer.rank for layer in saved.layers.values() if isinstance(layer, LoRALayer)}
    assert len(ranks) > 1


def test_report_shows_the_rank_allocation(ink: Path, tmp_path: Path) -> None:
    changes = {"adapter": {"kind": "adalora", "rank": 2}}
    result = train_and_report(short_run(ink, tmp_path / "it.safetensors", 20, changes))
    ranks = ranks_by_block(result.adapter)
    assert sum(sum(each) for each in ranks.values()) == sum(
        layer.rank for layer in result.adapter.layers.values() if isinstance(layer, LoRALayer)
    )
    assert "Ranks by block" in (tmp_path / "it-run" / "report.html").read_text()
    with Image.open(io.BytesIO(draw_allocation(ranks))) as picture:
        assert picture.width > 800
    assert result.adapter.metadata.training["method"]["directions_left"] <= 2 * len(result.adapter.layers)


def test_resumed_adalora_run_is_bit_identical(pictures: Path, sd_folder: Path) -> None:
    changes = deep_merge(UNET_ONLY, {"adapter": {"kind": "adalora"}, "samples": {"every": 5}})
    config = settings(pictures, sd_folder, changes, state_every=1, steps=12)
    whole = train(config).adapter
    interrupted(config)
    assert list_states(config.output.with_name("style-run"))
    assert train(config).adapter.hash == whole.hash


def test_sparse_prunes_the_weakest_directions_and_shrinks_the_file(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(
        base, config_of("sparse", unet_target_modules=("attention",), sparse_l1=0.0, sparse_keep=0.25)
    )
    assert isinstance(made.callbacks, SparseCallbacks)
    whole = extract_adapter(base, paths, AdapterMetadata(), torch.float32).num_parameters
    shake(made.parameters)
    strengths = torch.cat([get_layer(base, path).compute_strengths().detach() for path in paths])
    made.callbacks.after_step(0, lambda _gate: 1e-3)
    assert made.callbacks.report()["share_left"] == 1
    made.callbacks.after_step(19, lambda _gate: 1e-3)
    assert made.callbacks.report()["share_left"] == pytest.approx(0.25, abs=0.01)
    gates = torch.cat([get_layer(base, path).gate for path in paths])
    assert float(strengths[gates != 0].min()) >= float(strengths[gates == 0].max())
    assert extract_adapter(base, paths, AdapterMetadata(), torch.float32).num_parameters < 0.5 * whole
    update = TrainableSparseLoRA(
        module_of("linear"), AdapterSize(rank=3, scale=1.0, config=AdapterConfig()), torch.Generator()
    )
    pull = SparseCallbacks([[update]], AdapterConfig(kind="sparse", sparse_l1=2.0, sparse_keep=1.0), steps=10)
    pull.after_step(0, {update.gate: 0.3}.__getitem__)
    assert torch.allclose(update.gate, torch.full((3,), 0.4))
    pull.after_step(1, {update.gate: 0.3}.__getitem__)
    assert torch.equal(update.gate, torch.zeros(3))


def test_best_step_is_after_the_pruning(ink: Path, tmp_path: Path) -> None:
    """Before the pruning the loss is lower, but those steps do not count."""
    changes = {
        "adapter": {"kind": "sparse", "sparse_keep": 0.01},
        "validation": {"every": 2},
        "optimizer": {"learning_rate": 1e-2},
    }
    config = short_run(ink, tmp_path / "it.safetensors", 16, changes)
    result = train(config)
    log = read_log(tmp_path / "it-run" / LOG)
    losses = {line["step"]: line["validation"]["loss"] for line in log if "validation" in line}
    assert min(losses, key=losses.__getitem__) < 8
    assert result.best
    assert result.best.step >= 8
    begun = 4 * len(result.adapter.layers)
    left = sum(layer.rank for layer in result.adapter.layers.values() if isinstance(layer, LoRALayer))
    assert left < 0.5 * begun  # each layer keeps at least one direction


def test_strength_of_a_direction_includes_the_scale() -> None:
    config = AdapterConfig(kind="sparse")
    plain, doubled = (
        TrainableSparseLoRA(
            module_of("linear"), AdapterSize(rank=3, scale=scale, config=config), torch.Generator().manual_seed(0)
        )
        for scale in (1.0, 2.0)
    )
    with torch.no_grad():
        for update in (plain, doubled):
            update.up.fill_(1.0)
    assert torch.allclose(doubled.compute_strengths(), 2 * plain.compute_strengths())


def test_each_component_is_pruned_separately() -> None:
    """Text encoders learn at lower rates; pruned together with the UNet, they would lose all directions."""
    config = AdapterConfig(kind="sparse", sparse_keep=0.5)
    unet, text = (
        TrainableSparseLoRA(
            module_of("linear"), AdapterSize(rank=4, scale=1.0, config=config), torch.Generator().manual_seed(seed)
        )
        for seed in (0, 1)
    )
    with torch.no_grad():
        unet.up.fill_(1.0)
        text.up.fill_(1e-3)
    SparseCallbacks([[unet], [text]], config, steps=2).after_step(1, lambda _gate: 1e-3)
    assert [int((update.gate != 0).sum()) for update in (unet, text)] == [2, 2]
