"""The studio without its looks: what the app shows and does, as plain values in and out. Nothing here knows Gradio.

One `Studio` serves a process. It holds the folders and the base that was loaded last; all that a visitor has set comes
in with each call, so that visitors never mix.
"""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.adapters.coefficients import DenoisingStep, stock_presets
from lora_diffusion.config.settings import EMBEDDED_BASE, Quantization
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.sampling import decode_preview
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.references import AdapterResolver
from lora_diffusion.library.search import Library, find_adapter, open_library, search
from lora_diffusion.models.load import Base
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.models.quantize import check_quantization_available, load_quantized_base
from lora_diffusion.workflows.images.generate import LoadOptions, load_and_resolve_blend, write_images
from lora_diffusion.workflows.images.request import (
    GenerationRequest,
    request_from_image,
    request_from_preset,
    resolve_prompt_tags,
)
from lora_diffusion_studio.backend.device_queue import DeviceQueue, EventStream, Halted, Waiting
from lora_diffusion_studio.view_models.adapter_card import Card, make_card
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot, entry_from_slot
from lora_diffusion_studio.view_models.blend_form import BlendForm, form_from_request, format_command, make_request
from lora_diffusion_studio.view_models.weight_plot import draw_effect

PREVIEW_SECONDS = 0.4
"""No preview is drawn sooner after the last."""
NAME = re.compile(r"[\w][\w .,'+()-]{0,59}")


@dataclass(frozen=True, kw_only=True)
class StudioPaths:
    """The folders of a studio; nothing outside them is read for a visitor or written."""

    library: Path
    output: Path
    bases: tuple[str, ...]
    """Bases on offer: names, folders or hub ids."""
    quantization: Quantization = "none"
    """What their linear layers are kept in."""

    @property
    def presets(self) -> Path:
        return self.output / "presets"

    @property
    def masks(self) -> Path:
        return self.output / "masks"


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """A completed denoising step."""

    text: str
    share: float
    picture: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class ImageSaved:
    """A written image."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class Finished:
    """All pictures, and what a visitor should know of them."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    seconds: float


Event = Waiting | StepTaken | ImageSaved | Finished | Halted


