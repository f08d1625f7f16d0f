"""The settings of a training run, in sections: one for each part of the loop that reads it.

Defaults suit Stable Diffusion 1.x at 512 pixels on a GPU and a style of ten to fifty pictures; `defaults.py` has
what other families and purposes change. Each docstring says what the value does and why it is what it is.
"""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lora_diffusion.config.adapter import PRODUCT_KINDS, PRUNING_KINDS, AboveZero, AdapterConfig, NotNegative, Share
from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from lora_diffusion.config.optimizer import OptimizerConfig
from lora_diffusion.config.settings import EMBEDDED_BASE, Positive, Precision, Quantization, Settings
from lora_diffusion.config.textual_inversion import SliderConfig, TextualInversionConfig

Count = Annotated[int, Field(ge=0)]


class DataConfig(Settings):
    """Which pictures, and how they are cut."""

    shorthand: ClassVar[str] = "folder"
    """`data = "pictures"` stands for a section with nothing but this."""
    folder: Path
    """Pictures with captions: .txt or .caption files beside them, metadata.jsonl, or kohya's folders named `N_what`."""
    instance_prompt: str = ""
    """Caption of pictures that have none, such as `photo of sks dog`; if left out, they are an error."""
    repeats: Positive = 1
    """How often each picture comes in one pass over the data, times what its folder's name says."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Side of the square whose area every bucket has; the base's own if left out."""
    buckets: bool = True
    """Keep each picture's shape, roughly: cut it to the nearest of several sizes of one area; else to a square."""
    bucket_step: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Sides of buckets are multiples of this; an eighth of the resolution if left out, as 64 is of 512."""
    largest_aspect: Annotated[float, Field(ge=1, le=4)] = 2.0
    """Longest side over shortest side of any bucket."""
    crop: Literal["center", "random"] = "center"
    """What is kept of a picture that does not have its bucket's shape. Random cuts make a small set go further."""
    crop_zoom: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Random cuts are enlarged by up to this, so that square pictures have something to cut too."""
    flip: bool = False
    """Mirror every other view. Off, as faces, text and anything with a left and a right suffer."""
    color_jitter: Share = 0.0
    """Largest change of brightness, contrast and saturation, as a share."""
    variants: Positive = 1
    """Different views (crop, flip, colors) of each picture that are encoded and cached, taken in turn."""
    masks: Literal["none", "file", "alpha"] = "none"
    """Where the loss counts: `a.mask.png` beside `a.png` (white counts), or the picture's own alpha."""
    mask_floor: Share = 0.0
    """What unmasked parts count, against 1 for masked ones."""
    cache: Literal["memory", "disk", "none"] = "memory"
    """Where encoded pictures and captions are kept; `none` encodes at each step, with a new view each time."""
    cache_folder: Path | None = None
    """Folder of a disk cache; in the run's folder if left out. Entries are named by content, so none goes stale."""


