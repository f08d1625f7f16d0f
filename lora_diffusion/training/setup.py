"""Set up a training run: check the settings, read the data, load the base and attach the trainable adapter.

Most mistakes in settings and data are found here, before the first optimizer step.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.compatibility import check_family
from lora_diffusion.architectures.module_paths import changeable_paths, trainable_paths
from lora_diffusion.architectures.targets import resolve_modules_to_save, resolve_targets
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.config.train import DataConfig, TrainConfig
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.data.captions import caption_parser
from lora_diffusion.data.checks import assign_buckets
from lora_diffusion.data.folder import Example, data_hash, read_dataset
from lora_diffusion.data.images import read_size
from lora_diffusion.data.splits import split_validation
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.in_place import check_base_fits
from lora_diffusion.models.load import Base, default_device, load_base
from lora_diffusion.models.offload import list_idle_models, offload
from lora_diffusion.models.quantize import check_quantization_available, quantize_base
from lora_diffusion.prompts.emphasis import ReadText
from lora_diffusion.training.base_adapters import add_base_adapters
from lora_diffusion.training.checks import check_trainable
from lora_diffusion.training.diffusion.timesteps import check_timesteps
from lora_diffusion.training.input_checks import check_captions, check_learned_tokens, check_tracker, check_views
from lora_diffusion.training.inputs.cache import Cache, DiskCache, MemoryCache, NoCache
from lora_diffusion.training.inputs.captions import CaptionEncoder
from lora_diffusion.training.inputs.latents import ViewEncoder
from lora_diffusion.training.inputs.samples import TrainingSamples, plan_order
from lora_diffusion.training.loop import new_accelerator
from lora_diffusion.training.methods.callbacks import CallbackList, MethodCallbacks
from lora_diffusion.training.methods.injection import adapter_state_of, inject, inject_adapter
from lora_diffusion.training.methods.resume_from_adapter import check_continuable
from lora_diffusion.training.methods.textual_inversion import (
    LearnedTokens,
    TextualInversionCallbacks,
    add_learned_tokens,
)
from lora_diffusion.training.objectives.concept_slider import ConceptSliderLoss
from lora_diffusion.training.objectives.denoiser import Denoiser
from lora_diffusion.training.objectives.prior_preservation import (
    PriorPreservationLoss,
    class_folder,
    make_class_pictures,
)
from lora_diffusion.training.sharding import check_data_parallel, shard_base
from lora_diffusion.training.validation import HeldOut

_DTYPE_NAMES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Data type of the frozen base for each `compute.mixed_precision`."""


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """Everything about a run that stays the same from step to step."""

    config: TrainConfig
    """Settings of the run."""
    accelerator: Accelerator
    """Accelerate's interface to devices and processes."""
    base: Base
    """The base, with the trainable adapter attached to its modules."""
    denoiser: Denoiser = field(repr=False)
    """The trainable parts of the base, with the loss as forward pass."""
    paths: tuple[str, ...]
    """Paths of all modules that are trained."""
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    """Trainable parameters by module path and factor."""
    learned_tokens: LearnedTokens | None
    """Textual-inversion embeddings; None if none are trained."""
    callbacks: MethodCallbacks
    """Hooks of the training method, such as AdaLoRA's pruning."""
    samples: tuple[TrainingSamples, ...] = field(repr=False)
    """Samples of the training images, followed by those of the class images if there are any."""
    captions: CaptionEncoder
    """Encoder of captions with frozen text encoders."""
    held_out: HeldOut | None
    """Images to validate on; None without validation."""
    data_hash: str
    """Hash of the training images and captions."""
    folder: Path
    """The run's folder, for states, log, sample images and cache."""


def run_folder(output: str | os.PathLike[str]) -> Path:
    """Return the folder of a run: `NAME-run`, next to the adapter file `NAME.safetensors`."""
    output = Path(output)
    return output.with_name(f"{output.stem}-run")


def set_up(config: TrainConfig) -> TrainingContext:
    """Check the settings, read the data, load the base and attach the trainable adapter.

    Raises:
        ConfigError: If settings are invalid or contradict each other.
        DatasetError: If images or captions cannot be used.
        BaseModelError: If the base cannot be loaded.
        AdapterFormatError: If an adapter file cannot be read or does not fit the base.
        FamilyMismatchError: If an adapter was made for another model family.
        OutputError: If a file cannot be written.
        TrainingError: If there is nothing to train.
    """
    check_views(config)
    examples, validation_examples = _read_examples(config)
    accelerator = _new_accelerator(config)
    set_seed(config.seed)
    base, cache = _prepare_base(config, accelerator), _new_cache(config)
    initial = _load_initial_adapter(config, base)
    paths, full = _resolve_target_modules(base, config, initial)
    tokens = _add_tokens(base, config)
    captions = CaptionEncoder(base, cache, _make_parser(config, tokens))
    denoiser = Denoiser(base, config.objective, captions.read, text_learns=config.trains_captions)
    check_timesteps(config.objective, denoiser.num_timesteps)
    samples = _make_samples(config, examples, base, cache, accelerator, denoiser.num_timesteps)
    held_out = _encode_held_out(base, config, validation_examples, cache)
    if config.prior.mode == "prediction":
        denoiser.auxiliary_loss = PriorPreservationLoss(captions, config.prior)
    if config.slider.positive:
        denoiser.replacement_loss = ConceptSliderLoss(base, captions, config.slider)
    parameters, callbacks = _attach_adapter(base, config, initial, paths, full, tokens)
    check_trainable(parameters)
    _apply_compute_options(base, config)
    if config.compute.shard:
        shard_base(base, denoiser, parameters, accelerator.num_processes)
    return TrainingContext(
        config=config,
        accelerator=accelerator,
        base=base,
        denoiser=denoiser,
        paths=(*paths, *full),
        parameters=parameters,
        learned_tokens=tokens,
        callbacks=callbacks,
        samples=samples,
        captions=captions,
        held_out=held_out,
        data_hash=data_hash(examples),
        folder=run_folder(config.output),
    )


