"""The state of one server process: its configuration, the loaded base model and the device queue.

Nothing that a user has set is stored here. It comes with each call, so that users cannot affect each other.
"""

from pathlib import Path

from PIL import Image

from lora_diffusion.adapters.coefficients import stock_presets
from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.references import AdapterResolver
from lora_diffusion.library.search import Library, find_adapter, open_library, search
from lora_diffusion.models.load import Base
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.models.quantize import check_quantization_available, load_quantized_base
from lora_diffusion.workflows.images.request import (
    GenerationRequest,
    request_from_image,
    request_from_preset,
    resolve_prompt_tags,
)
from lora_diffusion_studio.backend.config import create_default_library
from lora_diffusion_studio.backend.device_queue import DeviceQueue
from lora_diffusion_studio.view_models.adapter_card import AdapterCard, make_card
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot, entry_from_slot
from lora_diffusion_studio.view_models.blend_form import BlendForm, form_from_request, format_command, make_request
from lora_diffusion_studio.view_models.weight_plot import plot_weight


class Studio:
    """Configuration, loaded base model and device queue of one server process."""

    def __init__(self, config: StudioConfig) -> None:
        """Create the output folders, and the default library if no library is given.

        Raises:
            BaseModelError: If a base model does not exist.
            ConfigError: If the quantization needs a library that is not installed.
        """
        check_quantization_available(config.quantize)
        for name in config.bases:
            find_checkpoint(name)
        self.config = config
        self.library_folder: Path = config.library or create_default_library(config.output)
        """Folder of the adapters."""
        self.device = DeviceQueue()
        self._loaded_base: Base | None = None
        for folder in (config.presets, config.masks):
            folder.mkdir(parents=True, exist_ok=True)

    def open_library(self) -> Library:
        """Return the current state of the adapter library."""
        return open_library(self.library_folder)

    @property
    def resolver(self) -> AdapterResolver:
        """Resolver of adapter references. It looks into the studio's library only."""
        return AdapterResolver(library_folder=self.library_folder)

    def load_base(self, name: str) -> Base:
        """Return a base model. The one that was loaded last stays in memory.

        Raises:
            ConfigError: If the studio does not offer this base model.
        """
        self.check_base(name)
        if self._loaded_base is None or self._loaded_base.name != name:
            self._loaded_base = None  # first, so that two base models are never in memory together
            self._loaded_base = load_quantized_base(name, self.config.quantize)
        return self._loaded_base

    def check_base(self, name: str) -> None:
        """Raise ConfigError if the studio does not offer this base model."""
        if name not in self.config.bases:
            raise ConfigError(
                f"{name!r} is not one of this studio's base models; choose one of {', '.join(self.config.bases)}"
            )

    def list_cards(self, base: str, text: str = "", kind: str = "") -> list[AdapterCard]:
        """Return the cards of the adapters that fit a base model.

        Args:
            base: Name of the base model.
            text: Words that must all occur in the adapter's name or trigger words.
            kind: Layer kind such as `LoRA`. Empty for all kinds.

        Raises:
            ConfigError: If the studio does not offer this base model.
        """
        self.check_base(base)
        family = find_checkpoint(base).family.name
        cards = [make_card(entry) for entry in search(self.open_library(), text, family) if not entry.problem]
        return [card for card in cards if kind in ("", *card.kinds)]

    def get_card(self, name: str) -> AdapterCard:
        """Return the card of one adapter.

        Raises:
            ConfigError: If the library does not have it.
        """
        return make_card(find_adapter(self.open_library(), name))

    def list_block_presets(self, base: str) -> list[str]:
        """Return the names of the block weight presets of a base model, such as `MIDD`."""
        self.check_base(base)
        return list(stock_presets(find_checkpoint(base).layout))

    def plot_weight(self, base: str, slot: AdapterSlot) -> Image.Image:
        """Plot the effective weight of a slot by block and over the steps.

        Raises:
            ConfigError: If an option of the slot is invalid.
        """
        self.check_base(base)
        return plot_weight(entry_from_slot(slot, self.open_library()).weight, find_checkpoint(base).layout)

    def make_request(self, form: BlendForm) -> GenerationRequest:
        """Return the generation request of a form, with the prompt's `<lora:...>` tags resolved.

        Raises:
            ConfigError: If a value is invalid, or a mask was not painted in this studio.
        """
        self.check_base(form.base)
        request = resolve_prompt_tags(make_request(form, self.open_library()), self.resolver)
        self._check_masks(request)
        return request

    def _check_masks(self, request: GenerationRequest) -> None:
        folder = self.config.masks.resolve()
        for entry in request.entries:
            mask = entry.region.mask if entry.region else ""
            if mask and not Path(mask).resolve().is_relative_to(folder):
                raise ConfigError(
                    f"{Path(mask).name}: the studio only reads masks that were painted in it; paint one under Regions"
                )

    def format_command(self, form: BlendForm, command: str = "generate", *more: str) -> str:
        """Return the shell command that makes the same images.

        Raises:
            ConfigError: If a weight can be stored in a preset only, or an adapter is not in the library.
        """
        flags = () if self.config.quantize == "none" else ("--quantize", self.config.quantize)
        return format_command(form, self.open_library(), self.config.output, command, *more, *flags)

    def form_from_image(self, image: Path) -> tuple[BlendForm, tuple[str, ...]]:
        """Return the form that an image was made with, and notes on what could not be restored.

        Raises:
            ConfigError: If the image has neither a recipe nor A1111 generation parameters.
        """
        request = request_from_image(image, base="", resolver=self.resolver)
        form, notes = form_from_request(resolve_prompt_tags(request, self.resolver), self.open_library())
        if form.base not in self.config.bases:
            notes = (*notes, f"the image was made with the base model {form.base}, which this studio does not offer")
        quantization = self.config.quantize
        if request.recipe and request.quantization != quantization:
            notes = (
                *notes,
                f"the image was made with --quantize {request.quantization}; this studio uses {quantization}",
            )
        return form, (*request.notes, *notes)

    def form_from_preset(self, path: Path) -> tuple[BlendForm, tuple[str, ...]]:
        """Return the form of a preset file, and a note for each adapter that the library lacks."""
        settings = {} if read_preset(path).settings else {"prompt": ""}
        request = request_from_preset(path, base="", settings=settings, composition={}, adapters=())
        return form_from_request(request, self.open_library())
