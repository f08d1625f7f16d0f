"""Learned tokens in prompts, compared with diffusers' `load_textual_inversion`; no collisions, and full restoration."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import encode_prompts
from lora_diffusion.models.textual_inversion import embedding_table, learned_tokens
from tests.conftest import random_adapter

WIDTHS = {"text_encoder": 32, "text_encoder_2": 40}


def vectors(seed: int, component: str = "text_encoder", count: int = 2) -> Tensor:
    return torch.randn(count, WIDTHS[component], generator=torch.Generator().manual_seed(seed))


def token_adapter(
    name: str, seed: int, word: str = "sks", components: tuple[str, ...] = ("text_encoder",)
) -> WeightedAdapter:
    token = {component: vectors(seed, component) for component in components}
    return WeightedAdapter(adapter=Adapter(layers={}, tokens={word: token}, metadata=AdapterMetadata(name=name)))


@torch.no_grad()
def encode(base: Base, blend: Blend, prompt: str) -> Tensor:
    with learned_tokens(base, blend) as rewrite:
        return encode_prompts(base, [rewrite(prompt)], size_px=32).hidden


@pytest.mark.filterwarnings("ignore")
def test_a_learned_token_is_encoded_as_by_diffusers(sd: Base, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd.folder, safety_checker=None)
    save_file({"<toy>": vectors(1)}, tmp_path / "toy.safetensors")
    pipe.load_textual_inversion(tmp_path / "toy.safetensors", token="<toy>")
    prompt = "a <toy> in the snow"
    with torch.no_grad():
        theirs = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    ours = encode(sd, Blend(entries=(token_adapter("a", 1, "<toy>"),)), prompt)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, encode(sd, Blend(), prompt), atol=1e-2)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_encoders_and_tokenizers_are_restored_after_an_error(family: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(family)
    components = tuple(base.layout.text_layers)
    before = encode(base, Blend(), "a sks cat")
    own = [embedding_table(base, component).weight for component in components]
    tokenizer = base.pipe.tokenizer
    entry = token_adapter("a", 1, components=components)
    with pytest.raises(RuntimeError, match="inside"), learned_tokens(base, Blend(entries=(entry,))):
        raise RuntimeError("inside")
    assert all(
        embedding_table(base, component).weight is weight for component, weight in zip(components, own, strict=True)
    )
    assert base.pipe.tokenizer is tokenizer
    assert torch.equal(encode(base, Blend(), "a sks cat"), before)


def test_tokens_of_two_adapters_do_not_collide(sd: Base) -> None:
    one, two = token_adapter("one", 1), token_adapter("two", 2)
    both = Blend(entries=(one, two))
    alone = [encode(sd, Blend(entries=(entry,)), "a sks cat") for entry in (one, two)]
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    for entry, expected in zip((one, two), alone, strict=True):
        assert torch.allclose(encode(sd, both, f"a {entry.name}/sks cat"), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="write one/sks or two/sks in the prompt"):
        encode(sd, both, "a sks cat")
    assert torch.allclose(encode(sd, both, "a sksy cat"), encode(sd, Blend(), "a sksy cat"), atol=1e-6)


def test_tokens_of_an_adapter_with_weight_zero_are_ignored(sd: Base) -> None:
    entry = token_adapter("a", 1)
    silent = Blend(entries=(WeightedAdapter(adapter=entry.adapter, weight=0.0),))
    assert torch.equal(encode(sd, silent, "a sks cat"), encode(sd, Blend(), "a sks cat"))


def test_a_token_for_another_base_is_refused(sd: Base, sdxl: Base) -> None:
    wide = Adapter(layers={}, tokens={"sks": {"text_encoder": torch.zeros(1, 768)}})
    with pytest.raises(FamilyMismatchError, match="width 768, but text_encoder"):
        encode(sd, Blend(entries=(WeightedAdapter(adapter=wide),)), "a sks cat")
    with pytest.raises(ConfigError, match="none for text_encoder_2"):
        encode(sdxl, Blend(entries=(token_adapter("a", 1),)), "a sks cat")


def test_tokens_and_layers_of_an_adapter_both_change_the_image(sd: Base) -> None:
    layers = random_adapter(sd, seed=1).layers
    adapter = Adapter(layers=layers, tokens={"sks": {"text_encoder": vectors(1)}})
    config = GenerateConfig(prompt="a sks cat", num_inference_steps=2, width=32, height=32)

    def picture(entries: tuple[WeightedAdapter, ...]) -> bytes:
        return generate(sd, [config], Blend(entries=entries))[0].image.tobytes()

    whole = picture((WeightedAdapter(adapter=adapter),))
    assert whole == picture((WeightedAdapter(adapter=adapter),))
    assert whole != picture((WeightedAdapter(adapter=Adapter(layers=layers)),))
    again = generate(sd, [config], Blend(entries=(WeightedAdapter(adapter=adapter),)))[0]
    assert again.recipe.settings == config, "the recipe has the prompt as its user wrote it"
