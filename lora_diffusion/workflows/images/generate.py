"""Image generation from a request: find and load the files, sample, and write PNG files or a preset."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lora_diffusion.adapters.blend import Blend, blend_sum
from lora_diffusion.adapters.coefficients import expand_block_preset, read_block_presets, without_schedules
from lora_diffusion.adapters.compatibility import check_family
from lora_diffusion.algebra.combine.balance import balance_weights
from lora_diffusion.config.generate import GenerateConfig, LoadConfig
from lora_diffusion.config.preset import BlendEntry, BlendPreset
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.core.dtypes import dtype_name, torch_dtype
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_meta_adapter
from lora_diffusion.inference.in_place import blend_rounding_error, is_quantized, validate_blend
from lora_diffusion.inference.sampling import GeneratedImage, OnStep, generate
from lora_diffusion.library.presets import save_preset
from lora_diffusion.library.recipe import Recipe, list_differences
from lora_diffusion.library.references import AdapterResolver, ResolvedBlend, load_blend
from lora_diffusion.models.load import Base
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.models.quantize import load_quantized_base
from lora_diffusion.workflows.images.request import GenerationRequest, resolve_prompt_tags

_MAX_ROUNDING_ERROR = 0.1
"""Rounding error, relative to the blend's delta, up to which there is no warning."""


def _check_families(entries: Iterable[BlendEntry], base: str, ignore: Sequence[str] = ()) -> None:
    """Raise FamilyMismatchError if an adapter is for another family than the base; only headers are read."""
    family = find_checkpoint(base).family
    for entry in entries:
        if entry.hash and not Path(entry.path).exists():
            continue  # it is searched by its hash later
        metadata = load_meta_adapter(Path(entry.path), ignore=ignore).metadata
        check_family(metadata.family, metadata.name, base_name=base, family=family.name)


def load_and_resolve_blend(
    base: str, entries: tuple[BlendEntry, ...], load: LoadConfig, resolver: AdapterResolver | None = None
) -> ResolvedBlend:
    """Load the adapters of a blend, expand their block presets for a base, and balance the weights if requested.

    Args:
        base: `tiny-sd`, a folder, a single file or a hub id; only headers are read.
        entries: The adapters by path or hash, with weights.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.

    Returns:
        The blend, with notes on adapters that were found elsewhere than stated.

    Raises:
        LoRADiffusionError: If the base or an adapter is not found, cannot be read or does not fit.
    """
    _check_families(entries, base, load.ignore_unmatched)
    presets = read_block_presets(load.block_presets) if load.block_presets else None
    layout = find_checkpoint(base).layout
    resolved = load_blend(
        entries, resolver or AdapterResolver(library_folder=load.library), ignore=load.ignore_unmatched
    )
    expanded = [
        replace(entry, weight=expand_block_preset(entry.weight, layout, presets)) for entry in resolved.blend.entries
    ]
    blend = Blend(entries=tuple(expanded))
    return replace(resolved, blend=balance_weights(blend) if load.balance else blend)


