"""Training of textual inversion, alone and with an adapter (pivotal tuning)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.train import TextualInversionConfig, TrainConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.models.textual_inversion import embedding_table, learned_tokens
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.methods.textual_inversion import TextualInversionCallbacks, add_learned_tokens
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from tests.helpers.short_runs import UNET_ONLY, interrupted, loss_before, settings, short_run


def config_of(ink: Path, tmp_path: Path, **textual_inversion: object) -> TrainConfig:
    changes = {
        "textual_inversion": {"placeholder_tokens": ["sks"], **textual_inversion},
        "optimizer": {"embedding_learning_rate": 3e-2},
    }
    return short_run(ink, tmp_path / "it.safetensors", 40, changes)


@pytest.mark.parametrize(
    "changes", [{"start_adapter_at": 1.0, "num_vectors": 3}, {"start_adapter_at": 0.5}], ids=["inversion", "pivotal"]
)
def test_token_is_learned_on_the_embedded_base(changes: dict[str, Any], ink: Path, tmp_path: Path, tiny: Base) -> None:
    config = config_of(ink, tmp_path, **changes)
    before = loss_before(config)
    result = train(config)
    assert read_log(tmp_path / "it-run" / LOG)[-1]["validation"]["loss"] < 0.98 * before
    adapter = load_adapter(result.path)
    assert set(adapter.tokens) == {"sks"}
    assert adapter.tokens["sks"]["text_encoder"].shape[0] == config.textual_inversion.num_vectors
    assert bool(adapter.layers) is (not config.trains_embeddings_only)
    prompt = GenerateConfig(prompt="a white house in the snow, in sks style", num_inference_steps=4)
    own, moved = (
        generate(tiny, [prompt], blend)[0].image.tobytes()
        for blend in (Blend(), Blend(entries=(WeightedAdapter(adapter=adapter),)))
    )
    assert own != moved


def test_only_learned_rows_change_and_keep_their_norm(pictures: Path, sd_folder: Path) -> None:
    config = settings(
        pictures,
        sd_folder,
        {
            **UNET_ONLY,
            "textual_inversion": {"placeholder_tokens": ["sks"], "start_adapter_at": 1.0, "initializer_token": "style"},
        },
    )
    run = set_up(config)
    assert run.learned_tokens
    table = embedding_table(run.base, "text_encoder").weight.detach().clone()
    (name,) = run.parameters
    start = run.parameters[name].detach().clone()
    result = train(config)
    assert result.adapter.paths == ()
    learned = result.adapter.tokens["sks"]["text_encoder"].float()
    assert not torch.equal(learned, start)
    assert torch.allclose(learned.norm(dim=1), start.norm(dim=1), rtol=2e-3)
    fresh = load_base(str(sd_folder))
    assert torch.equal(
        embedding_table(fresh, "text_encoder").weight, table[: embedding_table(fresh, "text_encoder").num_embeddings]
    )


def test_adapter_starts_when_the_tokens_are_frozen(pictures: Path, sd_folder: Path) -> None:
    textual_inversion = {"placeholder_tokens": ["sks"], "start_adapter_at": 0.5, "freeze_tokens_at": 0.5}
    half = train(
        settings(
            pictures,
            sd_folder,
            {**UNET_ONLY, "textual_inversion": textual_inversion},
            steps=4,
            save_every=2,
            save_precision="float32",
        )
    )
    begun = load_adapter(half.path.with_name("style-step00000002.safetensors"))
    assert all(float(layer.delta().norm()) == 0 for layer in begun.layers.values())
    assert all(float(layer.delta().norm()) > 0 for layer in half.adapter.layers.values())
    assert torch.equal(begun.tokens["sks"]["text_encoder"], half.adapter.tokens["sks"]["text_encoder"])


def test_learned_token_is_encoded_alike_in_training_and_sampling(sd_folder: Path) -> None:
    from lora_diffusion.models.text_encoding import encode_prompts
    from lora_diffusion.prompts.emphasis import parse_literal

    training, sampling = load_base(str(sd_folder)), load_base(str(sd_folder))
    tokens = add_learned_tokens(training, TextualInversionConfig(placeholder_tokens=("sks",), num_vectors=2), seed=3)
    adapter = Adapter(layers={}, tokens=tokens.extract_tokens(torch.float32))
    text = "a house in sks style"
    with torch.no_grad():
        ours = encode_prompts(training, [text], size_px=64, read=tokens.wrap_parser(parse_literal)).hidden
        with learned_tokens(sampling, Blend(entries=(WeightedAdapter(adapter=adapter),))) as rewrite:
            theirs = encode_prompts(sampling, [rewrite(text)], size_px=64, read=parse_literal).hidden
        other = encode_prompts(sampling, [text], size_px=64, read=parse_literal).hidden
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, other)


def test_resumed_run_with_tokens_is_bit_identical(pictures: Path, sd_folder: Path) -> None:
    changes = {
        **UNET_ONLY,
        "textual_inversion": {"placeholder_tokens": ["sks"], "start_adapter_at": 0.3},
        "samples": {"every": 3},
    }
    config = settings(pictures, sd_folder, changes, state_every=1)
    whole = train(config).adapter
    interrupted(config)
    assert train(config).adapter.hash == whole.hash


def test_norms_are_restored_after_a_step() -> None:
    vectors = torch.nn.Parameter(torch.randn(3, 8))
    before = vectors.detach().norm(dim=1)
    callbacks = TextualInversionCallbacks(
        {"text_encoder.tokens.a": vectors}, {}, TextualInversionConfig(placeholder_tokens=("a",)), steps=4
    )
    with torch.no_grad():
        vectors.mul_(5).add_(1)
    callbacks.after_step(0, lambda _vectors: 1e-3)
    assert torch.allclose(vectors.norm(dim=1), before)


def test_each_token_is_reported_once_on_a_base_with_two_text_encoders() -> None:
    tokens = {
        f"{component}.tokens.a": torch.nn.Parameter(torch.ones(1, 2))
        for component in ("text_encoder", "text_encoder_2")
    }
    callbacks = TextualInversionCallbacks(tokens, {}, TextualInversionConfig(placeholder_tokens=("a",)), steps=4)
    assert callbacks.report() == {"tokens": ["a"]}


def test_closing_the_vocabularies_restores_the_text_encoder(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    table = embedding_table(base, "text_encoder")
    weight = table.weight
    tokens = add_learned_tokens(base, TextualInversionConfig(placeholder_tokens=("sks",)), seed=3)
    assert "forward" in vars(table)
    tokens.open_vocabularies.close()
    assert "forward" not in vars(table)
    assert table.weight is weight


@pytest.mark.parametrize(
    ("textual_inversion", "message"),
    [
        ({"placeholder_tokens": ["nobody"]}, "'nobody' occurs in no caption"),
        (
            {"placeholder_tokens": ["sks"], "start_adapter_at": 0.8, "freeze_tokens_at": 0.2},
            "nothing would be trained in between",
        ),
        ({"num_vectors": 2}, "have no effect without tokens; name the tokens"),
        ({"placeholder_tokens": ["two words"]}, "must not contain spaces"),
        ({"placeholder_tokens": ["sks"], "num_vectors": 40}, "num_vectors"),
    ],
)
def test_invalid_settings_are_rejected(
    textual_inversion: dict[str, Any], message: str, pictures: Path, sd_folder: Path
) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        train(settings(pictures, sd_folder, {**UNET_ONLY, "textual_inversion": textual_inversion}))
    assert message in str(caught.value)


def test_frozen_phases_and_stability_of_pivotal_tuning() -> None:
    tokens, others = ({name: torch.nn.Parameter(torch.ones(1, 2))} for name in ("text_encoder.tokens.a", "unet.x.up"))
    callbacks = TextualInversionCallbacks(
        tokens,
        others,
        TextualInversionConfig(placeholder_tokens=("a",), start_adapter_at=0.5, freeze_tokens_at=0.75),
        steps=8,
    )
    assert [len([*callbacks.frozen_parameters(step)]) for step in (0, 3, 4, 6)] == [1, 1, 0, 1]
    assert [callbacks.is_stable(done) for done in (1, 4, 5)] == [False, False, True]
    assert TextualInversionCallbacks(
        tokens, {}, TextualInversionConfig(placeholder_tokens=("a",), start_adapter_at=1.0), steps=8
    ).is_stable(1)
