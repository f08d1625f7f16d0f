"""Writing what was planned: whole or not at all, one tensor at a time."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from lora_diffusion.core.atomic_files import atomic_file, atomic_folder
from lora_diffusion.core.background_writer import background_writer
from lora_diffusion.errors import AdapterFormatError, BaseModelError, OutputError
from lora_diffusion.formats.safetensors import header_bytes, stream_safetensors
from lora_diffusion.merging.layout import OutputFile, OutputPlan, OutputTensor
from lora_diffusion.merging.recipe import RECIPE_KEY, MergeRecipe, recipe_json
from lora_diffusion.merging.tensors import MergedTensors


def with_rows(plan: OutputPlan, appended: Mapping[str, Tensor]) -> OutputPlan:
    """The plan with room for the rows that are put below some of its tensors."""

    def add_rows(tensor: OutputTensor) -> OutputTensor:
        more = sum(appended[part.name].shape[0] for part in tensor.parts if part.name in appended)
        dtype, shape = tensor.kind
        return replace(tensor, kind=(dtype, (shape[0] + more, *shape[1:]))) if more else tensor

    def extend_file(file: OutputFile) -> OutputFile:
        return replace(file, tensors={key: add_rows(tensor) for key, tensor in file.tensors.items()})

    return replace(plan, files=tuple(extend_file(file) for file in plan.files))


def check_disk_space(output: Path, plan: OutputPlan) -> None:
    """Raise OutputError now if the weights do not fit on the disk."""
    folder = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise OutputError(
            f"{output}: needs {plan.num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; "
            "make room or give another output"
        )


OnShare = Callable[[float], None]
"""Told of the share of all tensors that is done; what it raises ends the writing, and leaves nothing."""


@contextmanager
def write_checkpoint(
    output: Path, plan: OutputPlan, merged: MergedTensors, recipe: MergeRecipe | None, on_share: OnShare | None = None
) -> Iterator[Path]:
    """A temporary file or folder with everything that is planned; it becomes the output if the block ends well.

    Raises OutputError, BaseModelError if the base is cut short, ConfigError for values beyond the type's range.
    """
    single = not plan.files[0].name
    shares = progress_ticks(sum(len(file.tensors) for file in plan.files), on_share or (lambda _: None))
    try:
        with (atomic_file if single else atomic_folder)(output) as part:
            for name, source in plan.copies.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, part / name)
            for file in plan.files:
                write_weights(part / file.name if file.name else part, file, merged, recipe, shares)
            for name, text in plan.texts.items():
                (part / name).write_text(text, encoding="utf-8")
            yield part
    except (AdapterFormatError, FileNotFoundError) as error:
        raise BaseModelError(f"the base cannot be read in full ({error}); it is damaged") from None


def progress_ticks(count: int, on_share: OnShare) -> Iterator[None]:
    """Tells of one more of `count` things each time it is asked for the next."""
    for done in range(count):
        on_share((done + 1) / count)
        yield


def write_weights(
    path: Path, file: OutputFile, merged: MergedTensors, recipe: MergeRecipe | None, shares: Iterator[None]
) -> None:
    """One weight file; holds two tensors at a time, the one that is computed and the one that is written."""
    kinds = {key: tensor.kind for key, tensor in file.tensors.items()}
    with background_writer(path) as opened, tqdm(total=len(kinds), desc="merge", unit="tensor", leave=False) as bar:

        def value(key: str) -> Tensor:
            bar.update()
            next(shares, None)
            return merged.value(file.tensors[key])

        stream_safetensors(opened, kinds, metadata_with(file, recipe), value)


def metadata_with(file: OutputFile, recipe: MergeRecipe | None) -> dict[str, str]:
    """The header's entries; an older recipe makes room."""
    metadata = {key: text for key, text in file.metadata.items() if key != RECIPE_KEY}
    return metadata | ({RECIPE_KEY: recipe_json(recipe)} if recipe else {})


def patch_header_hashes(part: Path, plan: OutputPlan, recipe: MergeRecipe, hashes: Mapping[str, str]) -> MergeRecipe:
    """The recipe with its hashes, which take the place of the blank ones in each header that was written."""
    known = recipe.model_copy(update=hashes)
    for file in plan.files:
        kinds = {key: tensor.kind for key, tensor in file.tensors.items()}
        header = header_bytes(kinds, metadata_with(file, known))
        assert len(header) == len(header_bytes(kinds, metadata_with(file, recipe))), "hashes have one length"
        with (part / file.name if file.name else part).open("r+b") as opened:
            opened.write(header)
    return known