class CaptionConfig(Settings):
    """What becomes of a caption before a step sees it."""

    template: str = "{caption}"
    """Wording around each caption, which {caption} stands for; {trigger} stands for the trigger words."""
    weights: bool = False
    """Read `(word:1.3)` and BREAK in captions as prompts have them. Off, as tags such as `saber (fate)` mean their
    brackets; long captions are read whole either way."""
    shuffle: bool = False
    """Put the parts of a caption in a new order each time."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """What parts of a caption are divided by."""
    keep_tokens: Count = 0
    """Number of leading tags that are never shuffled or dropped."""
    tag_dropout: Share = 0.0
    """Probability of dropping each other tag."""
    dropout: Share = 0.05
    """Chance that the whole caption is replaced by the empty one, which keeps classifier-free guidance working."""

    @field_validator("template")
    @classmethod
    def check_placeholders(cls, template: str) -> str:
        """Refuse unknown placeholders."""
        unknown = sorted(set(re.findall(r"{[^{}]*}", template)) - {"{caption}", "{trigger}"})
        if unknown:
            raise ValueError(f"{', '.join(unknown)} stands for nothing; known are {{caption}} and {{trigger}}")
        return template


class ObjectiveConfig(Settings):
    """What a step minimizes."""

    prediction: Literal["base", "epsilon", "v"] = "base"
    """What the UNet predicts; `base` is what the base was trained for."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise [arXiv 2305.08891]; needs v-prediction."""
    loss: Literal["mse", "huber", "smooth-l1", "l1"] = "mse"
    """Distance of prediction and target; huber and smooth-l1 forgive outliers."""
    huber_delta: AboveZero = 0.1
    """Where huber and smooth-l1 turn from square to linear, in units of the noise."""
    huber_schedule: Literal["constant", "snr", "exponential"] = "snr"
    """How that point moves: `snr` and `exponential` go from 1 in clean pictures to huber_delta in noise
    [arXiv 2403.16728]."""
    weighting: Literal["none", "min-snr", "debiased"] = "none"
    """Weight of a timestep: none, min-SNR [arXiv 2303.09556] or debiased [arXiv 2310.08442]."""
    min_snr_gamma: AboveZero = 5.0
    """The gamma of min-SNR; 5 is the paper's."""
    timesteps: Literal["uniform", "logit-normal", "content", "style"] = "uniform"
    """How timesteps are drawn: logit-normal leans to the middle [arXiv 2403.03206], content to high noise, style to low
    [arXiv 2302.08453]."""
    first_timestep: Count = 0
    """Lowest timestep drawn."""
    last_timestep: Count | None = None
    """Highest timestep drawn; the schedule's last if left out."""
    noise_offset: NotNegative = 0.0
    """Size of a shift per channel that is added to the noise, for very dark or bright pictures; 0.05 is mild."""
    pyramid_discount: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Noise of lower resolutions is added, each level by this factor weaker; 0 for none, 0.3 is common."""
    pyramid_levels: Annotated[int, Field(ge=1, le=12)] = 6
    """How many of them at most; a level of one pixel is the last."""
    input_perturbation: NotNegative = 0.0
    """Extra noise in the input that the target does not know of [arXiv 2301.11706]; 0.1 is the paper's."""


class PriorConfig(Settings):
    """What keeps the base's own knowledge."""

    mode: Literal["none", "pictures", "prediction"] = "none"
    """`pictures`: train on pictures of the class as well, made by the base where they are missing (DreamBooth).
    `prediction`: pull towards the frozen base's own prediction on other prompts, which needs no pictures."""
    weight: NotNegative = 1.0
    """Of this loss against the pictures' own."""
    prompt: str = ""
    """What class pictures show, such as `photo of a dog`."""
    folder: Path | None = None
    """Class pictures; in the run's folder if left out."""
    count: Positive = 100
    """How many there should be; missing ones are made."""
    guidance_scale: NotNegative = 7.5
    """Classifier-free guidance for making them."""
    num_inference_steps: Positive = 25
    """Denoising steps for making them."""
    prompts: tuple[str, ...] = ()
    """Prompts for `prediction`; the class prompt, or else the empty one, if none is given."""


class ValidationConfig(Settings):
    """How a run tells whether it still gets better."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the pictures that is held out; they are never trained on."""
    folder: Path | None = None
    """Held-out pictures of their own, read as the training data are."""
    every: Positive = 100
    """Optimizer steps between validations."""
    draws: Positive = 8
    """Timesteps per picture, spread over the schedule, each with fixed noise."""
    base_prompts: tuple[str, ...] = ()
    """Prompts on which the drift from the frozen base is measured."""
    patience: Count = 0
    """Stop after so many validations without a better one; 0 never stops early."""
    keep_best: bool = True
    """Write the adapter of the best validation rather than the last one."""


class SamplesConfig(Settings):
    """Pictures on the way."""

    prompts: tuple[str, ...] = ()
    """What they show; none are made without prompts."""
    every: Positive = 100
    """Optimizer steps between rows of the contact sheet."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of each picture."""
    num_inference_steps: Positive = DEFAULT_NUM_INFERENCE_STEPS
    """Denoising steps."""
    guidance_scale: NotNegative = DEFAULT_GUIDANCE_SCALE
    """Classifier-free guidance scale."""


class ComputeConfig(Settings):
    """What a step costs."""

    mixed_precision: Precision = "no"
    """Accelerate's mixed precision; trainable parameters are float32 always."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, a third to a half less memory."""
    offload: bool = False
    """Keep the autoencoder and frozen text encoders in the processor's memory while nothing is encoded: two gigabytes
    of an SDXL base, at the price of moving them for each picture or caption that is not in the cache."""
    shard: bool = False
    """Share out the frozen UNet's weights among the processes of `accelerate launch`, for a base too large for one GPU;
    each block is gathered as it works, which costs time."""
    quantize: Quantization = "none"
    """Keep the frozen UNet's linear layers in four or eight bits [QLoRA, arXiv 2305.14314]: a quarter or half of their
    memory, at the price of time and of some of the base's precision. Needs bitsandbytes."""
    compile: bool = False
    """`torch.compile` for the UNet."""
    channels_last: bool = False
    """Channels-last layout for the UNet, faster for convolutions on recent GPUs."""


