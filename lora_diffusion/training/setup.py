"""Everything that a run needs, made before its first step, where most of what can be wrong shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
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
from lora_diffusion.training.base_adapters import add_base_adapters
from lora_diffusion.training.checks import check_trainable
from lora_diffusion.training.diffusion.timesteps import check_timesteps
from lora_diffusion.training.input_checks import check_captions, check_learned_tokens, check_tracker, check_views
from lora_diffusion.training.inputs.cache import Cache, DiskCache, MemoryCache, NoCache
from lora_diffusion.training.inputs.captions import CaptionEncoder
from lora_diffusion.training.inputs.latents import ViewEncoder
from lora_diffusion.training.inputs.samples import TrainingSamples, plan_order
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

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """What a run is about."""

    config: TrainConfig
    accelerator: Accelerator
    base: Base
    denoiser: Denoiser
    paths: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]
    """All that learns."""
    words: LearnedTokens | None
    rules: MethodCallbacks
    """What the method does from step to step."""
    samples: tuple[TrainingSamples, ...]
    """Those of the pictures, and of class pictures if there are any."""
    captions: CaptionEncoder
    held_out: HeldOut | None
    data_hash: str
    folder: Path
    """Where states, log and pictures of the run are kept."""


def run_folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}-run")


def set_up(config: TrainConfig) -> TrainingContext:
    """Read the data, load the base, put the adapter in. Raises LoRADiffusionError's children for what cannot work."""
    check_views(config)
    examples, validation = split_examples(config)
    check_captions((*examples, *validation), config)
    check_learned_tokens(examples, config)
    accelerator = new_accelerator(config)
    check_data_parallel(accelerator)
    if accelerator.is_main_process:
        check_writable(config.output)
    set_seed(config.seed)
    base = prepare_base(config, accelerator)
    folder, cache = run_folder(config.output), new_cache(config)
    begun = load_initial_adapter(config, base)
    paths, full = resolve_target_modules(base, config, begun)
    words = add_learned_tokens(base, config.words, config.seed) if config.words.words else None
    read = words.wrap_parser(caption_parser(config.captions)) if words else caption_parser(config.captions)
    captions = CaptionEncoder(base, cache, read)
    denoiser = Denoiser(base, config.objective, captions.read, text_learns=config.trains_captions)
    check_timesteps(config.objective, denoiser.num_timesteps)
    per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    size_px = config.data.resolution or base.size_px
    groups = [(config, examples)]
    if config.prior.mode == "pictures":
        groups.append(make_class_samples(config, base, folder, size_px, accelerator))
    samples = tuple(make_training_samples(base, one, some, cache, denoiser, size_px, per_step) for one, some in groups)
    views = ViewEncoder(base, config.data, cache)
    sized = zip(validation, assign_buckets(read_sizes(validation), config.data, size_px), strict=True)
    encoded = [views.encode(example, bucket, seed=0, variant=0) for example, bucket in sized]
    if config.prior.mode == "prediction":
        denoiser.auxiliary_loss = PriorPreservationLoss(captions, config.prior)
    if config.slider.positive:
        denoiser.replacement_loss = ConceptSliderLoss(base, captions, config.slider)
    parameters, rules = attach_adapter(base, config, begun, paths, full, words)
    check_trainable(parameters)
    apply_compute_options(base, config)
    if config.compute.shard:
        shard_base(base, denoiser, parameters, accelerator.num_processes)
    return TrainingContext(
        config=config,
        accelerator=accelerator,
        base=base,
        denoiser=denoiser,
        paths=(*paths, *full),
        parameters=parameters,
        words=words,
        rules=rules,
        samples=samples,
        captions=captions,
        held_out=HeldOut(views=encoded, captions=[e.caption for e in validation]) if validation else None,
        data_hash=data_hash(examples),
        folder=folder,
    )


def prepare_base(config: TrainConfig, accelerator: Accelerator) -> Base:
    """The base as it is trained on: on its device, with what it is to stand on top of, quantized if asked for.

    Raises LoRADiffusionError's children.
    """
    compute = config.compute
    check_quantization_available(compute.quantize)
    whole = compute.quantize == "none"  # else the device is to hold quantized weights only
    device = accelerator.device if whole else torch.device("cpu")
    base = load_base(config.base, device=device, precision=torch_dtype(PRECISIONS[compute.mixed_precision]))
    base.pipe.vae.float()
    base = add_base_adapters(base, config.on_top_of)
    return base if whole else quantize_base(base, compute.quantize, accelerator.device)


