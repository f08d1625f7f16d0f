"""Every method in the one loop: it begins as nothing, learns, and is saved as what it computed."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from PIL import Image
from test_training import settings
from torch import Tensor, nn

from lora_diffusion import methods
from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapter_config import NONSENSE, AdapterConfig
from lora_diffusion.anatomy import ANATOMIES, changeable_paths, trainable_paths
from lora_diffusion.blend import Blend, WeightedAdapter
from lora_diffusion.cli import main
from lora_diffusion.config import GenerateConfig, validate
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.files import sample_data
from lora_diffusion.formats.native import save_adapter
from lora_diffusion.formats.reading import load_adapter
from lora_diffusion.layers import DoRALayer, FullLayer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.method_sizes import method_size
from lora_diffusion.models import Base, load_base, module_at
from lora_diffusion.patching import blended, patching
from lora_diffusion.run_report.allocation import allocation, allocation_picture
from lora_diffusion.run_report.runs import train_and_report
from lora_diffusion.sampling import generate
from lora_diffusion.targets import resolve_full, resolve_targets
from lora_diffusion.train_config import TrainConfig
from lora_diffusion.train_defaults import default_settings
from lora_diffusion.training.loop import train
from lora_diffusion.training.run_log import LOG, read_log
from lora_diffusion.training.run_setup import set_up
from lora_diffusion.training.state import states
from lora_diffusion.training.updates.adaptive import AdaptiveRules, AdaptiveUpdate
from lora_diffusion.training.updates.continued import check_continuable
from lora_diffusion.training.updates.dense import DecomposedUpdate, HadamardUpdate, KroneckerUpdate
from lora_diffusion.training.updates.injection import disabled, extract, inject, inject_adapter, update_at
from lora_diffusion.training.updates.low_rank import LowRankUpdate
from lora_diffusion.training.updates.nested import NestedRules, NestedUpdate
from lora_diffusion.training.updates.sparse import GatedUpdate, SparseRules
from lora_diffusion.training.updates.update import Size, attach
from lora_diffusion.training.validation import validated
from lora_diffusion.weights import Moment, block_factors, block_name

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"scaling": "sqrt-rank", "alpha": 2.0},
    "lora-fa": {"freeze_down": True},
    "orthogonal": {"start": "orthogonal"},
    "pissa": {"start": "pissa"},
    "dora": {"dora": True},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
    "dora on lokr": {"kind": "lokr", "dora": True},
    "vera": {"kind": "vera", "rank": 16},
    "adalora": {"kind": "adalora"},
    "dylora": {"kind": "dylora"},
    "sparse": {"kind": "sparse", "sparse_l1": 0.1},
    "dropouts": {"dropout": 0.1, "rank_dropout": 0.3, "module_dropout": 0.2},
    "by block": {"ranks": {"unet.down_blocks": 1, "unet.mid_block.*": 6}},
    "t-lora": {"kind": "t-lora", "start": "orthogonal"},
    "mixed": {"full_targets": ("unet.conv_in", "unet.*.norm1")},
}
MOMENT = Moment(step=6, steps=10)
"""Of the timestep that `predicted` asks about, of a thousand."""
CONVOLUTIONS = {"unet_targets": ("attention", "convolutions")}
KINDS = {"lora": LoRALayer, "loha": LoHaLayer, "lokr": LoKrLayer, "dora": DoRALayer, "dora on lokr": DoRALayer}


def config_of(method: str, **more: object) -> AdapterConfig:
    wide = {} if method == "pissa" else CONVOLUTIONS
    return AdapterConfig.model_validate({"rank": 4, **wide, **METHODS[method], **more})


def predicted(base: Base) -> Tensor:
    """What the UNet says to fixed noise."""
    generator = torch.Generator().manual_seed(5)
    unet: Any = base.pipe.unet
    size = unet.config.sample_size
    latents = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    hidden = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([400, 400]), encoder_hidden_states=hidden).sample


def injected(base: Base, config: AdapterConfig, seed: int = 0) -> tuple[list[str], Any]:
    """Paths of attention and convolutions with updates on them, and what came of it."""
    paths = resolve_targets(trainable_paths(base.anatomy), unet=config.unet_targets, text_encoders=())
    full = resolve_full(changeable_paths(base.anatomy), config.full_targets, paths)
    return [*paths, *full], inject(base, paths, config, seed, full=full, steps=20)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_update_changes_nothing(method: str, sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    before = predicted(base)
    paths, _ = injected(base, config_of(method))
    for name in base.family.components:
        getattr(base.pipe, name).eval()
    if method == "pissa":  # what is added and what is taken away are the same but for rounding
        assert torch.allclose(predicted(base), before, atol=1e-4)
    else:
        assert torch.equal(predicted(base), before)
    adapter = extract(base, paths, AdapterMetadata(family=base.family.name), torch.float32)
    for path, layer in adapter.layers.items():
        weight = module_at(base, path).weight.detach()
        assert float(layer.delta(weight).norm()) <= 1e-4 * float(weight.norm())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_computed(method: str, sd_folder: Path) -> None:
    """A blend of the saved adapter predicts what the trained modules predicted."""
    base, fresh = load_base(str(sd_folder)), load_base(str(sd_folder))
    paths, made = injected(base, config_of(method))
    shake(made.parameters)
    base.pipe.unet.eval()
    trained = predicted(base)
    with disabled(base):
        alone = predicted(base)
    timed = {"least_rank": 1} if method == "t-lora" else {}
    adapter = extract(base, paths, AdapterMetadata(family=base.family.name, **timed), torch.float32)
    with blended(fresh, Blend(entries=(WeightedAdapter(adapter=adapter),)), MOMENT):
        again = predicted(fresh)
    moved = float((trained - alone).norm())
    assert moved > 1e-3 * float(alone.norm())
    assert float((trained - again).norm()) < 1e-3 * moved
    assert torch.equal(predicted(fresh), alone)


def shake(parameters: dict[str, nn.Parameter]) -> None:
    """Some values in everything that learns."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of a style with their captions."""
    folder = tmp_path_factory.mktemp("ink")
    for file in sorted((sample_data() / "styles" / "ink").glob("0[0-3].*")):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_on_the_embedded_base(method: str, ink: Path, tmp_path: Path, tiny: Base) -> None:
    """The loss at fixed noise falls, pictures move, and the file holds the kind that was asked for."""
    rate = {"vera": 2e-1, "adalora": 2e-2, "mixed": 1e-3, "loha": 2e-2}.get(method, 5e-3)
    table = {
        "data": {"folder": ink},
        "output": tmp_path / "it.safetensors",
        "steps": 24,
        "batch_size": 2,
        "adapter": {"rank": 4, **METHODS[method]},
        "optimiser": {"learning_rate": rate, "warmup_steps": 1, "schedule": "constant"},
        "validation": {"folder": ink, "every": 24, "draws": 4},
        "tracking": {"trackers": []},
    }
    config = validate(TrainConfig, table, source="test")
    run = set_up(config)
    assert run.held_out
    before = validated(run.base, run.denoiser, run.captions, run.held_out, config).loss
    result = train(config)
    after = read_log(run.folder / LOG)[-1]["validation"]["loss"]
    assert after < 0.97 * before
    adapter = load_adapter(result.path)
    assert adapter.hash == result.adapter.hash
    found = [layer for path, layer in adapter.layers.items() if ".attn" in path]
    assert all(isinstance(layer, KINDS.get(method, LoRALayer)) for layer in found)
    prompt = GenerateConfig(prompt="a white house in the snow, in sks style", steps=4)
    own, moved = (
        np.asarray(generate(tiny, [prompt], blend)[0].image, dtype=float)
        for blend in (Blend(), Blend(entries=(WeightedAdapter(adapter=adapter),)))
    )
    assert np.abs(own - moved).mean() > 1