def _prepare_base(config: TrainConfig, accelerator: Accelerator) -> Base:
    """Load the base, merge `base_adapters` into it, quantize it if requested, and move it to its device."""
    compute = config.compute
    check_quantization_available(compute.quantize)
    quantized = compute.quantize != "none"
    # Load to the CPU before quantizing, so that the device never has to hold the full weights.
    device = torch.device("cpu") if quantized else accelerator.device
    base = load_base(config.base, device=device, precision=torch_dtype(_DTYPE_NAMES[compute.mixed_precision]))
    cast(nn.Module, base.vae).float()
    base = add_base_adapters(base, config.base_adapters)
    return quantize_base(base, compute.quantize, accelerator.device) if quantized else base


def _attach_adapter(
    base: Base,
    config: TrainConfig,
    initial: Adapter | None,
    paths: Sequence[str],
    full: Sequence[str],
    tokens: LearnedTokens | None,
) -> tuple[dict[str, nn.Parameter], MethodCallbacks]:
    """Attach trainable layers to the base; return all trainable parameters and the hooks of the method.

    Raises:
        ConfigError: If the adapter's settings do not fit the modules.
    """
    if initial:
        injected = inject_adapter(base, initial, config.adapter)
    else:
        adapter = AdapterConfig() if config.trains_embeddings_only else config.adapter
        injected = inject(base, paths, adapter, config.seed, full=full, steps=config.steps)
    if tokens is None:
        return injected.parameters, injected.callbacks
    for embedding in tokens.parameters.values():
        embedding.requires_grad_(True)  # injecting the adapter froze all parameters of the text encoders
    callbacks = CallbackList(
        injected.callbacks,
        TextualInversionCallbacks(tokens.parameters, injected.parameters, config.textual_inversion, config.steps),
    )
    return {**injected.parameters, **tokens.parameters}, callbacks


