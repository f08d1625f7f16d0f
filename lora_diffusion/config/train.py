"""Settings of a training run, in the sections of its TOML file.

The defaults suit a style of 10 to 50 images on Stable Diffusion 1.x at 512 pixels; `defaults.py` has the defaults for
other families, purposes and GPUs.
"""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from lora_diffusion.config.adapter import PRODUCT_KINDS, PRUNING_KINDS, AboveZero, AdapterConfig, NotNegative, Share
from lora_diffusion.config.defaults import AdapterOutput, ClassPrompt, InstancePrompt, TriggerWords
from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from lora_diffusion.config.optimizer import OptimizerConfig
from lora_diffusion.config.settings import EMBEDDED_BASE, BaseName, Positive, Precision, Quantization, Settings
from lora_diffusion.config.textual_inversion import SliderConfig, TextualInversionConfig

Count = Annotated[int, Field(ge=0)]


class DataConfig(Settings):
    """Training images and captions, and how images are cropped."""

    shorthand: ClassVar[str] = "folder"
    """The setting that `data = "pictures"` stands for."""
    folder: Path
    """Folder of images with captions: .txt or .caption files, metadata.jsonl, or kohya's folders `REPEATS_CAPTION`."""
    instance_prompt: InstancePrompt = ""
    repeats: Positive = 1
    """Repeats of each image per epoch, multiplied by those in the name of its kohya folder."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Resolution in pixels: buckets have the area of a square of this size; the base's native one by default."""
    buckets: bool = True
    """Aspect-ratio bucketing: crop each image to the nearest of several sizes of equal area; else to a square."""
    bucket_step: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Bucket sizes are multiples of this; an eighth of the resolution by default, such as 64 for 512."""
    max_aspect_ratio: Annotated[
        float, Field(ge=1, le=4, validation_alias=AliasChoices("max_aspect_ratio", "largest_aspect"))
    ] = 2.0
    """Maximum aspect ratio of a bucket, long side over short side."""
    crop: Literal["center", "random"] = "center"
    """Position of the crop in images that do not have the shape of their bucket; random crops augment small sets."""
    crop_zoom: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Random crops are zoomed in by up to this factor, so that images with the bucket's shape vary too."""
    flip: bool = False
    """Flip every second view of an image horizontally; harmful for faces, text and everything asymmetric."""
    color_jitter: Share = 0.0
    """Maximum relative change of brightness, contrast and saturation."""
    variants: Positive = 1
    """Number of augmented versions (crop, flip, color) of each image that are cached and used in turn."""
    masks: Literal["none", "file", "alpha"] = "none"
    """Masked loss: `file` reads `a.mask.png` beside `a.png` (white counts), `alpha` the image's alpha channel."""
    mask_floor: Share = 0.0
    """Weight of the loss outside the mask, compared with 1 inside."""
    cache: Literal["memory", "disk", "none"] = "memory"
    """Cache of encoded images and captions; `none` encodes them at each step, with new augmentation each time."""
    cache_folder: Path | None = None
    """Folder of the disk cache; in the run's folder by default. Entries are named by content and never stale."""


