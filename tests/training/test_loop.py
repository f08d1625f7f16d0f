"""The training loop on a random base: trained and frozen parameters, validation, early stopping, and errors raised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.adapters.adapter import AdapterMetadata, adapter_hash
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.architectures.targets import resolve_targets
from lora_diffusion.config.settings import deep_merge
from lora_diffusion.config.train import AdapterConfig, TrainConfig
from lora_diffusion.data.sampler import picture_order
from lora_diffusion.errors import ConfigError, DatasetError, OutputError, TrainingError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.in_place import blended_weights
from lora_diffusion.models.load import load_base, module_at
from lora_diffusion.training import loop
from lora_diffusion.training.checkpoint import list_states
from lora_diffusion.training.checks import check_finite, explained_memory_errors
from lora_diffusion.training.log import read_log
from lora_diffusion.training.methods.injection import adapter_disabled, extract_adapter, inject
from lora_diffusion.training.optim.ema import copy_values
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from lora_diffusion.training.validation import measure_drift
from tests.helpers.short_runs import UNET_ONLY, settings


def test_training_saves_an_adapter_with_metadata(pictures: Path, sd_folder: Path) -> None:
    result = train(settings(pictures, sd_folder, save_every=4))
    adapter = load_adapter(result.path)
    assert adapter_hash(adapter) == adapter_hash(result.adapter)
    assert adapter.metadata.family == "tiny-sd"
    assert adapter.metadata.trigger_words == ("sks",)
    assert adapter.metadata.training["steps_done"] == 6
    assert {layer.alpha for layer in adapter.layers.values()} == {3.0}
    assert all(float(layer.delta().norm()) > 0 for layer in adapter.layers.values())
    half = load_adapter(result.path.with_name("style-step00000004.safetensors"))
    assert half.metadata.training["steps_done"] == 4
    assert sorted(p.name for p in result.path.parent.iterdir()) == [
        "style-run",
        "style-step00000004.safetensors",
        "style.safetensors",
    ]
    assert [line["step"] for line in read_log(result.path.parent / "style-run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(pictures: Path, sd_folder: Path) -> None:
    hashes = [adapter_hash(train(settings(pictures, sd_folder, seed=seed)).adapter) for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_accumulated_batches_equal_one_large_batch(
    pictures: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain_descent(parameters: Mapping[str, torch.nn.Parameter], *_: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters.values(), lr=10.0)  # Adam would hide a wrong scale of the gradient

    monkeypatch.setattr(loop, "new_optimizer", plain_descent)
    common = {"optimizer": {"max_gradient_norm": 1e9}}
    top = {"save_precision": "float32", "steps": 2}
    whole = train(settings(pictures, sd_folder, common, batch_size=4, **top)).adapter
    parts = train(settings(pictures, sd_folder, common, batch_size=1, gradient_accumulation=4, **top)).adapter
    for path, layer in whole.layers.items():
        other = parts.layers[path]
        assert torch.allclose(layer.up, other.up, rtol=1e-3, atol=1e-4 * float(layer.up.abs().max())), path
    assert max(float(layer.up.abs().max()) for layer in whole.layers.values()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_parameters_are_float32_and_exactly_the_injected_ones(dtype: torch.dtype, sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=dtype)
    paths = resolve_targets(base.paths, unet=("attention",), text_encoders=("attention",))
    parameters = inject(base, paths, AdapterConfig(rank=2), seed=0).parameters
    trainable = [p for c in base.family.components for p in getattr(base.pipe, c).parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters.values()}
    assert len(trainable) == 2 * len(paths)
    assert all(p.dtype == torch.float32 for p in trainable)


def test_bf16_trains(pictures: Path, sd_folder: Path) -> None:
    result = train(settings(pictures, sd_folder, {"compute": {"mixed_precision": "bf16"}}, steps=2))
    assert all(float(layer.delta().norm()) > 0 for layer in result.adapter.layers.values())


def test_a_fresh_injection_is_exact_identity_and_can_be_extracted(sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    inputs = (torch.randn(2, 4, 16, 16), 7, torch.randn(2, 77, 32))
    with torch.no_grad():
        before = base.pipe.unet(*inputs).sample
        paths = resolve_targets(base.paths, unet=("attention", "convolutions"), text_encoders=())
        inject(base, paths, AdapterConfig(rank=2), seed=0)
        assert torch.equal(base.pipe.unet(*inputs).sample, before)
    adapter = extract_adapter(base, paths, metadata=AdapterMetadata(), dtype=torch.float32)
    module: Any = module_at(base, paths[0])
    assert tuple(adapter.layers) == tuple(sorted(paths))
    assert torch.equal(adapter.layers[paths[0]].factors["down"], module.update.down)


def test_trainable_layers_predict_the_same_as_the_saved_adapter(pictures: Path, sd_folder: Path) -> None:
    """Trainable layers predict the same as the saved adapter merged into a fresh base; disabled, they do nothing."""
    result = train(
        settings(pictures, sd_folder, {"adapter": {"unet_target_modules": ["all"]}}, save_precision="float32")
    )
    live, fresh = (load_base(str(sd_folder), device=torch.device("cpu")) for _ in range(2))
    parameters = inject(live, tuple(result.adapter.layers), AdapterConfig(rank=2, alpha=3.0), seed=0).parameters
    inputs = (torch.randn(2, 4, 16, 16), 7, torch.randn(2, 77, 32))
    with torch.no_grad():
        factors = result.adapter.layers.items()
        copy_values(
            parameters, {f"{path}.{name}": value for path, layer in factors for name, value in layer.factors.items()}
        )
        plain = fresh.pipe.unet(*inputs).sample
        with blended_weights(fresh, Blend(entries=(WeightedAdapter(adapter=result.adapter),))):
            expected = fresh.pipe.unet(*inputs).sample
        found = live.pipe.unet(*inputs).sample
        assert (expected - plain).abs().max() > 1e-2
        assert (found - expected).abs().max() < 1e-4
        with adapter_disabled(live):
            assert torch.equal(live.pipe.unet(*inputs).sample, plain)


def test_sdxl_trains_both_text_encoders(pictures: Path, sdxl_folder: Path) -> None:
    result = train(settings(pictures, sdxl_folder, steps=2))
    assert result.adapter.components == ("unet", "text_encoder_2", "text_encoder")
    assert all(float(layer.delta().norm()) > 0 for layer in result.adapter.layers.values())


def test_each_epoch_shows_every_picture_once() -> None:
    order = picture_order(5, 17, seed=2)
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
    assert order != picture_order(5, 17, seed=3)


def test_a_nan_loss_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="the loss at step 7 is nan"):
        check_finite(torch.tensor(float("nan")), 7)


def test_out_of_memory_errors_name_helpful_settings() -> None:
    with (
        pytest.raises(
            TrainingError, match=r"not enough memory for a training step; set compute\.gradient_checkpointing"
        ),
        explained_memory_errors(),
    ):
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_memory_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)


def refusal(config: TrainConfig, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        train(config)
    assert not list(config.output.parent.glob("*")), "files were left behind"
    return str(caught.value)


def test_bad_data_folders_are_named(pictures: Path, sd_folder: Path) -> None:
    empty = pictures.parent / "empty"
    empty.mkdir()
    for folder, words in ((pictures / "no", "no such folder"), (empty, "no images found")):
        message = refusal(settings(folder, sd_folder, output=pictures.parent / "o" / "x.safetensors"), DatasetError)
        assert str(folder) in message
        assert words in message


def test_an_unreadable_picture_is_named(pictures: Path, sd_folder: Path) -> None:
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    assert "1.png: cannot be read as an image" in refusal(settings(pictures, sd_folder), DatasetError)


def test_long_captions_are_not_truncated(pictures: Path, sd_folder: Path) -> None:
    """The last word of a long caption affects the result, also in a batch with short captions."""
    learned: list[str] = []
    for last in ("cat", "dog"):
        (pictures / "2.txt").write_text("very " * 80 + last)
        config = settings(pictures, sd_folder, steps=2, batch_size=3, output=pictures / f"{last}.safetensors")
        learned.append(train(config).adapter.hash)
    assert learned[0] != learned[1]


@pytest.mark.parametrize("encoders", [(), ("attention",)], ids=["cached", "trained"])
def test_emphasis_in_captions_is_used_if_enabled(pictures: Path, sd_folder: Path, encoders: tuple[str, ...]) -> None:
    def hash_of(caption: str, *, weights: bool) -> str:
        for picture in pictures.glob("*.png"):
            picture.with_suffix(".txt").write_text(caption)
        output = pictures / "w.safetensors"
        adapter = {"rank": 2, "text_encoder_target_modules": encoders}
        captions = {"weights": weights, "dropout": 0}
        sections = {"adapter": adapter, "captions": captions, "optimizer": {"learning_rate": 1e-2}}
        return train(settings(pictures, sd_folder, steps=1, output=output, **sections)).adapter.hash

    assert hash_of("(a cat:1.0)", weights=True) == hash_of("a cat", weights=False)
    assert hash_of("(a cat:1.4)", weights=True) != hash_of("a cat", weights=False)
    assert hash_of("(a cat:1.4)", weights=False) != hash_of("(a cat:1.4)", weights=True)


def test_captions_that_cannot_be_parsed_are_named(pictures: Path, sd_folder: Path) -> None:
    (pictures / "1.txt").write_text("(one, two:1.2)")
    assert "1.png" in refusal(settings(pictures, sd_folder, captions={"weights": True, "shuffle": True}), DatasetError)
    train(settings(pictures, sd_folder, captions={"weights": True}, output=pictures / "read.safetensors"))
    (pictures / "1.txt").write_text("(one")
    assert "opens a '('" in refusal(settings(pictures, sd_folder, captions={"weights": True}), DatasetError)


def test_output_that_cannot_be_written_is_found_before_training(pictures: Path, sd_folder: Path) -> None:
    blocked = pictures / "0.png" / "x.safetensors"
    with pytest.raises(OutputError, match="cannot be written"):
        train(settings(pictures, sd_folder, output=blocked))
    with pytest.raises(ConfigError, match=r"does not end in \.safetensors"):
        train(settings(pictures, sd_folder, output=pictures / "x.bin"))


def test_fp16_on_the_cpu_is_refused(pictures: Path, sd_folder: Path) -> None:
    if torch.cuda.is_available():
        return
    assert "needs a GPU" in refusal(
        settings(pictures, sd_folder, {"compute": {"mixed_precision": "fp16"}}), ConfigError
    )


def test_early_stopping_uses_held_out_images(pictures: Path, sd_folder: Path) -> None:
    """With a far too high learning rate the loss rises, so the first validation is the best and patience runs out."""
    changes = {"validation": {"share": 0.25, "every": 2, "patience": 2, "draws": 4, "base_prompts": ["a blue house"]}}
    calm = train(settings(pictures, sd_folder, changes, steps=8))
    log = [line for line in read_log(calm.path.parent / "style-run" / "log.jsonl") if "validation" in line]
    assert [line["step"] for line in log] == [2, 4, 6, 8]
    assert all(line["validation"]["drift"] > 0 for line in log)
    assert calm.best is not None
    assert calm.best.loss == min(line["validation"]["loss"] for line in log)
    wild = train(settings(pictures, sd_folder, deep_merge(changes, {"optimizer": {"learning_rate": 3.0}}), steps=40))
    assert wild.best is not None
    assert wild.steps == wild.best.step + 4 < 40
    assert not list_states(wild.path.parent / "style-run")


def test_validation_is_the_same_each_time_and_changes_nothing(pictures: Path, sd_folder: Path) -> None:
    plain = train(settings(pictures, sd_folder, {"validation": {"share": 0.25, "every": 100, "keep_best": False}}))
    watched = train(settings(pictures, sd_folder, {"validation": {"share": 0.25, "every": 1, "keep_best": False}}))
    assert adapter_hash(plain.adapter) == adapter_hash(watched.adapter)
    assert plain.best is not None
    log = [line for line in read_log(watched.path.parent / "style-run" / "log.jsonl") if "validation" in line]
    assert log[-1]["validation"]["loss"] == plain.best.loss


def test_prior_preservation_by_prediction_reduces_the_drift(pictures: Path, sd_folder: Path) -> None:
    drift = {}
    for weight in (0.0, 30.0):
        prior = {"mode": "prediction", "weight": weight, "prompt": "a dog"}
        changes = {"prior": prior, "validation": {"share": 0.25, "base_prompts": ["a dog"], "keep_best": False}}
        result = train(settings(pictures, sd_folder, changes, steps=12))
        drift[weight] = read_log(result.path.parent / "style-run" / "log.jsonl")[-1]["validation"]["drift"]
    assert drift[30.0] < 0.7 * drift[0.0]


def test_a_changed_text_encoder_counts_in_prior_loss_and_drift(pictures: Path, sd_folder: Path) -> None:
    """Only the text encoder is changed, so only the conditioning changes the prediction for another prompt."""
    prior = {"mode": "prediction", "prompt": "a dog"}
    run = set_up(settings(pictures, sd_folder, {"prior": prior}))
    latent, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids, timestep = torch.zeros(2, 6), torch.tensor([100, 600])
    prior_loss = run.denoiser.auxiliary_loss
    assert prior_loss
    batch = {"latent": latent, "noise": noise, "timestep": timestep, "time_ids": ids, "captions": ["", ""]}
    assert float(prior_loss.compute_losses(run.denoiser, latent, noise, timestep, ids).detach().abs().max()) < 1e-9
    text = {name: p for name, p in run.parameters.items() if name.startswith("text_encoder.")}
    with torch.no_grad():
        for parameter in text.values():
            parameter.add_(0.3)
        assert float(measure_drift(run.denoiser, run.captions, batch, "a dog")) > 1e-6
    loss = prior_loss.compute_losses(run.denoiser, latent, noise, timestep, ids).mean()
    assert float(loss.detach()) > 1e-6
    assert any(float(grad.abs().max()) > 0 for grad in torch.autograd.grad(loss, [*text.values()]))


def test_frozen_text_encoders_are_not_part_of_the_denoiser(pictures: Path, sd_folder: Path) -> None:
    """They may be offloaded, and preparing the denoiser must not move them back to the device."""
    assert len(set_up(settings(pictures, sd_folder)).denoiser.text_encoders) == 1
    assert len(set_up(settings(pictures, sd_folder, UNET_ONLY)).denoiser.text_encoders) == 0


def test_missing_class_images_are_generated_and_trained_on(pictures: Path, sd_folder: Path) -> None:
    prior = {"mode": "pictures", "prompt": "a dog", "count": 3, "num_inference_steps": 1, "guidance_scale": 1.0}
    hashes = {adapter_hash(train(settings(pictures, sd_folder)).adapter)}
    hashes.add(adapter_hash(train(settings(pictures, sd_folder, {"prior": prior})).adapter))
    made = sorted((pictures.parent / "out" / "style-run" / "class").iterdir())
    assert [path.name for path in made] == [f"class-{i:05d}.png" for i in range(3)]
    made[1].unlink()
    before = made[0].stat().st_mtime_ns
    again = train(settings(pictures, sd_folder, {"prior": prior}))
    assert made[0].stat().st_mtime_ns == before
    assert adapter_hash(again.adapter) in hashes, "the regenerated class image is the same"
    hashes.add(adapter_hash(train(settings(pictures, sd_folder, {"prior": {**prior, "weight": 5.0}})).adapter))
    assert len(hashes) == 3


def test_the_moving_average_is_saved(pictures: Path, sd_folder: Path) -> None:
    last, mean = (
        train(settings(pictures, sd_folder, {"optimizer": {"ema_decay": decay}}, save_precision="float32"))
        for decay in (0.0, 0.9)
    )
    assert last.last_loss == mean.last_loss, "the average does not affect training"
    assert adapter_hash(last.adapter) != adapter_hash(mean.adapter)


def test_max_norm_limits_the_norm_of_every_delta(pictures: Path, sd_folder: Path) -> None:
    free = train(settings(pictures, sd_folder, save_precision="float32")).adapter
    bound = sorted(float(layer.delta().norm()) for layer in free.layers.values())[len(free.layers) // 2]
    held = train(
        settings(pictures, sd_folder, {"adapter": {"max_delta_norm": bound}}, save_precision="float32")
    ).adapter
    assert max(float(layer.delta().norm()) for layer in held.layers.values()) <= bound * (1 + 1e-5)


def test_all_mistakes_in_the_settings_are_reported_at_once(pictures: Path) -> None:
    from lora_diffusion.config.settings import read_toml

    path = pictures.parent / "run.toml"
    path.write_text(
        'output = "x.safetensors"\nlearning_rat = 1\nsteps = 0\n[data]\nfolder = "p"\ncrop = "left"\n'
        "[adapter]\nrnk = 4\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_toml(path, TrainConfig)
    message = str(caught.value)
    assert "'learning_rat'; did you mean 'optimizer.learning_rate'?" in message
    assert "'adapter.rnk'; did you mean 'adapter.rank'?" in message
    assert "'steps' is 0" in message
    assert "'data.crop' is 'left'" in message


def test_paths_are_relative_to_the_settings_file_and_changes_reach_sections(pictures: Path) -> None:
    from lora_diffusion.cli.flags import parse_changes
    from lora_diffusion.config.settings import read_toml

    path = pictures.parent / "run.toml"
    path.write_text('data = "pictures"\noutput = "x.safetensors"\n[optimizer]\nwarmup_steps = 3\n')
    config = read_toml(path, TrainConfig, parse_changes(("data.flip=true", "optimizer.learning_rate=1e-3")))
    assert (config.data.folder, config.data.flip) == (pictures, True)
    assert (config.optimizer.warmup_steps, config.optimizer.learning_rate) == (3, 1e-3)
    assert config.output == pictures.parent / "x.safetensors"


def test_flip_with_a_single_cached_view_is_refused(pictures: Path, sd_folder: Path) -> None:
    assert "only one is cached" in refusal(settings(pictures, sd_folder, {"data": {"flip": True}}), ConfigError)
