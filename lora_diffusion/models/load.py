"""Load a base and ask it things: the one home of diffusers and transformers.

Knows nothing of adapters.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
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

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


PatchKind = Literal["weights", "parallel"]
"""How deltas are applied to a loaded base: added to its weights, or computed beside them in the forward pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A loaded checkpoint: the pipeline, what it is and where it came from."""

    pipe: Any
    name: str
    folder: Path
    family: Family
    layout: ModelLayout
    merged: tuple[str, ...] = ()
    """Hashes and weights of adapters that were added to it for good."""
    quantization: Quantization = "none"
    """What the UNet's linear layers are kept in."""
    open_patches: set[PatchKind] = field(default_factory=set[PatchKind], init=False, repr=False)
    """Kinds of patches that are open on this base now; maintained by `lora_diffusion.inference`."""

    @property
    def hash(self) -> str:
        """Content hash of its weight files, and of what was added to them."""
        own = base_hash(self.folder)
        return hashlib.sha256("\n".join((own, *self.merged)).encode()).hexdigest() if self.merged else own

    @property
    def device(self) -> torch.device:
        """Where the UNet is; diffusers' own answer walks every module, which takes a tenth of what a blend does."""
        return next(self.pipe.unet.parameters()).device

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module that an adapter may change."""
        return module_paths(self.layout)

    @property
    def size_px(self) -> int:
        """Side of the square pictures that it makes by default."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_precision(device: torch.device) -> torch.dtype:
    """Half precision where it is fast."""
    return torch.float32 if device.type == "cpu" else torch.float16


def load_base(
    name: str = EMBEDDED_BASE, *, device: torch.device | None = None, precision: torch.dtype | None = None
) -> Base:
    """Load a base for sampling or training; all its parameters are frozen.

    Raises BaseModelError.
    """
    folder = find_base(name)
    family, shape = read_layout(folder)
    device = device or default_device()
    two_encoders = len(shape.text_layers) == 2
    arguments: dict[str, Any] = {"add_watermarker": False} if two_encoders else {"safety_checker": None}
    try:
        with quiet_libraries():
            pipe = (StableDiffusionXLPipeline if two_encoders else StableDiffusionPipeline).from_pretrained(
                folder,
                torch_dtype=precision or default_precision(device),
                variant=weight_variant(folder),
                local_files_only=True,
                **arguments,
            )
            pipe.to(device)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise BaseModelError(f"{folder}: the base cannot be loaded ({first_line(error)}); is it complete?") from None
    pipe.set_progress_bar_config(disable=True)
    for component in (*family.components, "vae"):
        getattr(pipe, component).requires_grad_(False).eval()
    return Base(pipe=pipe, name=name, folder=folder, family=family, layout=shape)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back notices of diffusers and transformers that a user of this library can do nothing about."""
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
    """A module path (without its component) as this version of transformers spells it."""
    return path if hasattr(model, "text_model") else path.removeprefix("text_model.")


def module_at(base: Base, path: str) -> nn.Module:
    """The module at a path such as `unet.mid_block.attentions.0.proj_in`. Raises KeyError."""
    component, inner = path.split(".", 1)
    model: nn.Module = getattr(base.pipe, component)
    try:
        return model.get_submodule(transformers_path(model, inner))
    except AttributeError:
        raise KeyError(path) from None


def new_scheduler(base: Base, name: Scheduler) -> Any:
    """A scheduler of its own for each use, so that nothing is shared between two runs."""
    config = base.pipe.scheduler.config
    kind = type(base.pipe.scheduler) if name == "base" else SCHEDULERS[name]
    return kind.from_config(config)


def prediction_type(base: Base) -> str:
    """`epsilon` or `v_prediction`. Raises BaseModelError for anything else."""
    kind = read_json(base.folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise BaseModelError(f"{base.folder}: predicts {kind!r}; expected epsilon or v_prediction")
    return str(kind)
