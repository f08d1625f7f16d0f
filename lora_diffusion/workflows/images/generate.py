"""What the commands do between their flags and the library: find files, load, run, write."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lora_diffusion.adapters.blend import Blend, blend_sum
from lora_diffusion.adapters.coefficients import expand_block_preset, read_block_presets, without_schedules
from lora_diffusion.adapters.compatibility import check_family
from lora_diffusion.algebra.combine.balance import balance_weights
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry, BlendPreset
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.core.dtypes import dtype_name, torch_dtype
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_meta_adapter
from lora_diffusion.inference.in_place import is_quantized, rounding_loss, validate_blend
from lora_diffusion.inference.sampling import GeneratedImage, OnStep, generate
from lora_diffusion.library.presets import save_preset
from lora_diffusion.library.recipe import Recipe, list_differences
from lora_diffusion.library.references import AdapterResolver, ResolvedBlend, load_blend
from lora_diffusion.models.load import Base
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.models.quantize import load_quantized_base
from lora_diffusion.workflows.images.request import GenerationRequest, resolve_prompt_tags

_MOST_LOST = 0.1
"""Share of a blend's delta that rounding may take before a user is told."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where adapters and presets are found, and how a blend is prepared."""

    resolver: AdapterResolver = field(default_factory=AdapterResolver)
    ignore: tuple[str, ...] = ()
    """Patterns of keys that adapter files may hold without being understood."""
    block_presets: Path | None = None
    """An `lbwpresets.txt` with block vectors by name."""
    balance: bool = False
    """Scale the weights so that equal ones mean equal strength."""
    low_memory: bool = False
    """Take the base's own values back from its files, and keep no copies in memory."""


def _check_families(entries: Iterable[BlendEntry], base: str, ignore: Sequence[str] = ()) -> None:
    """Raise FamilyMismatchError for an adapter of another family than the base's, from file headers alone."""
    family = find_checkpoint(base).family
    for entry in entries:
        if entry.hash and not Path(entry.path).exists():
            continue  # looked for by its hash later
        outline = load_meta_adapter(Path(entry.path), ignore=ignore)
        check_family(outline.metadata.family, outline.metadata.name, base_name=base, family=family.name)


def load_and_resolve_blend(base: str, entries: tuple[BlendEntry, ...], options: LoadOptions) -> ResolvedBlend:
    """Load the adapters, expand their block presets for this base, and balance them if requested.

    Raises LoRADiffusionError's children.
    """
    _check_families(entries, base, options.ignore)
    presets = read_block_presets(options.block_presets) if options.block_presets else None
    layout = find_checkpoint(base).layout
    found = load_blend(entries, options.resolver, ignore=options.ignore)
    spelled = [
        replace(entry, weight=expand_block_preset(entry.weight, layout, presets)) for entry in found.blend.entries
    ]
    blend = Blend(entries=tuple(spelled))
    return replace(found, blend=balance_weights(blend) if options.balance else blend)


