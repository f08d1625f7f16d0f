"""Write a planned checkpoint one tensor at a time; after an error or interruption, no output is left behind."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
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


def add_embedding_rows(plan: OutputPlan, appended: Mapping[str, Tensor]) -> OutputPlan:
    """Enlarge the tensors of a plan to which rows are appended.

    Args:
        plan: Plan without appended rows.
        appended: Rows to append, by parameter name.
    """

    def enlarge_tensor(tensor: OutputTensor) -> OutputTensor:
        rows = sum(appended[part.name].shape[0] for part in tensor.parts if part.name in appended)
        dtype, shape = tensor.kind
        return replace(tensor, kind=(dtype, (shape[0] + rows, *shape[1:]))) if rows else tensor

    def enlarge_file(file: OutputFile) -> OutputFile:
        return replace(file, tensors={key: enlarge_tensor(tensor) for key, tensor in file.tensors.items()})

    return replace(plan, files=tuple(enlarge_file(file) for file in plan.files))


def check_disk_space(output: str | os.PathLike[str], plan: OutputPlan) -> None:
    """Check that the weights of a plan fit on the disk of the output.

    Raises:
        OutputError: If there is not enough free space.
    """
    folder = next(folder for folder in Path(output).resolve().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise OutputError(
            f"{output}: needs {plan.num_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on this disk; "
            "delete files or choose another output"
        )


OnProgress = Callable[[float], None]
"""Callback with the fraction of tensors written so far; an exception that it raises stops the merge."""


@contextmanager
def write_checkpoint(
    output: str | os.PathLike[str],
    plan: OutputPlan,
    merged: MergedTensors,
    recipe: MergeRecipe | None,
    on_progress: OnProgress | None = None,
) -> Generator[Path]:
    """Write all files of a plan to a temporary path, which replaces the output when the context exits without error.

    Args:
        output: Folder or single file to write.
        plan: Files to write.
        merged: Computes the tensors.
        recipe: Recipe to store in the headers.
        on_progress: Callback with the fraction of tensors written so far.

    Yields:
        The temporary folder or file, complete.

    Raises:
        OutputError: If the output exists as a folder with files in it, or cannot be written.
        BaseModelError: If the base is truncated.
        ConfigError: If a value exceeds the range of the output's type.
    """
    write_atomically = atomic_folder if plan.files[0].name else atomic_file
    ticks = _progress_ticks(sum(len(file.tensors) for file in plan.files), on_progress or (lambda _: None))
    try:
        with write_atomically(Path(output)) as part:
            for name, source in plan.copies.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, part / name)
            for file in plan.files:
                _write_weights(part / file.name if file.name else part, file, merged, recipe, ticks)
            for name, text in plan.texts.items():
                (part / name).write_text(text, encoding="utf-8")
            yield part
    except (AdapterFormatError, FileNotFoundError) as error:
        raise BaseModelError(f"cannot read the base ({error}); its files are damaged, download it again") from None


def _progress_ticks(count: int, on_progress: OnProgress) -> Iterator[None]:
    """Report the progress of `count` steps, one step for each item taken from the iterator."""
    for i in range(count):
        on_progress((i + 1) / count)
        yield


def _write_weights(
    path: Path, file: OutputFile, merged: MergedTensors, recipe: MergeRecipe | None, ticks: Iterator[None]
) -> None:
    """Write one weight file; two tensors are in memory at a time, one being computed and one being written."""
    kinds = {key: tensor.kind for key, tensor in file.tensors.items()}
    with background_writer(path) as stream, tqdm(total=len(kinds), desc="merge", unit="tensor", leave=False) as bar:

        def value(key: str) -> Tensor:
            bar.update()
            next(ticks, None)
            return merged.value(file.tensors[key])

        stream_safetensors(stream, kinds, _header_metadata(file, recipe), value)


def _header_metadata(file: OutputFile, recipe: MergeRecipe | None) -> dict[str, str]:
    """Return the metadata of a file's header with `recipe` instead of a recipe from an earlier merge."""
    metadata = {key: text for key, text in file.metadata.items() if key != RECIPE_KEY}
    return metadata | ({RECIPE_KEY: recipe_json(recipe)} if recipe else {})


def patch_header_hashes(
    part: str | os.PathLike[str], plan: OutputPlan, recipe: MergeRecipe, hashes: Mapping[str, str]
) -> MergeRecipe:
    """Replace the placeholder hashes in the headers of files that have been written.

    Args:
        part: Folder or single file that is being written.
        plan: Its plan.
        recipe: Recipe with placeholder hashes, as it was written.
        hashes: Hashes by the name of the recipe's field.

    Returns:
        The recipe with these hashes.
    """
    part, updated = Path(part), recipe.model_copy(update=hashes)
    for file in plan.files:
        kinds = {key: tensor.kind for key, tensor in file.tensors.items()}
        header = header_bytes(kinds, _header_metadata(file, updated))
        assert len(header) == len(header_bytes(kinds, _header_metadata(file, recipe))), "hashes have one length"
        with (part / file.name if file.name else part).open("r+b") as stream:
            stream.write(header)
    return updated
