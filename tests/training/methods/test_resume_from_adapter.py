"""Training that starts from an adapter, or on top of other adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import FullLayer, LoRALayer
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import AdapterFormatError, ConfigError, FamilyMismatchError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.models.load import Base, load_base, module_at
from lora_diffusion.training.base_adapters import add_base_adapters
from lora_diffusion.training.methods.injection import extract_adapter, inject_adapter
from lora_diffusion.training.methods.resume_from_adapter import check_continuable
from lora_diffusion.training.train import train
from tests.helpers.method_cases import config_of, injected, predicted, shake
from tests.helpers.short_runs import UNET_ONLY, settings

CONTINUED = ("lora", "rslora", "dora", "loha", "lokr", "dora on lokr", "pissa", "by block", "mixed", "sparse")


@pytest.mark.parametrize("method", CONTINUED)
def test_injected_adapter_equals_the_original(method: str, sd_folder: Path) -> None:
    """Before the first step, layers and predictions are those of the adapter."""
    base, fresh = load_base(str(sd_folder)), load_base(str(sd_folder))
    paths, made = injected(base, config_of(method))
    shake(made.parameters)
    adapter = extract_adapter(base, paths, AdapterMetadata(family=base.family.name), torch.float32)
    begun = inject_adapter(fresh, adapter, AdapterConfig())
    again = extract_adapter(fresh, paths, AdapterMetadata(), torch.float32)
    assert again.paths == adapter.paths
    for path, layer in adapter.layers.items():
        weight = module_at(base, path).weight.detach()
        assert torch.allclose(again.layers[path].delta(weight), layer.delta(weight), atol=1e-6), path
        assert type(again.layers[path]) is type(layer)
    assert all(parameter.requires_grad for parameter in begun.parameters.values())
    fresh.pipe.unet.eval()
    base.pipe.unet.eval()
    assert torch.allclose(predicted(fresh), predicted(base), atol=1e-4)


def test_run_starts_from_a_file_and_on_top_of_others(ink: Path, tmp_path: Path) -> None:
    ready = sample_data_folder() / "adapters" / "gloop.safetensors"
    table: dict[str, Any] = {
        "data": {"folder": ink},
        "output": tmp_path / "it.safetensors",
        "steps": 2,
        "adapter": {
            "init_from": str(sample_data_folder() / "adapters" / "ink.safetensors"),
            "text_encoder_target_modules": [],
        },
        "optimizer": {"learning_rate": 1e-5, "warmup_steps": 0},
        "tracking": {"trackers": []},
    }
    with pytest.raises(ConfigError, match="changes text encoders"):
        train(validate(TrainConfig, table, source="test"))
    table["adapter"] |= {"text_encoder_target_modules": ["attention"]}
    plain = train(validate(TrainConfig, table, source="test")).adapter
    ink_adapter = load_adapter(sample_data_folder() / "adapters" / "ink.safetensors")
    assert plain.paths == ink_adapter.paths
    for path, layer in plain.layers.items():
        before = ink_adapter.layers[path].delta()
        assert float((layer.delta() - before).norm()) < 0.05 * float(before.norm())
    assert plain.hash != ink_adapter.hash
    on_top = {**table, "output": tmp_path / "top.safetensors", "base_adapters": {str(ready): 0.8}}
    over = train(validate(TrainConfig, on_top, source="test")).adapter
    assert over.metadata.base_hash != plain.metadata.base_hash
    assert over.metadata.training["base_adapters"] == {"gloop.safetensors": 0.8}
    with pytest.raises(ConfigError, match=r"init_from takes use_dora from the file"):
        validate(TrainConfig, {**table, "adapter": {**table["adapter"], "use_dora": True}}, source="test")
    with pytest.raises(AdapterFormatError, match="nowhere"):
        train(
            validate(
                TrainConfig, {**on_top, "base_adapters": {str(tmp_path / "nowhere.safetensors"): 1}}, source="test"
            )
        )


def test_adapters_with_learned_words_or_no_layers_are_rejected(sd: Base, tmp_path: Path) -> None:
    words = Adapter(layers={}, tokens={"sks": {"text_encoder": torch.ones(1, 4)}})
    with pytest.raises(ConfigError, match="learned tokens"):
        check_continuable(words, "a.safetensors")
    with pytest.raises(ConfigError, match="no layers"):
        check_continuable(Adapter(layers={}), "a.safetensors")
    with pytest.raises(ConfigError, match=r"base_adapters: .*textual-inversion embeddings"):
        save_adapter(words, tmp_path / "words.safetensors")
        add_base_adapters(sd, {tmp_path / "words.safetensors": 1.0})


def test_unsupported_adapters_are_rejected(pictures: Path, sd: Base, tmp_path: Path) -> None:
    file, base = tmp_path / "begun.safetensors", Path(sd.name)
    path = "unet.mid_block.attentions.0.proj_in"
    size = sd.pipe.unet.mid_block.attentions[0].proj_in.weight.shape
    changes = {**UNET_ONLY, "adapter": {**UNET_ONLY["adapter"], "init_from": str(file)}}

    def assert_rejected(layer: Any, message: str, min_rank: int = 0, **more: Any) -> None:
        metadata = AdapterMetadata(family=sd.family.name, min_rank=min_rank)
        save_adapter(Adapter(layers={path: layer}, metadata=metadata), file)
        own = AdapterConfig()
        adapter = {**changes["adapter"], **more, "unet_target_modules": own.unet_target_modules, "rank": own.rank}
        with pytest.raises((ConfigError, FamilyMismatchError), match=message):
            train(settings(pictures, base, {**changes, "adapter": adapter}))

    kernel = [1] * (len(size) - 2)
    fits = LoRALayer(down=torch.ones(2, size[1], *kernel), up=torch.ones(size[0], 2, *kernel), alpha=2.0)
    other = LoRALayer(down=torch.ones(2, 7, *kernel), up=torch.ones(9, 2, *kernel), alpha=2.0)
    full = FullLayer(diff=torch.ones(*size))
    assert_rejected(fits, "rank depends on the timestep", min_rank=1)
    assert_rejected(other, "proj_in")
    assert_rejected(full, r"adapter.dropout applies to plain LoRA only", dropout=0.1)