def _resolve_target_modules(
    base: Base, config: TrainConfig, initial: Adapter | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the paths of modules that get adapter layers, and of those that are trained in full.

    Raises:
        ConfigError: If a target pattern matches no module.
    """
    if config.trains_embeddings_only or initial:
        return tuple(initial.layers) if initial else (), ()
    adapter = config.adapter
    unet, text_encoders = adapter.unet_target_modules, adapter.text_encoder_target_modules
    paths = resolve_targets(trainable_paths(base.layout), unet=unet, text_encoders=text_encoders)
    return paths, resolve_modules_to_save(changeable_paths(base.layout), adapter.modules_to_save, paths)


def _load_initial_adapter(config: TrainConfig, base: Base) -> Adapter | None:
    """Load the adapter to continue training from (`adapter.init_from`), if there is one, and check that it fits."""
    path = config.adapter.init_from
    if path is None:
        return None
    adapter = load_adapter(path)
    check_family(adapter.metadata.family, str(path), base_name=base.name, family=base.family.name)
    check_continuable(adapter, str(path))
    check_base_fits(base, Blend(entries=(WeightedAdapter(adapter=adapter, path=path),)))
    has_text_encoder = any(not module.startswith("unet.") for module in adapter.layers)
    if has_text_encoder and not config.adapter.text_encoder_target_modules:
        raise ConfigError(
            f"adapter.init_from: {path} changes text encoders, but adapter.text_encoder_target_modules is empty; set "
            "it to continue training them"
        )
    if config.adapter.text_encoder_target_modules and not has_text_encoder:
        raise ConfigError(
            f"adapter.init_from: {path} changes the UNet only, but adapter.text_encoder_target_modules is set; "
            "set it to []"
        )
    return adapter


def _read_examples(config: TrainConfig) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Read and check the images; return those to train on and those to validate on."""
    examples, validation_examples = _split_examples(config)
    check_captions((*examples, *validation_examples), config)
    check_learned_tokens(examples, config)
    return examples, validation_examples


def _split_examples(config: TrainConfig) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Read the images, and split them into images to train on and images to validate on."""
    if config.validation.folder and config.validation.share:
        raise ConfigError("validation.folder and validation.share are both set; set only one of them")
    examples = read_dataset(config.data)
    if config.validation.folder:
        return examples, read_dataset(config.data.model_copy(update={"folder": config.validation.folder}))
    return split_validation(examples, config.validation.share, config.seed)


def _new_accelerator(config: TrainConfig) -> Accelerator:
    """Make the accelerator, after checking the output, the precision and the trackers."""
    if config.output.suffix != ".safetensors":
        raise ConfigError(
            f"output {str(config.output)!r} does not end in .safetensors, the format that adapters are saved in; "
            "change the suffix"
        )
    precision = config.compute.mixed_precision
    if precision == "fp16" and default_device().type == "cpu":
        raise ConfigError("compute.mixed_precision 'fp16' needs a GPU; on the CPU use 'no' or 'bf16'")
    passes = 2 if config.prior.mode == "pictures" else 1
    accelerator = new_accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation * passes,
        log_with=[check_tracker(name) for name in config.tracking.trackers] or None,
        project_dir=run_folder(config.output) / "logs",
    )
    check_data_parallel(accelerator)
    if accelerator.is_main_process:
        check_writable(config.output)
    return accelerator


def _add_tokens(base: Base, config: TrainConfig) -> LearnedTokens | None:
    """Add the textual-inversion tokens to the base; return None if there are none."""
    settings = config.textual_inversion
    return add_learned_tokens(base, settings, config.seed) if settings.placeholder_tokens else None


def _make_parser(config: TrainConfig, tokens: LearnedTokens | None) -> ReadText:
    """Make the parser of captions, which replaces each learned token by its vectors."""
    parse = caption_parser(config.captions)
    return tokens.wrap_parser(parse) if tokens else parse


def _new_cache(config: TrainConfig) -> Cache:
    """Make the cache for encoded images and captions that `data.cache` selects."""
    if config.data.cache == "disk":
        return DiskCache(config.data.cache_folder or run_folder(config.output) / "cache")
    return MemoryCache() if config.data.cache == "memory" else NoCache()


def _make_samples(
    config: TrainConfig,
    examples: Sequence[Example],
    base: Base,
    cache: Cache,
    accelerator: Accelerator,
    num_timesteps: int,
) -> tuple[TrainingSamples, ...]:
    """Plan the samples of the training images, and those of the class images if there are any."""
    size_px = config.data.resolution or base.size_px
    per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    groups = [(config, examples)]
    if config.prior.mode == "pictures":
        groups.append(_make_class_examples(config, base, size_px, accelerator))

    def plan(config: TrainConfig, examples: Sequence[Example]) -> TrainingSamples:
        buckets = assign_buckets(_read_sizes(examples), config.data, size_px)
        return TrainingSamples(
            config=config,
            examples=examples,
            buckets=buckets,
            encoder=ViewEncoder(base, config.data, cache),
            num_timesteps=num_timesteps,
            order=plan_order(config, examples, buckets, per_step),
        )

    return tuple(plan(*group) for group in groups)


def _make_class_examples(
    config: TrainConfig, base: Base, size_px: int, accelerator: Accelerator
) -> tuple[TrainConfig, Sequence[Example]]:
    """Generate the class images that are missing; return the settings for training on class images, and the images."""
    class_images = class_folder(config.prior, run_folder(config.output))
    share, of = accelerator.process_index, accelerator.num_processes
    make_class_pictures(base, config.prior, class_images, size_px, share=share, of=of)
    accelerator.wait_for_everyone()
    data = DataConfig(folder=class_images, instance_prompt=config.prior.prompt, resolution=config.data.resolution)
    captions = config.captions.model_copy(update={"template": "{caption}"})
    return config.model_copy(update={"data": data, "captions": captions, "seed": config.seed + 1}), read_dataset(data)


def _encode_held_out(base: Base, config: TrainConfig, examples: Sequence[Example], cache: Cache) -> HeldOut | None:
    """Encode the images to validate on; return None if there are none."""
    encoder = ViewEncoder(base, config.data, cache)
    buckets = assign_buckets(_read_sizes(examples), config.data, config.data.resolution or base.size_px)
    views = [
        encoder.encode(example, bucket, seed=0, variant=0) for example, bucket in zip(examples, buckets, strict=True)
    ]
    return HeldOut(views=views, captions=[example.caption for example in examples]) if examples else None


def _read_sizes(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Read the sizes of images from their headers."""
    return [read_size(example.picture) for example in examples]


def _apply_compute_options(base: Base, config: TrainConfig) -> None:
    """Apply the settings that trade time for memory: gradient checkpointing, memory format, compiling, offloading."""
    unet = base.pipe.unet
    if config.compute.gradient_checkpointing:
        unet.enable_gradient_checkpointing(adapter_state_of(base).checkpoint)
        if config.trains_captions:
            for name in base.layout.text_layers:
                getattr(base.pipe, name).activation_checkpointing_enable({"use_reentrant": False})
    if config.compute.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.compute.compile:
        unet.compile()
    if config.compute.offload:
        offload(base, list_idle_models(base, text_encoders_learn=config.trains_captions))