class Studio:
    """Folders, and the base that was loaded last."""

    def __init__(self, places: StudioPaths) -> None:
        check_quantization_available(places.quantization)
        self.places = places
        self.loaded: Base | None = None
        self.device = DeviceQueue()
        for folder in (places.presets, places.masks):
            folder.mkdir(parents=True, exist_ok=True)

    def library(self) -> Library:
        """As it is now: an adapter that was trained meanwhile is there."""
        return open_library(self.places.library)

    def base(self, name: str) -> Base:
        """The base of that name; one is kept. Raises ConfigError for one that is not on offer."""
        self.check_base(name)
        if self.loaded is None or self.loaded.name != name:
            self.loaded = None  # before the next is loaded, so that both are never there together
            self.loaded = load_quantized_base(name, self.places.quantization)
        return self.loaded

    def check_base(self, name: str) -> None:
        if name not in self.places.bases:
            raise ConfigError(f"{name!r}: is not a base of this studio; choose one of {', '.join(self.places.bases)}")

    def cards(self, base: str, text: str = "", kind: str = "") -> list[Card]:
        """The adapters that fit a base, those with every word of `text`, and of a kind such as `LoRA`, if given."""
        self.check_base(base)
        family = find_checkpoint(base).family.name
        found = [make_card(entry) for entry in search(self.library(), text, family) if not entry.problem]
        return [card for card in found if kind in ("", *card.kinds)]

    def card(self, name: str) -> Card:
        """One adapter. Raises ConfigError if it is not there."""
        return make_card(find_adapter(self.library(), name))

    def block_presets(self, base: str) -> list[str]:
        """Names of the stock block presets."""
        self.check_base(base)
        return list(stock_presets(find_checkpoint(base).layout))

    def draw_effect(self, base: str, row: AdapterSlot) -> Image.Image:
        """Draw the effect of an adapter by block and over the steps. Raises ConfigError."""
        self.check_base(base)
        return draw_effect(entry_from_slot(row, self.library()).weight, find_checkpoint(base).layout)

    def make_request(self, form: BlendForm) -> GenerationRequest:
        """Return the generation request of a form. Raises ConfigError."""
        self.check_base(form.base)
        request = resolve_prompt_tags(make_request(form, self.library()), self.resolver)
        self.check_masks(request)
        return request

    def format_command(self, form: BlendForm, command: str = "generate", *more: str) -> str:
        """Return the command that makes the same pictures. Raises ConfigError."""
        flags = () if self.places.quantization == "none" else ("--quantize", self.places.quantization)
        return format_command(form, self.library(), self.places.output, command, *more, *flags)

    @property
    def resolver(self) -> AdapterResolver:
        return AdapterResolver(library_folder=self.places.library)

    def check_masks(self, request: GenerationRequest) -> None:
        """Raise ConfigError for a mask that was not painted here."""
        inside = self.places.masks.resolve()
        for entry in request.entries:
            mask = entry.region.mask if entry.region else ""
            if mask and not Path(mask).resolve().is_relative_to(inside):
                raise ConfigError(f"{Path(mask).name}: is no mask of this studio; paint one under Regions")

    def render(self, form: BlendForm, visitor: str = "") -> Iterator[Event]:
        """Make the pictures of a form, into the output folder. Raises LoRADiffusionError's children.

        Closing the iterator stops at the next step, with the base as it was.
        """
        return self.render_request(
            self.make_request(form), visitor
        )  # mistakes are found before the device is waited for

    def render_request(self, request: GenerationRequest, visitor: str = "") -> Iterator[Event]:
        """Render the images of a request."""
        return self.device.stream(lambda line: self.render_events(request, line), visitor)

    def render_events(self, request: GenerationRequest, line: EventStream) -> Finished:
        started = last = time.monotonic()
        options = LoadOptions(resolver=self.resolver)
        found = load_and_resolve_blend(request.base, request.entries, options)
        base = self.base(request.base)
        done = 0

        def on_step(denoising_step: DenoisingStep, latents: Any) -> None:
            nonlocal last
            due = time.monotonic() - last > PREVIEW_SECONDS
            share = (done + (denoising_step.index + 1) / denoising_step.total) / request.settings.count
            picture = decode_preview(base, latents) if due else None
            last = time.monotonic() if due else last
            line.send(
                StepTaken(
                    text=format_progress(done, request, denoising_step, started, share), share=share, picture=picture
                )
            )

        def on_picture(path: Path, _picture: object) -> None:
            nonlocal done
            done += 1
            line.send(ImageSaved(path=path))

        written = write_images(
            base, found, request, self.places.output, options, on_picture=on_picture, on_step=on_step
        )
        return Finished(paths=written.paths, notes=written.notes, seconds=time.monotonic() - started)

    def restore_form(self, picture: Path) -> tuple[BlendForm, tuple[str, ...]]:
        """Return the form of a picture, with notes on what could not be restored. Raises ConfigError."""
        request = request_from_image(picture, base="", resolver=self.resolver)
        form, missing = form_from_request(resolve_prompt_tags(request, self.resolver), self.library())
        if form.base not in self.places.bases:
            missing = (*missing, f"made with the base {form.base}, which this studio does not have")
        if request.recipe and request.quantization != self.places.quantization:
            missing = (
                *missing,
                f"made with quantize {request.quantization}; this studio has {self.places.quantization}",
            )
        return form, (*request.notes, *missing)

    def form_from_preset(self, path: Path) -> tuple[BlendForm, tuple[str, ...]]:
        """Return the form of a preset; adapters that the library lacks are named and left out."""
        settings = {} if read_preset(path).settings else {"prompt": ""}
        request = request_from_preset(path, base="", settings=settings, composition={}, adapters=())
        return form_from_request(request, self.library())


def format_progress(
    done: int, request: GenerationRequest, denoising_step: DenoisingStep, started: float, share: float
) -> str:
    """Describe the progress and the remaining time."""
    left = (time.monotonic() - started) * (1 - share) / max(share, 1e-6)
    which = f"picture {done + 1} of {request.settings.count}, " if request.settings.count > 1 else ""
    return f"{which}step {denoising_step.index + 1} of {denoising_step.total}, {left:.0f} s left"


def check_name(name: str) -> str:
    """Return a name that is safe as a file name. Raises ConfigError."""
    stripped = name.strip()
    if not NAME.fullmatch(stripped):
        raise ConfigError(
            f"{name!r} cannot be a name: begin with a letter or digit, then letters, digits, spaces and . , ' + - ( ), "
            "sixty at most"
        )
    return stripped


def list_bases(named: Sequence[str]) -> tuple[str, ...]:
    """Return the requested bases, or the embedded one. Raises BaseModelError for one that does not exist."""
    for name in named:
        find_checkpoint(name)
    return tuple(named) or (EMBEDDED_BASE,)


def create_library(output: Path) -> Path:
    """Create the studio's own library, with the adapters that come with the package."""
    folder = output / "library"
    if not folder.is_dir():
        shutil.copytree(
            sample_data_folder() / "adapters", folder, ignore=lambda _, names: [n for n in names if n[0] == "."]
        )
    return folder


def stock_presets_folder() -> Path:
    """The presets that come with the package."""
    return sample_data_folder() / "presets"