def _check_base_hash(base: Base, recipe: Recipe) -> None:
    """Raise ConfigError if the base does not have the hash in the recipe."""
    if base.hash != recipe.base_hash:
        raise ConfigError(
            f"{base.name}: its hash is {base.hash[:12]}, but the recipe was made with {recipe.base_hash[:12]}; "
            "give the original base with --base"
        )


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """Files of the generated images."""

    paths: tuple[Path, ...]
    """The written PNG files."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""


def generate_files(
    request: GenerationRequest,
    output: str | os.PathLike[str],
    load: LoadConfig | None = None,
    resolver: AdapterResolver | None = None,
) -> GeneratedImages:
    """Generate the images of a request and write each as a PNG file as soon as it is finished.

    Args:
        request: The images to generate.
        output: Folder for the images, which are numbered after the existing ones.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.

    Raises:
        LoRADiffusionError: If an input is invalid or the folder cannot be written.
    """
    load, output = load or LoadConfig(), Path(output)
    resolver = resolver or AdapterResolver(library_folder=load.library)
    check_writable(output / "00000.png")
    request = resolve_prompt_tags(request, resolver)
    resolved = load_and_resolve_blend(request.base, request.entries, load, resolver)
    base = load_base_for(request)
    with tqdm(total=request.settings.count, desc="generate", unit="picture", leave=False) as bar:

        def advance(_path: Path, _picture: GeneratedImage) -> None:
            bar.update()

        return write_images(base, resolved, request, output, load, on_image=advance)


def write_images(
    base: Base,
    resolved: ResolvedBlend,
    request: GenerationRequest,
    output: str | os.PathLike[str],
    load: LoadConfig,
    *,
    on_image: Callable[[Path, GeneratedImage], None],
    on_step: OnStep | None = None,
) -> GeneratedImages:
    """Generate and write images with a loaded base and loaded adapters.

    Args:
        base: The loaded base.
        resolved: The loaded adapters with their weights.
        request: The images to generate. The tags of its prompt must be resolved.
        output: Folder for the images, which are numbered after the existing ones.
        load: How the original weights are restored.
        on_image: Called with the path and the image after each image is written.
        on_step: Called after each denoising step.

    Raises:
        LoRADiffusionError: If the request does not fit the base, or an image cannot be written.
    """
    folder = Path(output)
    notes = [*request.notes, *resolved.notes]
    if request.recipe:
        _check_base_hash(base, request.recipe)
        notes += [
            f"{note}; the pixels may differ" for note in list_differences(request.recipe, device=base.pipe.device.type)
        ]
    notes += warn_about_rounding(base, resolved.blend, request)
    paths: list[Path] = []

    def write(picture: GeneratedImage) -> None:
        paths.append(next_image_path(folder))
        picture.save(paths[-1])
        on_image(paths[-1], picture)

    backup = "file" if load.low_memory else "memory"
    generate(
        base,
        [request.settings],
        resolved.blend,
        composition=request.composition,
        backup=backup,
        on_image=write,
        on_step=on_step,
    )
    return GeneratedImages(paths=tuple(paths), notes=tuple(notes))


def warn_about_rounding(base: Base, blend: Blend, request: GenerationRequest) -> list[str]:
    """Return a warning if rounding to the type of the weights loses more than a tenth of the blend's delta.

    Returns:
        One warning or none.

    Raises:
        LoRADiffusionError: If the blend does not fit the base.
    """
    if request.composition.parallel or is_quantized(base) or base.pipe.unet.dtype == torch.float32:
        return []
    validate_blend(base, blend)
    error = blend_rounding_error(base, blend_sum(_without_schedules_and_regions(blend), base.layout))
    if error <= _MAX_ROUNDING_ERROR:
        return []
    dtype = dtype_name(base.pipe.unet.dtype)
    return [f"rounding to {dtype} loses {error:.0%} of the adapters' delta; --parallel applies it in full"]


def _without_schedules_and_regions(blend: Blend) -> Blend:
    """Return the blend without schedules and regions, that is, at full weight at all steps and everywhere."""
    return Blend(entries=tuple(replace(e, region=None, weight=without_schedules(e.weight)) for e in blend.entries))


def load_base_for(request: GenerationRequest) -> Base:
    """Load the base of a request, quantized if requested; for a recipe, with the precision that it states.

    Raises:
        BaseModelError: If the base is not found or cannot be loaded.
        ConfigError: If the base cannot be quantized on this machine.
    """
    precision = torch_dtype(request.recipe.precision) if request.recipe else None
    return load_quantized_base(request.base, request.quantization, precision=precision)


def next_image_path(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a new image in a folder: the five-digit number after the highest existing one."""
    folder = Path(folder)
    numbers = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()] if folder.is_dir() else []
    return folder / f"{max(numbers, default=-1) + 1:05d}.png"


@dataclass(frozen=True, kw_only=True)
class SavedPreset:
    """A preset file that was written."""

    preset: BlendPreset
    """Content of the file."""
    notes: tuple[str, ...]
    """Messages for the user."""


def save_request_as_preset(
    request: GenerationRequest,
    path: str | os.PathLike[str],
    load: LoadConfig,
    resolver: AdapterResolver | None = None,
    *,
    name: str,
    description: str,
    force: bool,
) -> SavedPreset:
    """Write a request as a preset, with the hashes of all adapters.

    Args:
        request: The request; tags in its prompt become adapters of the preset.
        path: The .json file to write.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.
        name: Name of the preset; empty for the name of the file.
        description: Description of the preset.
        force: Whether an existing file may be replaced.

    Raises:
        LoRADiffusionError: If the request has no adapters, an adapter cannot be loaded, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ConfigError(f"{path}: a preset is a .json file; expected a name such as my-blend.json")
    resolver = resolver or AdapterResolver(library_folder=load.library)
    request = resolve_prompt_tags(request, resolver)
    if not request.entries:
        raise ConfigError("nothing to save; give at least one --adapter, a prompt with a tag, or --from IMAGE")
    resolved = load_and_resolve_blend(request.base, request.entries, load, resolver)
    preset = BlendPreset(
        name=name or path.stem,
        description=description,
        base=request.base,
        adapters=request.entries,
        composition=request.composition,
        settings=None if request.settings == GenerateConfig(prompt="") else request.settings,
    )
    saved = save_preset(preset, path, resolved.blend, force=force)
    return SavedPreset(preset=saved, notes=(*request.notes, *resolved.notes))