class CaptionConfig(Settings):
    """How captions are changed before they are encoded."""

    template: str = "{caption}"
    """Template of captions, where {caption} is the caption and {trigger} the trigger words."""
    weights: bool = False
    """Interpret `(word:1.3)` and BREAK in captions as in prompts; off, because tags such as `saber (fate)` contain
    parentheses. Captions longer than 75 tokens are encoded in full either way."""
    shuffle: bool = False
    """Shuffle the tags of a caption at each step."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """Separator of the tags of a caption."""
    keep_tokens: Count = 0
    """Number of leading tags that are never shuffled or dropped."""
    tag_dropout: Share = 0.0
    """Probability of dropping each of the other tags."""
    dropout: Share = 0.05
    """Probability of replacing the caption by the empty one, which preserves classifier-free guidance."""

    @field_validator("template")
    @classmethod
    def check_placeholders(cls, template: str) -> str:
        """Refuse unknown placeholders."""
        unknown = sorted(set(re.findall(r"{[^{}]*}", template)) - {"{caption}", "{trigger}"})
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not a placeholder; use {{caption}} and {{trigger}}")
        return template


class ObjectiveConfig(Settings):
    """Loss, noise and timesteps."""

    prediction: Literal["base", "epsilon", "v"] = "base"
    """Prediction type of the UNet; `base` is that of the base."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule to zero terminal SNR [arXiv 2305.08891]; needs v-prediction."""
    loss: Literal["mse", "huber", "smooth-l1", "l1"] = "mse"
    """Loss between prediction and target; huber and smooth-l1 are robust to outliers."""
    huber_delta: AboveZero = 0.1
    """Error at which huber and smooth-l1 turn from quadratic to linear, in units of the noise."""
    huber_schedule: Literal["constant", "snr", "exponential"] = "snr"
    """How huber_delta depends on the timestep: `snr` and `exponential` go from 1 without noise to huber_delta at full
    noise [arXiv 2403.16728]."""
    weighting: Literal["none", "min-snr", "debiased"] = "none"
    """Weighting of the loss by timestep: none, min-SNR [arXiv 2303.09556] or debiased [arXiv 2310.08442]."""
    min_snr_gamma: AboveZero = 5.0
    """Gamma of min-SNR weighting; the paper recommends 5."""
    timesteps: Literal["uniform", "logit-normal", "content", "style"] = "uniform"
    """Distribution of timesteps: logit-normal prefers the middle [arXiv 2403.03206], content high noise and style low
    noise [arXiv 2302.08453]."""
    first_timestep: Count = 0
    """Lowest timestep to sample."""
    last_timestep: Count | None = None
    """Highest timestep to sample; the last one of the schedule by default."""
    noise_offset: NotNegative = 0.0
    """Noise offset: scale of a random shift per channel, for very dark or bright images; 0.05 is mild."""
    pyramid_discount: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pyramid noise: factor by which each level of lower-resolution noise is weaker; 0 for none, 0.3 is common."""
    pyramid_levels: Annotated[int, Field(ge=1, le=12)] = 6
    """Maximum number of levels of pyramid noise."""
    input_perturbation: NotNegative = 0.0
    """Input perturbation: scale of extra noise in the input only [arXiv 2301.11706]; the paper uses 0.1."""


class PriorConfig(Settings):
    """Prior preservation: how the base's knowledge of the class is kept."""

    mode: Literal["none", "pictures", "prediction"] = "none"
    """`pictures`: also train on class images, which the base generates where they are missing (DreamBooth).
    `prediction`: keep the predictions for other prompts close to those of the frozen base, without class images."""
    weight: NotNegative = 1.0
    """Weight of this loss, compared with 1 for the training images."""
    prompt: ClassPrompt = ""
    folder: Path | None = None
    """Folder of class images; in the run's folder by default."""
    count: Positive = 100
    """Number of class images; missing ones are generated."""
    guidance_scale: NotNegative = 7.5
    """Classifier-free guidance scale for generating class images."""
    num_inference_steps: Positive = 25
    """Number of denoising steps for generating class images."""
    prompts: tuple[str, ...] = ()
    """Prompts for `prediction`; by default the class prompt, or the empty one without a class prompt."""


class ValidationConfig(Settings):
    """Validation during training, and early stopping."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the images that is held out for validation and never trained on."""
    folder: Path | None = None
    """Folder of validation images with captions, instead of held-out training images."""
    every: Positive = 100
    """Optimizer steps between validations."""
    draws: Positive = 8
    """Timesteps per image, spread over the schedule, each with fixed noise."""
    base_prompts: tuple[str, ...] = ()
    """Prompts on which the drift of the predictions from the frozen base is measured."""
    patience: Count = 0
    """Stop after this many validations without improvement; 0 never stops early."""
    keep_best: bool = True
    """Save the adapter with the best validation loss rather than the last one."""