@pytest.mark.parametrize("name", [each.name for each in methods.METHODS])
def test_the_arithmetic_of_sizes_is_what_is_injected(name: str, tmp_path: Path) -> None:
    size = method_size(methods.method(name), "tiny-sd")
    table = methods.with_method(default_settings("style", "tiny-sd"), methods.method(name))
    table |= {"output": tmp_path / "it.safetensors"}
    shutil.copytree(sample_data() / "styles" / "ink", tmp_path / "ink")
    table["data"] = tmp_path / "ink"
    run = set_up(validate(TrainConfig, table, source="test"))
    assert size.trained == sum(parameter.numel() for parameter in run.parameters.values())
    assert size.modules == len(run.paths)
    if name not in ("adalora", "sparse"):  # whose files depend on what is taken away
        saved = extract(run.base, run.paths, AdapterMetadata(), torch.float16)
        words = sum(vectors.numel() for vectors in run.words.parameters.values()) if run.words else 0
        assert size.saved == saved.num_parameters + words


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--rank", "4", "dora", "vera"]) == 0
    said = capsys.readouterr().out
    assert "--set 'adapter.dora=true'" in said
    assert "arXiv:2310.11454" in said
    assert main(["methods", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == [each.name for each in methods.METHODS]
    assert main(["methods", "drola"]) == 2
    assert "no method called 'drola'" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_file_is_converted_merged_and_inspected_like_any_other(
    method: str, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of(method))
    shake(made.parameters)
    metadata = AdapterMetadata(name="it", family=base.family.name)
    adapter = extract(base, paths, metadata, torch.float32)
    own, theirs = tmp_path / "it.safetensors", tmp_path / "kohya.safetensors"
    save_adapter(adapter, own)  # of T-LoRA the factors; what sets it apart has tests of its own
    assert main(["convert", str(own), str(theirs), "--to", "kohya"]) == 0
    again = load_adapter(theirs)
    assert again.paths == adapter.paths
    for path, layer in adapter.layers.items():
        weight = module_at(base, path).weight.detach()
        before = layer.delta(weight)
        assert torch.allclose(before, again.layers[path].delta(weight).reshape(before.shape), atol=1e-5), path
    assert main(["verify", str(own), "--base", str(sd_folder)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == ", ".join(adapter.kinds)
    assert (
        main(["merge", "--base", str(sd_folder), "--adapter", f"{own}:0.5", "--output", str(tmp_path / "merged")]) == 0
    )
    merged = load_base(str(tmp_path / "merged"))
    with blended(load_base(str(sd_folder)), Blend(entries=(WeightedAdapter(adapter=adapter, weight=0.5),))) as patch:
        for path in paths:
            assert torch.allclose(module_at(merged, path).weight, module_at(patch.base, path).weight, atol=1e-6), path


def test_exactly_the_chosen_modules_train(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    config = config_of("mixed", unet_targets=("attention",))
    paths, made = injected(base, config)
    learning = {name for name, parameter in base.pipe.unet.named_parameters() if parameter.requires_grad}
    assert {f"unet.{name}".replace(".update.", ".") for name in learning} == set(made.parameters)
    assert all(".attn" in path or ".norm1" in path or path == "unet.conv_in" for path in paths)
    adapter = extract(base, paths, AdapterMetadata(), torch.float32)
    assert isinstance(adapter.layers["unet.conv_in"], FullLayer)
    assert "unet.conv_in" in adapter.biases


def test_ranks_and_alphas_by_pattern(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, _ = injected(base, config_of("by block", alpha=2.0, alphas={"*.to_q": 8.0}))
    for path in paths:
        layer = update_at(base, path).layer()
        rank = 1 if path.startswith("unet.down_blocks") else 6 if path.startswith("unet.mid_block") else 4
        assert layer.rank == rank
        assert layer.scale == pytest.approx((8.0 if path.endswith(".to_q") else 2.0) / rank)
    with pytest.raises(ConfigError, match=r"adapter.ranks: '\*.nowhere' matches no trained module"):
        injected(load_base(str(sd_folder)), config_of("lora", ranks={"*.nowhere": 2}))


def test_the_scale_of_rslora_is_kept_in_the_file(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, _ = injected(base, config_of("rslora", rank=9))
    assert update_at(base, paths[0]).layer().scale == pytest.approx(2 / 3)


def test_lora_fa_keeps_no_input(sd_folder: Path) -> None:
    kept: list[int] = []
    for method in ("lora", "lora-fa"):
        base = load_base(str(sd_folder))
        _, made = injected(base, config_of(method))
        total = 0

        def pack(values: Tensor) -> Tensor:
            nonlocal total
            total += 0 if isinstance(values, nn.Parameter) else values.numel()
            return values

        unet: Any = base.pipe.unet
        latents = torch.randn(1, unet.config.in_channels, 8, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            unet(latents, 5, encoder_hidden_states=torch.randn(1, 77, unet.config.cross_attention_dim))
        kept.append(total)
        assert all(name.endswith(".down") is False for name in made.parameters) is (method == "lora-fa")
    assert kept[1] < 0.9 * kept[0]


def module_of(kind: str) -> Any:
    torch.manual_seed(0)
    made = nn.Linear(12, 8) if kind == "linear" else nn.Conv2d(12, 8, 3, padding=1)
    return made.requires_grad_(False)


def theirs_of(module: Any, config: Any) -> Any:
    """The same module with PEFT's adapter."""
    holder = nn.Sequential(type(module)(12, 8) if isinstance(module, nn.Linear) else nn.Conv2d(12, 8, 3, padding=1))
    holder[0].load_state_dict({name: value for name, value in module.state_dict().items() if "update" not in name})
    inject_adapter_in_model(config, holder)
    return holder[0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dora_is_pefts(kind: str) -> None:
    ours = module_of(kind)
    inner = LowRankUpdate(ours, Size(rank=2, scale=1.5, config=AdapterConfig()), torch.Generator().manual_seed(0))
    update = DecomposedUpdate(ours, inner)
    theirs = theirs_of(ours, LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"]))
    attach(ours, update)
    with torch.no_grad():
        inner.up.normal_()
        update.magnitude.add_(0.1)
        theirs.lora_A["default"].weight.copy_(inner.down)
        theirs.lora_B["default"].weight.copy_(inner.up)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.copy_(update.magnitude.reshape(magnitude.shape))
    x = torch.randn(2, 12) if kind == "linear" else torch.randn(2, 12, 6, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    weights = torch.randn(ours(x).shape)
    own = torch.autograd.grad((ours(x) * weights).sum(), (inner.down, inner.up, update.magnitude))
    factors = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, magnitude
    other = torch.autograd.grad((theirs(x) * weights).sum(), factors)
    for mine, peft in zip(own, other, strict=True):
        assert torch.allclose(mine, peft.reshape(mine.shape), atol=1e-3)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_are_pefts(kind: str) -> None:
    ours = module_of("linear")
    size = Size(rank=2, scale=1.5, config=AdapterConfig(lokr_factor=4))
    if kind == "loha":
        update: Any = HadamardUpdate(ours, size, torch.Generator().manual_seed(0))
        theirs = theirs_of(ours, LoHaConfig(r=2, alpha=3, target_modules=["0"], init_weights=False))
        names = {"w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b"}
    else:
        update = KroneckerUpdate(ours, Size(rank=1, scale=1.5, config=AdapterConfig(lokr_factor=4)), torch.Generator())
        theirs = theirs_of(
            ours, LoKrConfig(r=1, alpha=1.5, decompose_factor=4, target_modules=["0"], init_weights=False)
        )
        names = {"w1": "lokr_w1", "w2_a": "lokr_w2_a", "w2_b": "lokr_w2_b", "w2": "lokr_w2"}
    attach(ours, update)
    with torch.no_grad():
        for mine, peft in names.items():
            own, other = getattr(update, mine), getattr(theirs, peft, None)
            if own is not None and other is not None:
                own.normal_()
                other["default"].copy_(own)
    x = torch.randn(3, 12)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_the_first_directions_of_dylora_are_trained_alone(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("dylora"))
    assert isinstance(made.rules, NestedRules)
    update: NestedUpdate = update_at(base, paths[0])
    seen: set[int] = set()
    for step in range(60):
        made.rules.before_step(step)
        seen.add(update.used)
        assert {update_at(base, path).used for path in paths} == {update.used}
    assert seen == {1, 2, 3, 4}
    update.train()
    update.used = 2
    down, up = update.factors()
    assert down.shape[0] == up.shape[1] == 2
    (down.square().sum() + up.square().sum()).backward()
    moved = update.down.grad.flatten(1).abs().sum(dim=1) > 0
    assert moved.tolist() == [False, True, False, False]


CONTINUED = ("lora", "rslora", "dora", "loha", "lokr", "dora on lokr", "pissa", "by block", "mixed", "sparse")


@pytest.mark.parametrize("method", CONTINUED)
def test_training_goes_on_as_an_adapter_of_any_kind(method: str, sd_folder: Path) -> None:
    """Before a step it is the adapter itself, to the bit."""
    base, fresh = load_base(str(sd_folder)), load_base(str(sd_folder))
    paths, made = injected(base, config_of(method))
    shake(made.parameters)
    adapter = extract(base, paths, AdapterMetadata(family=base.family.name), torch.float32)
    begun = inject_adapter(fresh, adapter, AdapterConfig())
    again = extract(fresh, paths, AdapterMetadata(), torch.float32)
    assert again.paths == adapter.paths
    for path, layer in adapter.layers.items():
        weight = module_at(base, path).weight.detach()
        assert torch.allclose(again.layers[path].delta(weight), layer.delta(weight), atol=1e-6), path
        assert type(again.layers[path]) is type(layer)
    assert all(parameter.requires_grad for parameter in begun.parameters.values())
    fresh.pipe.unet.eval()
    base.pipe.unet.eval()
    assert torch.allclose(predicted(fresh), predicted(base), atol=1e-4)


def test_a_run_goes_on_from_a_file_and_on_top_of_others(ink: Path, tmp_path: Path) -> None:
    ready = sample_data() / "adapters" / "gloop.safetensors"
    table: dict[str, Any] = {
        "data": {"folder": ink},
        "output": tmp_path / "it.safetensors",
        "steps": 2,
        "adapter": {"begin_with": str(sample_data() / "adapters" / "ink.safetensors"), "text_encoder_targets": []},
        "optimiser": {"learning_rate": 1e-5, "warmup_steps": 0},
        "tracking": {"trackers": []},
    }
    with pytest.raises(ConfigError, match="changes text encoders"):
        train(validate(TrainConfig, table, source="test"))
    table["adapter"] |= {"text_encoder_targets": ["attention"]}
    plain = train(validate(TrainConfig, table, source="test")).adapter
    ink_adapter = load_adapter(sample_data() / "adapters" / "ink.safetensors")
    assert plain.paths == ink_adapter.paths
    for path, layer in plain.layers.items():
        before = ink_adapter.layers[path].delta()
        assert float((layer.delta() - before).norm()) < 0.05 * float(before.norm())
    assert plain.hash != ink_adapter.hash
    on_top = {**table, "output": tmp_path / "top.safetensors", "on_top_of": {str(ready): 0.8}}
    over = train(validate(TrainConfig, on_top, source="test")).adapter
    assert over.metadata.base_hash != plain.metadata.base_hash
    assert over.metadata.training["on_top_of"] == {"gloop.safetensors": 0.8}
    with pytest.raises(ConfigError, match=r"begin_with goes on as the file is"):
        validate(TrainConfig, {**table, "adapter": {**table["adapter"], "dora": True}}, source="test")
    with pytest.raises(AdapterFormatError, match="nowhere"):
        train(validate(TrainConfig, {**on_top, "on_top_of": {str(tmp_path / "nowhere.safetensors"): 1}}, source="test"))


def test_words_would_be_lost_and_are_not_gone_on_with() -> None:
    words = Adapter(layers={}, tokens={"sks": {"text_encoder": torch.ones(1, 4)}})
    with pytest.raises(ConfigError, match="learned words"):
        check_continuable(words, "a.safetensors")
    with pytest.raises(ConfigError, match="no layers"):
        check_continuable(Adapter(layers={}), "a.safetensors")


@pytest.mark.parametrize(("part", "block"), [("content", "OUT00"), ("style", "OUT01")])
def test_b_loras_places_have_the_blend_preset_of_their_name(part: str, block: str) -> None:
    anatomy = ANATOMIES["sdxl"]
    paths = resolve_targets(trainable_paths(anatomy), unet=[f"b-lora-{part}"], text_encoders=())
    assert len(paths) == 10 * 8  # ten transformers, two attentions of four projections each
    assert {block_name(path, anatomy) for path in paths} == {block}
    factors = block_factors(f"BLORA-{part.upper()}", anatomy)
    assert [name for name, factor in factors.items() if factor] == [block]
    with pytest.raises(ConfigError, match="names no module"):
        resolve_targets(trainable_paths(ANATOMIES["sd1"]), unet=[f"b-lora-{part}"], text_encoders=())
    with pytest.raises(ConfigError, match="unknown block preset"):
        block_factors(f"BLORA-{part.upper()}", ANATOMIES["sd1"])


def test_a_dylora_file_is_cut_to_any_rank_that_was_trained(ink: Path, tmp_path: Path) -> None:
    """The loss that a run reports for a rank is that of the file cut to it."""
    table = {
        "data": {"folder": ink},
        "output": tmp_path / "it.safetensors",
        "steps": 24,
        "batch_size": 2,
        "save_precision": "float32",
        "adapter": {"kind": "dylora", "rank": 4},
        "optimiser": {"learning_rate": 1e-2, "warmup_steps": 1, "schedule": "constant"},
        "validation": {"folder": ink, "every": 24, "draws": 4},
        "tracking": {"trackers": []},
    }
    config = validate(TrainConfig, table, source="test")
    result = train(config)
    by_rank = read_log(tmp_path / "it-run" / LOG)[-1]["loss_by_rank"]
    assert list(by_rank) == ["1", "2", "4"]
    cut = tmp_path / "two.safetensors"
    assert main(["resize", str(result.path), str(cut), "--first", "2"]) == 0
    adapter = load_adapter(cut)
    assert {layer.rank for layer in adapter.layers.values() if isinstance(layer, LoRALayer)} == {2}
    run = set_up(config)
    assert run.held_out
    with disabled(run.base), blended(run.base, Blend(entries=(WeightedAdapter(adapter=adapter),))):
        loss = validated(run.base, run.denoiser, run.captions, run.held_out, config).loss
    assert loss == pytest.approx(by_rank["2"], rel=1e-4)
    assert main(["resize", str(result.path), str(tmp_path / "x.safetensors"), "--first", "2", "--rank", "2"]) == 2


def test_a_t_lora_acts_as_trained_at_every_step_and_no_weights_hold_it(sd_folder: Path, tmp_path: Path) -> None:
    base, fresh = load_base(str(sd_folder)), load_base(str(sd_folder))
    paths, made = injected(base, config_of("t-lora", least_rank=2, rank=5))
    shake(made.parameters)
    base.pipe.unet.eval()
    metadata = AdapterMetadata(name="timed", family=base.family.name, least_rank=2)
    adapter = extract(base, paths, metadata, torch.float32)
    file = tmp_path / "timed.safetensors"
    save_adapter(adapter, file)
    adapter = load_adapter(file)
    assert adapter.metadata.least_rank == 2
    latents = torch.randn(1, base.pipe.unet.config.in_channels, 8, 8)
    hidden = torch.randn(1, 77, base.pipe.unet.config.cross_attention_dim)
    ranks: list[int] = []
    with patching(fresh) as patch, torch.no_grad():
        for step in range(10):
            patch.apply(Blend(entries=(WeightedAdapter(adapter=adapter),)), Moment(step=step, steps=10))
            ours = fresh.pipe.unet(latents, 1000 - 100 * step, encoder_hidden_states=hidden).sample
            theirs = base.pipe.unet(latents, 1000 - 100 * step, encoder_hidden_states=hidden).sample
            assert torch.allclose(ours, theirs, atol=1e-4)
            ranks.append(int(update_at(base, paths[0]).used.sum()))
    assert ranks[0] == 2
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 3
    for command in (
        ["merge", "--base", str(sd_folder), "--adapter", str(file), "--output", str(tmp_path / "m")],
        ["convert", str(file), str(tmp_path / "k.safetensors"), "--to", "kohya"],
        ["combine", f"{file}:0.5", str(tmp_path / "c.safetensors")],
    ):
        assert main(command) == 2
    assert main(["resize", str(file), str(tmp_path / "cut.safetensors"), "--first", "3"]) == 0
    cut = load_adapter(tmp_path / "cut.safetensors")
    assert cut.metadata.least_rank == 0
    assert {layer.rank for layer in cut.layers.values() if isinstance(layer, LoRALayer)} == {3}


def test_adalora_ends_within_its_budget_with_the_directions_that_matter(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("adalora", unet_targets=("attention",)))
    rules = made.rules
    assert isinstance(rules, AdaptiveRules)
    shake(made.parameters)
    loud: AdaptiveUpdate = update_at(base, paths[0])
    for step in range(20):
        for name, parameter in made.parameters.items():
            parameter.grad = torch.ones_like(parameter) * (10.0 if name.startswith(paths[0]) else 1.0)
        rules.after_gradients(step)
        rules.after_step(step, 1e-3)
    left = [int((update_at(base, path).strength != 0).sum()) for path in paths]
    assert sum(left) <= rules.last
    assert left[0] == loud.strength.numel() > 4
    saved = extract(base, paths, AdapterMetadata(), torch.float32)
    ranks = {layer.rank for layer in saved.layers.values() if isinstance(layer, LoRALayer)}
    assert len(ranks) > 1


def test_the_allocation_is_drawn_in_the_report(ink: Path, tmp_path: Path) -> None:
    table = {
        "data": {"folder": ink},
        "output": tmp_path / "it.safetensors",
        "steps": 20,
        "batch_size": 1,
        "adapter": {"kind": "adalora", "rank": 2},
        "optimiser": {"learning_rate": 5e-3, "warmup_steps": 1},
        "tracking": {"trackers": []},
    }
    result = train_and_report(validate(TrainConfig, table, source="test"))
    ranks = allocation(result.adapter)
    assert sum(sum(each) for each in ranks.values()) == sum(
        layer.rank for layer in result.adapter.layers.values() if isinstance(layer, LoRALayer)
    )
    assert "Ranks by block" in (tmp_path / "it-run" / "report.html").read_text()
    with Image.open(io.BytesIO(allocation_picture(ranks))) as picture:
        assert picture.width > 800
    assert result.adapter.metadata.training["method"]["directions_left"] <= 2 * len(result.adapter.layers)


def test_sparse_takes_the_weakest_away_and_the_file_gets_smaller(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("sparse", unet_targets=("attention",), sparse_l1=0.0, sparse_keep=0.25))
    assert isinstance(made.rules, SparseRules)
    whole = extract(base, paths, AdapterMetadata(), torch.float32).num_parameters
    shake(made.parameters)
    strengths = torch.cat([update_at(base, path).strengths().detach() for path in paths])
    made.rules.after_step(0, 1e-3)
    assert made.rules.facts()["share_left"] == 1
    made.rules.after_step(19, 1e-3)
    assert made.rules.facts()["share_left"] == pytest.approx(0.25, abs=0.01)
    gates = torch.cat([update_at(base, path).gate for path in paths])
    assert float(strengths[gates != 0].min()) >= float(strengths[gates == 0].max())
    assert extract(base, paths, AdapterMetadata(), torch.float32).num_parameters < 0.5 * whole
    update = GatedUpdate(module_of("linear"), Size(rank=3, scale=1.0, config=AdapterConfig()), torch.Generator())
    pull = SparseRules([update], AdapterConfig(kind="sparse", sparse_l1=2.0, sparse_keep=1.0), steps=10)
    pull.after_step(0, 0.3)
    assert torch.allclose(update.gate, torch.full((3,), 0.4))
    pull.after_step(1, 0.3)
    assert torch.equal(update.gate, torch.zeros(3))


def test_vera_trains_two_vectors_and_shares_the_rest(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("vera"))
    expected = sum(16 + module_at(base, path).weight.shape[0] for path in paths)
    assert sum(parameter.numel() for parameter in made.parameters.values()) == expected
    first, second = (update_at(base, path) for path in paths[:2])
    width = min(first.shared_down[0].numel(), second.shared_down[0].numel())
    ours, theirs = (each.shared_down.flatten(1)[:, :width] for each in (first, second))
    assert torch.equal(ours, theirs)


def test_a_stopped_adalora_run_goes_on_as_if_it_had_not(pictures: Path, sd_folder: Path) -> None:
    changes = {
        "adapter": {"kind": "adalora", "alpha": None, "text_encoder_targets": []},
        "optimiser": {"text_encoder_learning_rate": None},
        "samples": {"every": 5},
    }
    config = settings(pictures, sd_folder, changes, state_every=1, steps=12)
    whole = train(config).adapter

    def stop(_run: Any, step: int) -> None:
        if step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    assert states(config.output.with_name("style-run"))
    assert train(config).adapter.hash == whole.hash


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"dora": True, "kind": "vera"}, ("dora", "'vera'")),
        ({"freeze_down": True, "kind": "loha"}, ("freeze_down", "'loha'")),
        ({"start": "pissa", "kind": "dylora"}, ("'pissa'", "'dylora'")),
        ({"start": "pissa", "freeze_down": True}, ("'pissa'", "freeze_down")),
        ({"start": "pissa", "dora": True}, ("'pissa'", "dora")),
        ({"scaling": "sqrt-rank"}, ("'sqrt-rank'", "alpha")),
        ({"scaling": "sqrt-rank", "alpha": 2, "kind": "vera"}, ("'sqrt-rank'", "'vera'")),
        ({"dropout": 0.1, "dora": True}, ("dropout", "dora")),
        ({"max_norm": 1.0, "kind": "lokr"}, ("max_norm", "'lokr'")),
        ({"kind": "t-lora", "text_encoder_targets": ["attention"]}, ("'t-lora'", "text_encoder_targets")),
        ({"kind": "t-lora", "rank": 2, "least_rank": 4}, ("least_rank", "rank")),
        ({"begin_with": "a.safetensors", "dora": True}, ("begin_with", "dora")),
        ({"ranks": {"*": 2}, "kind": "adalora"}, ("ranks", "'adalora'")),
    ],
)
def test_what_makes_no_sense_together_is_refused_by_name(table: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(AdapterConfig, table, source="adapter")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert len(NONSENSE) == 13


def test_a_spectral_start_on_convolutions_is_refused(pictures: Path, sd_folder: Path) -> None:
    changes = {"adapter": {"start": "pissa", "unet_targets": ["convolutions"], "text_encoder_targets": ["attention"]}}
    with pytest.raises(ConfigError, match=r"adapter.start 'pissa'.*convolution"):
        train(settings(pictures, sd_folder, changes))


def test_a_module_is_trained_one_way(pictures: Path, sd_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"full_targets and by the other targets"):
        train(settings(pictures, sd_folder, {"adapter": {"full_targets": ["unet.*.to_q"]}}))
    with pytest.raises(ConfigError, match=r"'unet.nowhere' names no module"):
        train(settings(pictures, sd_folder, {"adapter": {"full_targets": ["unet.nowhere"]}}))


def test_the_second_factor_learns_faster_by_lora_plus(pictures: Path, sd_folder: Path) -> None:
    plain, plus = (
        train(settings(pictures, sd_folder, {"optimiser": {"up_rate": rate}}, steps=1)).adapter for rate in (1.0, 8.0)
    )
    for path, layer in plain.layers.items():
        faster = plus.layers[path]
        assert isinstance(layer, LoRALayer)
        assert isinstance(faster, LoRALayer)
        assert torch.equal(layer.down, faster.down)
        assert float(faster.up.norm()) > 4 * float(layer.up.norm())
    for optimiser in ({"up_rate": 4, "kind": "prodigy"}, {"up_rate": 4, "rates": {"*.up": 2}}):
        with pytest.raises(ValueError, match="both own"):
            settings(pictures, sd_folder, {"optimiser": optimiser})