def _check_base_hash(base: Base, recipe: Recipe) -> None:
    """Raise ConfigError if the base is not the one that the recipe was made with."""
    if base.hash != recipe.base_hash:
        raise ConfigError(
            f"{base.name}: its weights (hash {base.hash[:12]}) are not those of the recipe ({recipe.base_hash[:12]}); "
            "give the original base with --base"
        )


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """Paths of the generated images, with notes for the user."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def generate_files(request: GenerationRequest, output: Path, options: LoadOptions | None = None) -> GeneratedImages:
    """Generate the images of a request and write each into `output` under a free name as soon as it is done.

    Raises LoRADiffusionError's children.
    """
    options = options or LoadOptions()
    check_writable(output / "00000.png")
    request = resolve_prompt_tags(request, options.resolver)
    found = load_and_resolve_blend(request.base, request.entries, options)
    base = load_base_for(request)
    with tqdm(total=request.settings.count, desc="generate", unit="picture", leave=False) as bar:

        def advance(_path: Path, _picture: GeneratedImage) -> None:
            bar.update()

        return write_images(base, found, request, output, options, on_picture=advance)


def write_images(
    base: Base,
    found: ResolvedBlend,
    request: GenerationRequest,
    output: Path,
    options: LoadOptions,
    *,
    on_picture: Callable[[Path, GeneratedImage], None],
    on_step: OnStep | None = None,
) -> GeneratedImages:
    """Generate images with a loaded base and loaded adapters; `on_picture` receives each one when written."""
    notes = [*request.notes, *found.notes]
    if request.recipe:
        _check_base_hash(base, request.recipe)
        notes += [
            f"{note}; the pixels may differ" for note in list_differences(request.recipe, device=base.pipe.device.type)
        ]
    notes += warn_about_rounding(base, found.blend, request)
    paths: list[Path] = []

    def keep(picture: GeneratedImage) -> None:
        paths.append(next_image_path(output))
        picture.save(paths[-1])
        on_picture(paths[-1], picture)

    backup = "file" if options.low_memory else "memory"
    generate(
        base,
        [request.settings],
        found.blend,
        composition=request.composition,
        backup=backup,
        on_picture=keep,
        on_step=on_step,
    )
    return GeneratedImages(paths=tuple(paths), notes=tuple(notes))


def warn_about_rounding(base: Base, blend: Blend, request: GenerationRequest) -> list[str]:
    """Return a warning if adding to the weights would round away a considerable part of the blend."""
    if request.composition.parallel or is_quantized(base) or base.pipe.unet.dtype == torch.float32:
        return []
    validate_blend(base, blend)
    lost = rounding_loss(base, blend_sum(_without_schedules_and_regions(blend), base.layout))
    if lost <= _MOST_LOST:
        return []
    kind = dtype_name(base.pipe.unet.dtype)
    return [f"rounding to {kind} loses {lost:.0%} of what the adapters change; --parallel keeps it in full"]


def _without_schedules_and_regions(blend: Blend) -> Blend:
    """Return the blend at full weight everywhere, without schedules and regions."""
    return Blend(entries=tuple(replace(e, region=None, weight=without_schedules(e.weight)) for e in blend.entries))


def load_base_for(request: GenerationRequest) -> Base:
    """Load the base of a request; a replay uses the recipe's precision. Raises BaseModelError, ConfigError."""
    precision = torch_dtype(request.recipe.precision) if request.recipe else None
    return load_quantized_base(request.base, request.quantization, precision=precision)


def next_image_path(folder: Path) -> Path:
    """Return the first free five-digit PNG name after the existing ones."""
    taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()] if folder.is_dir() else []
    return folder / f"{max(taken, default=-1) + 1:05d}.png"


@dataclass(frozen=True, kw_only=True)
class SavedPreset:
    """A written preset, with notes for the user."""

    preset: BlendPreset
    notes: tuple[str, ...]


def save_plan(
    request: GenerationRequest, path: Path, options: LoadOptions, *, name: str, description: str, force: bool
) -> SavedPreset:
    """Write a request as a preset, with the hashes of all adapters and their full weights.

    Raises LoRADiffusionError's children.
    """
    if path.suffix != ".json":
        raise ConfigError(f"{path}: a preset is a .json file; give one, e.g. my-blend.json")
    request = resolve_prompt_tags(request, options.resolver)
    if not request.entries:
        raise ConfigError("nothing to save; give at least one --adapter, a prompt with a tag, or --from IMAGE")
    found = load_and_resolve_blend(request.base, request.entries, options)
    preset = BlendPreset(
        name=name or path.stem,
        description=description,
        base=request.base,
        adapters=request.entries,
        composition=request.composition,
        settings=None if request.settings == GenerateConfig(prompt="") else request.settings,
    )
    return SavedPreset(preset=save_preset(preset, path, found.blend, force=force), notes=(*request.notes, *found.notes))
