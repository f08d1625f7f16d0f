"""Merging into a folder: the same weights as a weight patch, and no partial output after an error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter, blend_sum
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.merge import MergeConfig, WeightType
from lora_diffusion.errors import ConfigError, FamilyMismatchError, LoRADiffusionError, OutputError
from lora_diffusion.inference.in_place import blended_weights, weight_at
from lora_diffusion.inference.sampling import generate
from lora_diffusion.merging.merge import MergeReport, merge
from lora_diffusion.merging.recipe import RECIPE_FILE
from lora_diffusion.models.load import Base, load_base
from tests.conftest import random_adapter


def two(base: Base, first: float = 0.8, second: float = -0.5) -> Blend:
    adapters = (random_adapter(base, seed=1, unet=("all",)), random_adapter(base, seed=2, rank=2, alpha=5.0))
    pairs = zip(adapters, (first, second), ("one.safetensors", "two.safetensors"), strict=True)
    return Blend(entries=tuple(WeightedAdapter(adapter=a, weight=w, path=Path(p)) for a, w, p in pairs))


def merged(base: Base, blend: Blend, output: Path, precision: WeightType = "keep") -> MergeReport:
    return merge(str(base.folder), blend, output, MergeConfig(precision=precision))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_merged_checkpoint_has_the_weights_of_the_live_blend(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    blend = two(base)
    report = merged(base, blend, tmp_path / "merged")
    assert report.merged_modules == len(blend_sum(blend).layers)
    assert report.rounding_error == 0.0
    again = load_base(str(tmp_path / "merged"), device=torch.device("cpu"))
    with blended_weights(base, blend):
        assert all(torch.equal(weight_at(again, path), weight_at(base, path)) for path in base.paths)


def test_sampling_the_merged_checkpoint_gives_the_blends_pixels(sd: Base, tmp_path: Path) -> None:
    config = GenerateConfig(prompt="a cat", num_inference_steps=3, seed=4)
    live = generate(sd, [config], two(sd))[0].image
    merged(sd, two(sd), tmp_path / "merged")
    again = generate(load_base(str(tmp_path / "merged"), device=torch.device("cpu")), [config])[0].image
    assert again.tobytes() == live.tobytes()


def test_merging_a_weight_and_its_negative_gives_the_base_within_rounding(sd: Base, tmp_path: Path) -> None:
    merged(sd, two(sd, 0.8, -0.5), tmp_path / "there")
    there = load_base(str(tmp_path / "there"), device=torch.device("cpu"))
    merged(there, two(sd, -0.8, 0.5), tmp_path / "back")
    back = load_base(str(tmp_path / "back"), device=torch.device("cpu"))
    assert all(torch.allclose(weight_at(back, path), weight_at(sd, path), atol=1e-6) for path in sd.paths)


def test_half_precision_is_rounded_once_and_the_error_reported(sd: Base, tmp_path: Path) -> None:
    blend = two(sd)
    report = merged(sd, blend, tmp_path / "merged", precision="float16")
    tensors = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    with blended_weights(sd, blend):
        for path in [p for p in blend_sum(blend).layers if p.startswith("unet.")]:
            assert torch.equal(tensors[f"{path.removeprefix('unet.')}.weight"], weight_at(sd, path).half())
    assert 0 < report.rounding_error < 0.01
    assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_the_output_contains_its_recipe(sd: Base, tmp_path: Path) -> None:
    merged(sd, two(sd), tmp_path / "merged")
    recipe = json.loads((tmp_path / "merged" / RECIPE_FILE).read_text())
    assert recipe["base_hash"] == sd.hash
    assert [(a["path"], a["weight"]) for a in recipe["adapters"]] == [
        ("one.safetensors", 0.8),
        ("two.safetensors", -0.5),
    ]
    with safe_open(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lora_diffusion_recipe"]) == recipe
    assert "random-1" in (tmp_path / "merged" / "README.md").read_text()


def test_the_base_on_disk_is_unchanged(sd: Base, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in sorted(sd.folder.rglob("*")) if p.is_file()}
    merged(sd, two(sd), tmp_path / "merged")
    assert before == {p: p.read_bytes() for p in sorted(sd.folder.rglob("*")) if p.is_file()}


def test_sharded_weights_are_merged_shard_by_shard(sd: Base, tmp_path: Path) -> None:
    sd.pipe.save_pretrained(tmp_path / "sharded", max_shard_size="400KB")
    assert list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))
    sharded = load_base(str(tmp_path / "sharded"), device=torch.device("cpu"))
    merged(sharded, two(sd), tmp_path / "merged")
    again = load_base(str(tmp_path / "merged"), device=torch.device("cpu"))
    with blended_weights(sd, two(sd)):
        assert all(torch.equal(weight_at(again, path), weight_at(sd, path)) for path in sd.paths)


def test_an_output_folder_with_files_is_refused(sd: Base, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not an empty folder"):
        merged(sd, two(sd), tmp_path / "merged")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]


def test_a_layer_without_its_tensor_refuses_before_anything_is_written(sd: Base, tmp_path: Path) -> None:
    layer = LoRALayer(down=torch.ones(1, 4), up=torch.ones(4, 1), alpha=1.0)
    good = random_adapter(sd, seed=1)
    adapter = Adapter(layers={**good.layers, "unet.nowhere.to_q": layer}, metadata=good.metadata)
    blend = Blend(entries=(WeightedAdapter(adapter=adapter),))
    with pytest.raises(FamilyMismatchError, match=r"1 of \d+ layers match no module .*first: unet\.nowhere\.to_q"):
        merged(sd, blend, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_leaves_nothing_behind(
    sd: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_diffusion.merging.writer as module

    calls = []

    def full_disk(*args: object) -> None:
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "stream_safetensors", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        merged(sd, two(sd), tmp_path / "merged")
    assert calls
    assert not list(tmp_path.iterdir())


def test_another_familys_adapter_is_refused(sd: Base, sdxl: Base, tmp_path: Path) -> None:
    blend = Blend(entries=(WeightedAdapter(adapter=random_adapter(sdxl, seed=1)),))
    with pytest.raises(FamilyMismatchError, match=r"random-1 is an adapter for tiny SDXL, but .* is tiny SD"):
        merged(sd, blend, tmp_path / "merged")


def test_a_blend_that_changes_nothing_is_not_merged(sd: Base, tmp_path: Path) -> None:
    for blend in (Blend(), Blend(entries=(WeightedAdapter(adapter=random_adapter(sd, seed=1), weight=0.0),))):
        with pytest.raises(ConfigError, match="nothing to merge"):
            merged(sd, blend, tmp_path / "merged")


def test_weights_beyond_the_outputs_range_are_refused(sd: Base, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"beyond the range of torch\.float16"):
        merged(sd, two(sd, 1e7, 0.0), tmp_path / "merged", precision="float16")
    assert not list(tmp_path.iterdir())


def test_other_components_of_the_base_are_copied(sd: Base, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sd.folder, source)
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "model.safetensors").write_bytes(b"as it is")
    (source / "README.md").write_text("the source's own card")
    merge(str(source), two(sd), tmp_path / "merged")
    assert (tmp_path / "merged" / "safety_checker" / "model.safetensors").read_bytes() == b"as it is"
    assert "the source's own card" not in (tmp_path / "merged" / "README.md").read_text()


def test_a_truncated_base_is_named_and_nothing_is_left(sd: Base, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sd.folder, source)
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LoRADiffusionError, match="damaged"):
        merge(str(source), two(sd), tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_embeddings_become_tokens_of_the_merged_folder(sd: Base, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    adapter = Adapter(layers=random_adapter(sd, seed=1).layers, tokens={"<s1>": {"text_encoder": vectors}})
    blend = Blend(entries=(WeightedAdapter(adapter=adapter, weight=0.5),))
    config = GenerateConfig(prompt="a <s1> cat", num_inference_steps=2, seed=4)
    live = generate(sd, [config], blend)[0].image
    merged(sd, blend, tmp_path / "merged")
    again = load_base(str(tmp_path / "merged"), device=torch.device("cpu"))
    assert len(again.pipe.tokenizer) == len(sd.pipe.tokenizer) + 2
    assert generate(again, [config])[0].image.tobytes() == live.tobytes()