class SamplesConfig(Settings):
    """Sample images during training."""

    prompts: tuple[str, ...] = ()
    """Prompts of the sample images; none are generated without prompts."""
    every: Positive = 100
    """Optimizer steps between samples, which are the rows of a contact sheet."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of each sample image."""
    num_inference_steps: Positive = DEFAULT_NUM_INFERENCE_STEPS
    """Number of denoising steps."""
    guidance_scale: NotNegative = DEFAULT_GUIDANCE_SCALE
    """Classifier-free guidance scale."""


class ComputeConfig(Settings):
    """Precision, memory and speed."""

    mixed_precision: Precision = "no"
    """Mixed precision (Accelerate); trainable parameters are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, with a third to a half less memory."""
    offload: bool = False
    """Keep the VAE and frozen text encoders in CPU memory while nothing is encoded: saves 2 GB of GPU memory with SDXL,
    but moves them for each image or caption that is not in the cache."""
    shard: bool = False
    """Shard the frozen UNet over the processes of `accelerate launch`, for a base too large for one GPU; slower, as
    each block's weights are gathered when they are needed."""
    quantize: Quantization = "none"
    """Quantize the frozen UNet's linear layers to 4 or 8 bits [QLoRA, arXiv 2305.14314]: a quarter or half of their
    memory, but slower and less precise. Needs bitsandbytes."""
    compile: bool = False
    """Compile the UNet with `torch.compile`."""
    channels_last: bool = False
    """Channels-last memory format of the UNet; faster convolutions on recent GPUs."""


class TrackingConfig(Settings):
    """Logs and report of a run."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Trackers that receive the training curves; TensorBoard writes to `logs` in the run's folder."""
    project: str = "lora_diffusion"
    """Name of the project in the tracker."""
    report: bool = True
    """Write `report.html` to the run's folder at the end."""


