"""Load Stable Diffusion base models and look up their modules, schedulers and settings.

This is the layer that wraps diffusers and transformers. It does not depend on adapters.
"""

# diffusers loads its classes lazily, which looks like private imports to the type checker.
# pyright: reportPrivateImportUsage=false

import contextlib
import hashlib
import os
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError
from torch import nn

from lora_diffusion.architectures.families import Family
from lora_diffusion.architectures.module_paths import ModelLayout, module_paths
from lora_diffusion.config.generate import Scheduler
from lora_diffusion.config.settings import EMBEDDED_BASE, Quantization
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.diffusers import (
    base_hash,
    read_json,
    read_layout,
    weight_variant,
)
from lora_diffusion.models.locate import find_base, first_line

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline
"""The diffusers pipelines that a base can be loaded into: one for SD 1.x and SD 2.x, one for SDXL."""

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A loaded base model: its diffusers pipeline, its architecture and its origin."""

    pipe: Pipeline
    """The diffusers pipeline; every parameter is frozen and every model is in evaluation mode."""
    name: str
    """The name, path or hub id that the base was loaded by."""
    folder: Path
    """The folder with its weights, in diffusers' layout."""
    family: Family
    """The model family, such as SD 1.x or SDXL."""
    layout: ModelLayout
    """The layers and widths of the UNet and the text encoders."""
    merged: tuple[str, ...] = ()
    """Hashes and weights of adapters that have been merged into the loaded weights."""
    quantization: Quantization = "none"
    """The data type of the UNet's linear layers: `nf4`, `fp4`, `int8`, or `none` if they are not quantized."""

    def __repr__(self) -> str:
        """Return one line with the family, name, folder, dtype and device; `hash` would have to read all files."""
        origin = f"family={self.family.name!r}, name={self.name!r}, folder={str(self.folder)!r}"
        quantization = "" if self.quantization == "none" else f", quantization={self.quantization!r}"
        return f"Base({origin}, dtype={self.dtype}, device='{self.device}'{quantization})"

    @property
    def hash(self) -> str:
        """SHA-256 over the weight files, and over the adapters merged into the base, as hexadecimal digits."""
        own = base_hash(self.folder)
        return hashlib.sha256("\n".join((own, *self.merged)).encode()).hexdigest() if self.merged else own

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the UNet's unquantized parameters."""
        return next(p.dtype for p in self.pipe.unet.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        # pipe.device visits every module, which takes a tenth of the time that switching a blend takes
        return next(self.pipe.unet.parameters()).device

    @property
    def adaptable_models(self) -> tuple[nn.Module, ...]:
        """The models that adapters can change: the UNet and the text encoders, as far as the pipeline has them."""
        models = (getattr(self.pipe, component, None) for component in self.family.components)
        return tuple(model for model in models if model is not None)

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder between images and latents."""
        return cast(AutoencoderKL, self.pipe.components["vae"])

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of all modules that an adapter can change, such as `unet.mid_block.attentions.0.proj_in`."""
        return module_paths(self.layout)

    @property
    def size_px(self) -> int:
        """The default width and height of generated images, in pixels."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)


def default_device() -> torch.device:
    """Return the first available device out of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_precision(device: torch.device) -> torch.dtype:
    """Return float32 on a CPU and float16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.float16


def load_base(
    name: str | os.PathLike[str] = EMBEDDED_BASE,
    *,
    device: torch.device | None = None,
    precision: torch.dtype | None = None,
) -> Base:
    """Load a base model for sampling or training, with all parameters frozen.

    Args:
        name: `tiny-sd` for the embedded base, a folder in diffusers' layout, or a hub id such as `owner/name`.
        device: Where to put the models; by default the GPU if there is one.
        precision: The data type of the weights; by default float16 on a GPU and float32 on a CPU.

    Raises:
        BaseModelError: If the base is not found, is not Stable Diffusion, or cannot be loaded.
    """
    folder = find_base(name)
    family, layout = read_layout(folder)
    device = device or default_device()
    two_encoders = len(layout.text_layers) == 2
    try:
        with quiet_libraries():
            pipe = _load_pipeline(folder, two_encoders=two_encoders, precision=precision or default_precision(device))
            cast(Any, pipe).to(device)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise BaseModelError(
            f"{folder}: the base cannot be loaded ({first_line(error)}); check that its files are complete"
        ) from None
    cast(Any, pipe).set_progress_bar_config(disable=True)
    for component in (*family.components, "vae"):
        getattr(pipe, component).requires_grad_(False).eval()
    return Base(pipe=pipe, name=os.fspath(name), folder=folder, family=family, layout=layout)


def _load_pipeline(folder: Path, *, two_encoders: bool, precision: torch.dtype) -> Pipeline:
    """Load a pipeline without SDXL's watermark and without a safety checker."""
    pipeline_class: Any = cast(Any, StableDiffusionXLPipeline if two_encoders else StableDiffusionPipeline)
    arguments: dict[str, Any] = {"add_watermarker": False} if two_encoders else {"safety_checker": None}
    return pipeline_class.from_pretrained(
        folder, torch_dtype=precision, variant=weight_variant(folder), local_files_only=True, **arguments
    )


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """Silence warnings, log messages and progress bars of diffusers and transformers inside the block."""
    levels = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(levels[0])
        transformers.utils.logging.set_verbosity(levels[1])


def transformers_path(model: nn.Module, path: str) -> str:
    """Convert a path inside a component to the module names of the installed version of transformers.

    Newer versions of transformers have no `text_model` level in CLIP text encoders.
    """
    return path if hasattr(model, "text_model") else path.removeprefix("text_model.")


def module_at(base: Base, path: str) -> nn.Module:
    """Return the module at a module path such as `unet.mid_block.attentions.0.proj_in`.

    Raises:
        KeyError: If the base has no such module.
    """
    component, inner = path.split(".", 1)
    model: nn.Module = getattr(base.pipe, component)
    try:
        return model.get_submodule(transformers_path(model, inner))
    except AttributeError:
        raise KeyError(path) from None


def new_scheduler(base: Base, name: Scheduler) -> SchedulerMixin:
    """Create a scheduler with the base's noise schedule.

    Schedulers hold state while they step, so every run needs one of its own.

    Args:
        base: The base whose scheduler configuration is used.
        name: The sampler, or `base` for the one that the base comes with.
    """
    own: Any = base.pipe.components["scheduler"]
    scheduler_class: Any = own.__class__ if name == "base" else _SCHEDULERS[name]
    return scheduler_class.from_config(own.config)


def prediction_type(base: Base) -> str:
    """Return what the UNet predicts: `epsilon` or `v_prediction`.

    Raises:
        BaseModelError: If the scheduler's configuration names another prediction type.
    """
    kind = read_json(base.folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            f"{base.folder}: its scheduler has prediction_type {kind!r}; expected epsilon or v_prediction"
        )
    return str(kind)
