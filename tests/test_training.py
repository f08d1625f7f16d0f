"""The training loop on the random base: what it trains, what it leaves alone, and what it refuses."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_diffusion.adapter import AdapterMetadata, adapter_hash
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import ConfigError, DatasetError, OutputError, TrainingError
from lora_diffusion.formats.reading import load_adapter
from lora_diffusion.models import load_base, module_at
from lora_diffusion.targets import resolve_targets
from lora_diffusion.training import loop
from lora_diffusion.training.dataset import load_picture, read_dataset
from lora_diffusion.training.examples import picture_order, sample_seed
from lora_diffusion.training.injection import extract, inject
from lora_diffusion.training.loop import check_finite, rate_fraction, train


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (40, 48), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} wall, in sks style\n")
    return folder


def settings(pictures: Path, base: Path, **changes: object) -> TrainConfig:
    table = {
        "data": pictures,
        "output": pictures.parent / "out" / "style.safetensors",
        "base": str(base),
        "steps": 6,
        "batch_size": 2,
        "rank": 2,
        "alpha": 3.0,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "trigger_words": ("sks",),
        **changes,
    }
    return TrainConfig.model_validate(table)


def test_training_writes_an_adapter_with_its_record(pictures: Path, sd_folder: Path) -> None:
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
        "style-step00000004.safetensors",
        "style.safetensors",
    ]


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(pictures: Path, sd_folder: Path) -> None:
    hashes = [adapter_hash(train(settings(pictures, sd_folder, seed=seed)).adapter) for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_accumulated_batches_equal_one_large_batch(
    pictures: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain_descent(parameters: dict[str, list[torch.nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
        everything = [p for group in parameters.values() for p in group]
        return torch.optim.SGD(everything, lr=config.learning_rate)  # Adam would hide a wrong scale of the gradient

    monkeypatch.setattr(loop, "new_optimiser", plain_descent)
    common = {"save_precision": "float32", "steps": 2, "learning_rate": 10.0, "max_gradient_norm": 1e9}
    whole = train(settings(pictures, sd_folder, batch_size=4, **common)).adapter
    parts = train(settings(pictures, sd_folder, batch_size=1, gradient_accumulation=4, **common)).adapter
    for path, layer in whole.layers.items():
        other = parts.layers[path]
        assert torch.allclose(layer.up, other.up, rtol=1e-3, atol=1e-4 * float(layer.up.abs().max())), path
    assert max(float(layer.up.abs().max()) for layer in whole.layers.values()) > 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trainable_parameters_are_float32_and_exactly_the_injected_ones(
    precision: str, pictures: Path, sd_folder: Path
) -> None:
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=dtype)
    config = settings(pictures, sd_folder, mixed_precision=precision)
    paths = resolve_targets(base.paths, unet=("attention",), text_encoders=("attention",))
    parameters = inject(base, paths, config)
    trainable = [p for c in base.family.components for p in getattr(base.pipe, c).parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for group in parameters.values() for p in group}
    assert len(trainable) == 2 * len(paths)
    assert all(p.dtype == torch.float32 for p in trainable)


def test_bf16_trains(pictures: Path, sd_folder: Path) -> None:
    result = train(settings(pictures, sd_folder, mixed_precision="bf16", steps=2))
    assert all(float(layer.delta().norm()) > 0 for layer in result.adapter.layers.values())


def test_a_fresh_injection_changes_no_bit_and_extracts_as_injected(pictures: Path, sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    inputs = (torch.randn(2, 4, 16, 16), 7, torch.randn(2, 77, 32))
    with torch.no_grad():
        before = base.pipe.unet(*inputs).sample
        paths = resolve_targets(base.paths, unet=("attention", "convolutions"), text_encoders=())
        inject(base, paths, settings(pictures, sd_folder))
        assert torch.equal(base.pipe.unet(*inputs).sample, before)
    adapter = extract(base, paths, metadata=AdapterMetadata(), dtype=torch.float32)
    module = module_at(base, paths[0])
    assert tuple(adapter.layers) == tuple(sorted(paths))
    assert torch.equal(adapter.layers[paths[0]].down, module.lora_A["default"].weight)  # type: ignore[union-attr,index]


def test_sdxl_trains_both_text_encoders(pictures: Path, sdxl_folder: Path) -> None:
    result = train(settings(pictures, sdxl_folder, steps=2))
    assert result.adapter.components == ("unet", "text_encoder_2", "text_encoder")
    assert all(float(layer.delta().norm()) > 0 for layer in result.adapter.layers.values())


def test_each_epoch_shows_every_picture_once() -> None:
    order = picture_order(5, 17, seed=2)
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
    assert order != picture_order(5, 17, seed=3)


def test_neighbouring_samples_have_unrelated_seeds() -> None:
    seeds = {sample_seed(seed, index) for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(data=Path("a"), output=Path("b"), steps=100, warmup_steps=10)
    rates = [rate_fraction(step, config) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == 1.0
    assert rates[100] == 0.0


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="the loss at step 7 is nan"):
        check_finite(torch.tensor(float("nan")), 7)


def refusal(config: TrainConfig, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        train(config)
    assert not list(config.output.parent.glob("*")), "something was left behind"
    return str(caught.value)


def test_bad_data_folders_are_named(pictures: Path, sd_folder: Path) -> None:
    empty = pictures.parent / "empty"
    empty.mkdir()
    for folder, words in ((pictures / "no", "no such folder"), (empty, "no pictures in it")):
        message = refusal(settings(folder, sd_folder, output=pictures.parent / "o" / "x.safetensors"), DatasetError)
        assert str(folder) in message
        assert words in message


def test_a_caption_without_its_picture_is_an_error(pictures: Path) -> None:
    (pictures / "lost.txt").write_text("a lost one")
    with pytest.raises(DatasetError, match=r"lost\.txt: a caption without its picture"):
        read_dataset(pictures)


def test_a_picture_without_its_caption_is_an_error(pictures: Path) -> None:
    (pictures / "2.txt").unlink()
    with pytest.raises(DatasetError, match=r"2\.png: has no caption"):
        read_dataset(pictures)


def test_an_unreadable_picture_is_named(pictures: Path, sd_folder: Path) -> None:
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    assert "1.png: cannot be read as a picture" in refusal(settings(pictures, sd_folder), DatasetError)


def test_output_that_cannot_be_written_is_found_before_training(pictures: Path, sd_folder: Path) -> None:
    blocked = pictures / "0.png" / "x.safetensors"
    with pytest.raises(OutputError, match="cannot be written"):
        train(settings(pictures, sd_folder, output=blocked))
    with pytest.raises(ConfigError, match=r"does not end in \.safetensors"):
        train(settings(pictures, sd_folder, output=pictures / "x.bin"))


def test_fp16_on_the_cpu_is_refused_in_words(pictures: Path, sd_folder: Path) -> None:
    if torch.cuda.is_available():
        return
    assert "needs a GPU" in refusal(settings(pictures, sd_folder, mixed_precision="fp16"), ConfigError)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535 // 2, (127, 127, 127)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_plain_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, ...]) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (16, 16), colour).save(path)  # type: ignore[arg-type]
    tensor = (load_picture(path, 16) + 1) * 127.5
    assert tensor.shape == (3, 16, 16)
    assert tensor[:, 8, 8].tolist() == pytest.approx(expected, abs=2)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste((255, 255, 255), (0, 0, 10, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    tensor = load_picture(tmp_path / "a.png", 8)
    assert float(tensor[:, 0].mean()) > 0.9
    assert float(tensor[:, -1].mean()) < -0.9
