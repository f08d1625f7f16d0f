"""Merged checkpoints against reference implementations: the fused pipeline of diffusers, the network of LyCORIS."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lycoris.modules import get_module, make_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.formats.adapters.kohya_keys import kohya_name
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.checkpoints.checkpoint import open_checkpoint
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base, load_base, module_at, quiet_libraries
from tests.conftest import random_adapter
from tests.oracles.test_layer_kinds import LYCORIS, random_state

KINDS = [kind for kind in LYCORIS if "tucker" not in kind and kind != "dora-in"]
"""Kinds for linear modules. Tucker cores need kernels, and LyCORIS cannot load a magnitude per input."""
LINEAR_KINDS = [kind for kind in KINDS if "dora" not in kind]
"""Kinds whose effect is linear in the blend weight. For DoRA, LyCORIS scales delta and magnitude separately."""
WEIGHTS = {"one": 0.8, "two": -0.5}


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_merged_checkpoint_equals_the_fused_pipeline_of_diffusers(
    family: str, output: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """PEFT adds one delta after the other and rounds to float32 each time, hence the tolerance."""
    base: Base = request.getfixturevalue(family)
    files = {name: tmp_path / f"{name}.safetensors" for name in WEIGHTS}
    save_adapter(random_adapter(base, seed=1, unet=("all",), text_encoders=("all",)), files["one"])
    save_adapter(random_adapter(base, seed=2, rank=2, alpha=5.0), files["two"])
    entries = [WeightedAdapter(adapter=load_adapter(files[name]), weight=WEIGHTS[name]) for name in WEIGHTS]
    merge(str(base.folder), Blend(entries=tuple(entries)), tmp_path / output)
    ours, theirs = open_checkpoint(tmp_path / output), load_fused(base, files)
    changed = 0
    for name, stored in ours.parameters.items():
        path, _, leaf = name.rpartition(".")
        fused_value = getattr(module_at(theirs, path), leaf).detach()
        bound = 8 * torch.finfo(torch.float32).eps * fused_value.abs().max()
        assert (stored.read().reshape(fused_value.shape) - fused_value).abs().max() <= bound, name
        changed += not torch.equal(fused_value, getattr(module_at(base, path), leaf))
    assert changed == len({path for entry in entries for path in entry.adapter.layers})


def load_fused(base: Base, files: dict[str, Path]) -> Base:
    """Load the base again and fuse the adapters as documented by diffusers."""
    other = load_base(str(base.folder), device=torch.device("cpu"))
    pipe: Any = other.pipe
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, file in files.items():
            pipe.load_lora_weights(file, adapter_name=name)
        pipe.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
        pipe.fuse_lora(components=list(base.family.components))
        pipe.unload_lora_weights()
    return other


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize(("weight", "kinds"), [(1.0, KINDS), (0.6, LINEAR_KINDS)], ids=["all", "linear"])
def test_a_merged_checkpoint_equals_the_network_of_lycoris(
    weight: float, kinds: list[str], output: str, sd: Base, tmp_path: Path
) -> None:
    """The file has every layer kind that LyCORIS writes; LyCORIS wraps the modules of the UNet."""
    file = tmp_path / "lycoris.safetensors"
    save_file(random_lycoris_tensors(kinds, sd), file)
    blend = Blend(entries=(WeightedAdapter(adapter=load_adapter(file), weight=weight),))
    merge(str(sd.folder), blend, tmp_path / output)
    ours = load_unet(sd, tmp_path / output)
    theirs: Any = load_base(str(sd.folder), device=torch.device("cpu")).pipe.unet
    without_adapter = predict_noise(theirs)
    for name, path in zip(*projections(kinds, sd), strict=True):
        kind: Any
        kind, factors = get_module(load_file(file), name)
        module: Any = make_module(kind, factors, name, theirs.get_submodule(path.removeprefix("unet.")))
        module.multiplier = weight
        module.apply_to()
    expected = predict_noise(theirs)
    effect = (expected - without_adapter).abs().max()
    assert effect > 0.01
    assert (predict_noise(ours) - expected).abs().max() < 1e-4 * effect


def random_lycoris_tensors(kinds: list[str], base: Base) -> dict[str, Tensor]:
    """Create one layer of each kind, each for another projection of the UNet."""
    tensors: dict[str, Tensor] = {}
    for kind, name, path in zip(kinds, *projections(kinds, base), strict=True):
        build, options = LYCORIS[kind]
        module: Any = build(name, clone(module_at(base, path)), **options)
        tensors |= {f"{name}.{key}": value for key, value in random_state(module).items()}
    return tensors


def projections(kinds: list[str], base: Base) -> tuple[list[str], list[str]]:
    """Return as many projections of the UNet as there are kinds, as kohya names and module paths."""
    paths = [path for path in base.paths if path.startswith("unet.") and path.endswith(("to_q", "to_v", "ff.net.2"))]
    paths = paths[: len(kinds)]
    return [kohya_name(path, base.family.name) for path in paths], paths


def clone(module: Any) -> nn.Module:
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.load_state_dict(module.state_dict())
    return linear


def load_unet(base: Base, merged: Path) -> Any:
    if merged.is_dir():
        return load_base(str(merged), device=torch.device("cpu")).pipe.unet
    parts = {name: part for name, part in base.pipe.components.items() if name.startswith(("text", "token"))}
    kind = StableDiffusionXLPipeline if base.family.name == "sdxl" else StableDiffusionPipeline
    with quiet_libraries():
        pipe: Any = kind.from_single_file(str(merged), config=str(base.folder), local_files_only=True, **parts)
    return pipe.unet


def predict_noise(unet: Any) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 16, 16, generator=rng), torch.randn(1, 77, 32, generator=rng)
    with torch.no_grad():
        return unet(latents, 500, encoder_hidden_states=states).sample