class TrainConfig(Settings):
    """Settings of a training run."""

    output: AdapterOutput
    base: BaseName = EMBEDDED_BASE
    name: str = ""
    """Name of the adapter; the output's file name by default."""
    trigger_words: TriggerWords = ()
    base_adapters: dict[Path, float] = Field(default_factory=dict[Path, float])
    """Adapter files merged into the base before training, with weights, such as `{ "gloop.safetensors" = 0.8 }`."""
    steps: Positive = 1500
    """Number of optimizer steps."""
    batch_size: Positive = 1
    """Images per process and forward pass."""
    gradient_accumulation: Positive = 1
    """Number of batches whose gradients are accumulated for one optimizer step."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed for initial weights, data order, noise and dropout."""
    save_every: Count = 0
    """Optimizer steps between intermediate adapter files (`name-step00000100.safetensors`); 0 for none."""
    save_precision: Literal["float32", "float16", "bfloat16"] = "float16"
    """Dtype of the saved tensors."""
    state_every: Count = 200
    """Optimizer steps between saved training states, from which a stopped run continues; 0 for none."""
    resume: bool = True
    """Continue from the last state of an unfinished run with the same settings, if there is one."""
    data: DataConfig
    captions: CaptionConfig = Field(default_factory=CaptionConfig)  # made on demand, which keeps help fast
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    textual_inversion: TextualInversionConfig = Field(default_factory=TextualInversionConfig)
    slider: SliderConfig = Field(default_factory=SliderConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    prior: PriorConfig = Field(default_factory=PriorConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def check_slider(self) -> "TrainConfig":
        """Refuse settings that a concept slider cannot be combined with."""
        if not self.slider.positive:
            return self
        if self.trains_captions:
            raise ValueError(
                "slider cannot be combined with trained text encoders or tokens; set "
                "adapter.text_encoder_target_modules and textual_inversion.placeholder_tokens to []"
            )
        plain = self.adapter.kind in PRODUCT_KINDS and not self.adapter.use_dora and not self.adapter.modules_to_save
        if not plain or self.adapter.init_from:
            raise ValueError(
                "slider supports plain low-rank adapters only, whose delta is proportional to the weight; set "
                "adapter.kind to lora, and leave out use_dora, modules_to_save and init_from"
            )
        unsupported = {
            "objective.loss": self.objective.loss != "mse",
            "objective.weighting": self.objective.weighting != "none",
            "objective.input_perturbation": bool(self.objective.input_perturbation),
            "data.masks": self.data.masks != "none",
        }
        used = [name for name, given in unsupported.items() if given]
        if used:
            raise ValueError(f"slider has its own loss, which does not support {used[0]}; leave {used[0]} out")
        if self.prior.mode != "none":
            raise ValueError(
                "slider and prior cannot be combined, because a slider is trained on the frozen base's predictions "
                "already; set prior.mode to none"
            )
        return self

    @model_validator(mode="after")
    def check_parameter_edits(self) -> "TrainConfig":
        """Refuse parameter averages and a late start where a method edits its parameters during training."""
        optimizer, prunes = self.optimizer, self.adapter.kind in PRUNING_KINDS
        editing = {
            f"adapter.kind '{self.adapter.kind}'": prunes,
            "adapter.max_delta_norm": self.adapter.max_delta_norm is not None,
            "textual_inversion.placeholder_tokens": bool(self.textual_inversion.placeholder_tokens),
        }
        edits = next((name for name, given in editing.items() if given), "")
        if optimizer.kind == "schedule-free" and edits:
            raise ValueError(
                f"optimizer.kind 'schedule-free' cannot be combined with {edits}, because it saves an average over "
                "steps, which would undo that; set optimizer.kind to adamw"
            )
        if optimizer.ema_decay and prunes:
            raise ValueError(
                f"optimizer.ema_decay and adapter.kind '{self.adapter.kind}' cannot be combined, because pruned "
                "directions would remain in the average; set ema_decay to 0"
            )
        if self.textual_inversion.start_adapter_at and prunes and not self.trains_embeddings_only:
            raise ValueError(
                f"textual_inversion.start_adapter_at and adapter.kind '{self.adapter.kind}' cannot be combined, "
                "because both schedule the beginning of the run; set start_adapter_at to 0, or adapter.kind to lora"
            )
        return self

    @model_validator(mode="after")
    def check_quantization(self) -> "TrainConfig":
        """Refuse quantized weights for a method that needs the full ones."""
        adapter, quantization = self.adapter, self.compute.quantize
        if quantization == "none":
            return self
        needs = {
            "adapter.use_dora": adapter.use_dora,
            f"adapter.kind '{adapter.kind}'": adapter.kind not in PRODUCT_KINDS,
            f"adapter.init_weights '{adapter.init_weights}'": adapter.init_weights == "pissa",
            "adapter.modules_to_save": bool(adapter.modules_to_save),
            "adapter.init_from": adapter.init_from is not None,
            "compute.shard": self.compute.shard,
        }
        wanted = [name for name, given in needs.items() if given]
        if wanted:
            raise ValueError(
                f"compute.quantize '{quantization}' quantizes the base's weights, and {wanted[0]} needs them "
                "unquantized; leave one out"
            )
        return self

    @property
    def trains_captions(self) -> bool:
        """Whether the encoding of captions changes during training."""
        return bool(self.adapter.trains_text_encoder or self.textual_inversion.placeholder_tokens)

    @property
    def trains_embeddings_only(self) -> bool:
        """Whether only token embeddings are trained, without an adapter."""
        return bool(self.textual_inversion.placeholder_tokens) and self.textual_inversion.start_adapter_at == 1

    @field_validator("data", mode="before")
    @classmethod
    def accept_folder(cls, value: object) -> object:
        """Accept a folder alone as the data section."""
        return {DataConfig.shorthand: value} if isinstance(value, str | Path) else value
