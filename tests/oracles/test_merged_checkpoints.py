"""Merged checkpoints against what others make of the same files: diffusers' fused pipeline, LyCORIS' live network."""

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
"""Tucker's form is for kernels; a magnitude per input is what LyCORIS writes but does not read again."""
SUMS = [kind for kind in KINDS if "dora" not in kind]
"""Whose effect is linear in the weight; LyCORIS scales DoRA's delta and magnitude apart, we what they come to."""
WEIGHTS = {"one": 0.8, "two": -0.5}


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_it_is_what_diffusers_fuses(family: str, output: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Two adapters with weights. PEFT adds one delta after the other: as many float32 roundings of a weight."""
    base: Base = request.getfixturevalue(family)
    files = {name: tmp_path / f"{name}.safetensors" for name in WEIGHTS}
    save_adapter(random_adapter(base, seed=1, unet=("all",), text_encoders=("all",)), files["one"])
    save_adapter(random_adapter(base, seed=2, rank=2, alpha=5.0), files["two"])
    entries = [WeightedAdapter(adapter=load_adapter(files[name]), weight=WEIGHTS[name]) for name in WEIGHTS]
    merge(str(base.folder), Blend(entries=tuple(entries)), tmp_path / output)
    ours, theirs = open_checkpoint(tmp_path / output), fused(base, files)
    changed = 0
    for name, stored in ours.parameters.items():
        path, _, leaf = name.rpartition(".")
        fused_value = getattr(module_at(theirs, path), leaf).detach()
        bound = 8 * torch.finfo(torch.float32).eps * fused_value.abs().max()
        assert (stored.read().reshape(fused_value.shape) - fused_value).abs().max() <= bound, name
        changed += not torch.equal(fused_value, getattr(module_at(base, path), leaf))
    assert changed == len({path for entry in entries for path in entry.adapter.layers})


def fused(base: Base, files: dict[str, Path]) -> Base:
    """A base of its own with the adapters in its weights, as diffusers' documentation says."""
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
@pytest.mark.parametrize(("weight", "kinds"), [(1.0, KINDS), (0.6, SUMS)], ids=["all", "sums"])
def test_it_is_what_lycoris_shows(weight: float, kinds: list[str], output: str, sd: Base, tmp_path: Path) -> None:
    """A file with every kind of layer that LyCORIS writes, through its own modules around the UNet's."""
    file = tmp_path / "lycoris.safetensors"
    save_file(layers_of(kinds, sd), file)
    blend = Blend(entries=(WeightedAdapter(adapter=load_adapter(file), weight=weight),))
    merge(str(sd.folder), blend, tmp_path / output)
    ours = unet_of(sd, tmp_path / output)
    theirs: Any = load_base(str(sd.folder), device=torch.device("cpu")).pipe.unet
    plain = predicted(theirs)
    for name, path in zip(*places(kinds, sd), strict=True):
        kind: Any
        kind, factors = get_module(load_file(file), name)
        module: Any = make_module(kind, factors, name, theirs.get_submodule(path.removeprefix("unet.")))
        module.multiplier = weight
        module.apply_to()
    expected = predicted(theirs)
    effect = (expected - plain).abs().max()
    assert effect > 0.01
    assert (predicted(ours) - expected).abs().max() < 1e-4 * effect


def layers_of(kinds: list[str], base: Base) -> dict[str, Tensor]:
    """One layer of each kind, each on a projection of the UNet of its own."""
    tensors: dict[str, Tensor] = {}
    for kind, name, path in zip(kinds, *places(kinds, base), strict=True):
        build, options = LYCORIS[kind]
        module: Any = build(name, clone(module_at(base, path)), **options)
        tensors |= {f"{name}.{key}": value for key, value in random_state(module).items()}
    return tensors


def places(kinds: list[str], base: Base) -> tuple[list[str], list[str]]:
    """As many projections as there are kinds, by kohya's name and ours."""
    paths = [path for path in base.paths if path.startswith("unet.") and path.endswith(("to_q", "to_v", "ff.net.2"))]
    paths = paths[: len(kinds)]
    return [kohya_name(path, base.family.name) for path in paths], paths


def clone(module: Any) -> nn.Module:
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.load_state_dict(module.state_dict())
    return linear


def unet_of(base: Base, merged: Path) -> Any:
    if merged.is_dir():
        return load_base(str(merged), device=torch.device("cpu")).pipe.unet
    parts = {name: part for name, part in base.pipe.components.items() if name.startswith(("text", "token"))}
    kind = StableDiffusionXLPipeline if base.family.name == "sdxl" else StableDiffusionPipeline
    with quiet_libraries():
        pipe: Any = kind.from_single_file(str(merged), config=str(base.folder), local_files_only=True, **parts)
    return pipe.unet


def predicted(unet: Any) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 16, 16, generator=rng), torch.randn(1, 77, 32, generator=rng)
    with torch.no_grad():
        return unet(latents, 500, encoder_hidden_states=states).sample