def attach_adapter(
    base: Base,
    config: TrainConfig,
    begun: Adapter | None,
    paths: Sequence[str],
    full: Sequence[str],
    words: LearnedTokens | None,
) -> tuple[dict[str, nn.Parameter], MethodCallbacks]:
    """All that learns, put on the base, and what happens to it from step to step. Raises ConfigError."""
    if begun:
        injected = inject_adapter(base, begun, config.adapter)
    else:
        adapter = AdapterConfig() if config.trains_embeddings_only else config.adapter
        injected = inject(base, paths, adapter, config.seed, full=full, steps=config.steps)
    if words is None:
        return injected.parameters, injected.rules
    for vectors in words.parameters.values():
        vectors.requires_grad_(True)  # which freezing the text encoders took
    both = CallbackList(
        injected.rules, TextualInversionCallbacks(words.parameters, injected.parameters, config.words, config.steps)
    )
    return {**injected.parameters, **words.parameters}, both


def resolve_target_modules(
    base: Base, config: TrainConfig, begun: Adapter | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules that get factors, and those that are trained in full. Raises ConfigError."""
    if config.trains_embeddings_only or begun:
        return tuple(begun.layers) if begun else (), ()
    adapter = config.adapter
    unet, text_encoders = adapter.unet_targets, adapter.text_encoder_targets
    paths = resolve_targets(trainable_paths(base.layout), unet=unet, text_encoders=text_encoders)
    return paths, resolve_modules_to_save(changeable_paths(base.layout), adapter.full_targets, paths)


def load_initial_adapter(config: TrainConfig, base: Base) -> Adapter | None:
    """The adapter that the run goes on from, if any. Raises LoRADiffusionError's children."""
    path = config.adapter.begin_with
    if path is None:
        return None
    adapter = load_adapter(path)
    check_family(adapter.metadata.family, str(path), base_name=base.name, family=base.family.name)
    check_continuable(adapter, str(path))
    check_base_fits(base, Blend(entries=(WeightedAdapter(adapter=adapter, path=path),)))
    learns = any(not module.startswith("unet.") for module in adapter.layers)
    if learns and not config.adapter.text_encoder_targets:
        raise ConfigError(f"adapter.begin_with: {path} changes text encoders; name adapter.text_encoder_targets too")
    if config.adapter.text_encoder_targets and not learns:
        raise ConfigError(f"adapter.begin_with: {path} changes the UNet alone; set adapter.text_encoder_targets to []")
    return adapter


def split_examples(config: TrainConfig) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Pictures to train on and pictures held out. Raises DatasetError, ConfigError."""
    if config.validation.folder and config.validation.share:
        raise ConfigError("validation takes a folder or a share of the pictures; give one of them")
    examples = read_dataset(config.data)
    if config.validation.folder:
        return examples, read_dataset(config.data.model_copy(update={"folder": config.validation.folder}))
    return split_validation(examples, config.validation.share, config.seed)


def new_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ConfigError for what would fail after the work is done."""
    if config.output.suffix != ".safetensors":
        raise ConfigError(f"output {str(config.output)!r} does not end in .safetensors; adapters are saved as such")
    precision = config.compute.mixed_precision
    if precision == "fp16" and default_device().type == "cpu":
        raise ConfigError("mixed_precision 'fp16' needs a GPU; on the CPU use 'no' or 'bf16'")
    AcceleratorState._reset_state()  # it keeps the precision of an earlier run in this process
    passes = 2 if config.prior.mode == "pictures" else 1
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation * passes,
        log_with=[check_tracker(name) for name in config.tracking.trackers] or None,
        project_dir=run_folder(config.output) / "logs",
    )


def new_cache(config: TrainConfig) -> Cache:
    if config.data.cache == "disk":
        return DiskCache(config.data.cache_folder or run_folder(config.output) / "cache")
    return MemoryCache() if config.data.cache == "memory" else NoCache()


def make_class_samples(
    config: TrainConfig, base: Base, folder: Path, size_px: int, accelerator: Accelerator
) -> tuple[TrainConfig, tuple[Example, ...]]:
    """Class pictures, made where they are missing, with settings of their own."""
    place = class_folder(config.prior, folder)
    share, of = accelerator.process_index, accelerator.num_processes
    make_class_pictures(base, config.prior, place, size_px, share=share, of=of)
    accelerator.wait_for_everyone()
    data = DataConfig(folder=place, instance_prompt=config.prior.prompt, resolution=config.data.resolution)
    plain = config.captions.model_copy(update={"template": "{caption}"})
    return config.model_copy(update={"data": data, "captions": plain, "seed": config.seed + 1}), read_dataset(data)


def make_training_samples(
    base: Base,
    config: TrainConfig,
    examples: Sequence[Example],
    cache: Cache,
    denoiser: Denoiser,
    size_px: int,
    per_step: int,
) -> TrainingSamples:
    buckets = assign_buckets(read_sizes(examples), config.data, size_px)
    return TrainingSamples(
        config=config,
        examples=examples,
        buckets=buckets,
        encoder=ViewEncoder(base, config.data, cache),
        num_timesteps=denoiser.num_timesteps,
        order=plan_order(config, examples, buckets, per_step),
    )


def read_sizes(examples: Sequence[Example]) -> list[tuple[int, int]]:
    return [read_size(example.picture) for example in examples]


def apply_compute_options(base: Base, config: TrainConfig) -> None:
    """What costs time or memory at each step."""
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