class TrackingConfig(Settings):
    """What is kept of a run besides the adapter."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where curves go while a run goes on; in `logs` in the run's folder."""
    project: str = "lora_diffusion"
    """Name of the project there."""
    report: bool = True
    """Write `report.html` at the end."""


class TrainConfig(Settings):
    """One training run, as read from a TOML file."""

    output: Path
    """The adapter file to write (.safetensors). What else a run keeps lies beside it, in `NAME-run`."""
    base: str = EMBEDDED_BASE
    """Base to train on: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    name: str = ""
    """Name of the adapter; the output's file name if empty."""
    trigger_words: tuple[str, ...] = ()
    """Words that call the adapter in a prompt; recorded in the file."""
    base_adapters: dict[Path, float] = Field(default_factory=dict[Path, float])
    """Adapter files merged into the base before training, with weights, such as `{ "gloop.safetensors" = 0.8 }`."""
    steps: Positive = 1500
    """Optimizer steps."""
    batch_size: Positive = 1
    """Pictures per step and process."""
    gradient_accumulation: Positive = 1
    """Batches whose gradients are summed into one optimizer step."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, data order, noise and dropout."""
    save_every: Count = 0
    """Optimizer steps between intermediate adapters (`name-step00000100.safetensors`); 0 for none."""
    save_precision: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type of the saved factors."""
    state_every: Count = 200
    """Optimizer steps between states that a stopped run goes on from; 0 for none."""
    resume: bool = True
    """Go on from the last state of an unfinished run of the same settings, if there is one."""
    data: DataConfig
    captions: CaptionConfig = Field(default_factory=CaptionConfig)  # made when asked for, which help never does
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
                "slider and trained text encoders or tokens do not go together, as frozen encoders read its prompts; "
                "empty adapter.text_encoder_target_modules and "
                "textual_inversion.placeholder_tokens"
            )
        plain = self.adapter.kind in PRODUCT_KINDS and not self.adapter.use_dora and not self.adapter.modules_to_save
        if not plain or self.adapter.init_from:
            raise ValueError(
                "slider weighs a product of factors with a sign; set adapter.kind to lora, and leave out use_dora, "
                "modules_to_save and init_from"
            )
        idle = {
            "objective.loss": self.objective.loss != "mse",
            "objective.weighting": self.objective.weighting != "none",
            "objective.input_perturbation": bool(self.objective.input_perturbation),
            "data.masks": self.data.masks != "none",
        }
        told = [name for name, given in idle.items() if given]
        if told:
            raise ValueError(f"slider has a loss of its own, which knows no {told[0]}; leave {told[0]} out")
        if self.prior.mode != "none":
            raise ValueError(
                "slider and prior do not go together, as a slider learns from the frozen base anyway; set prior.mode "
                "to none"
            )
        return self

    @model_validator(mode="after")
    def check_parameter_edits(self) -> "TrainConfig":
        """Refuse parameter averages and a late start where a method edits its parameters during training."""
        optimizer, cut = self.optimizer, self.adapter.kind in PRUNING_KINDS
        editing = {
            f"adapter.kind '{self.adapter.kind}'": cut,
            "adapter.max_delta_norm": self.adapter.max_delta_norm is not None,
            "textual_inversion.placeholder_tokens": bool(self.textual_inversion.placeholder_tokens),
        }
        edits = next((name for name, given in editing.items() if given), "")
        if optimizer.kind == "schedule-free" and edits:
            raise ValueError(
                f"optimizer.kind 'schedule-free' saves a mean over steps, in which what {edits} takes away comes back; "
                "set optimizer.kind to adamw"
            )
        if optimizer.ema_decay and cut:
            raise ValueError(
                f"optimizer.ema_decay and adapter.kind '{self.adapter.kind}' do not go together, as directions that "
                "are taken away live on in a mean; set ema_decay to 0"
            )
        if self.textual_inversion.start_adapter_at and cut and not self.trains_embeddings_only:
            raise ValueError(
                f"textual_inversion.start_adapter_at and adapter.kind '{self.adapter.kind}' do not go together, as "
                "both schedule the beginning of the run; set start_adapter_at to 0, or adapter.kind to lora"
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
        return {DataConfig.shorthand: value} if isinstance(value, str | Path) else value
