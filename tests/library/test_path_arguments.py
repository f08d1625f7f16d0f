"""Every public function of the library that takes a path accepts a string, a `Path` and any other `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion import library
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry, BlendPreset
from lora_diffusion.library import entry, index, presets, recipe, references, search
from tests.helpers.library_files import native
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths

pytestmark = pytest.mark.usefixtures("own_cache")
ENTRIES = (BlendEntry(path="a.safetensors", weight=1.0),)
PRESET = BlendPreset(name="x", adapters=ENTRIES)
RECIPE = recipe.Recipe(base="x", base_hash="y", settings=GenerateConfig(prompt="a cat"))


def calls(folder: Path) -> dict[str, tuple[Callable[[Any], Any], Path]]:
    """Each function, with a path that it can read or write."""
    adapter = native(folder / "a.safetensors")
    blend, database, preset, image = (
        Blend.of({adapter: 1.0}),
        folder / "index.sqlite",
        folder / "preset.json",
        folder / "a.png",
    )
    presets.save_preset(PRESET, preset, blend, force=True)
    recipe.write_png(Image.new("RGB", (8, 8)), image, RECIPE)
    return {
        "entry.adapter_stem": (entry.adapter_stem, adapter),
        "entry.file_stamp": (entry.file_stamp, adapter),
        "entry.scan_folder": (entry.scan_folder, folder),
        "index.index_file": (index.index_file, folder),
        "index.load_entries": (index.load_entries, database),
        "index.refresh_index": (lambda path: index.refresh_index(path, database), folder),
        "index.save_entries": (lambda path: index.save_entries(path, {}, ["gone"]), database),
        "presets.list_presets": (presets.list_presets, folder),
        "presets.read_preset": (presets.read_preset, preset),
        "presets.save_preset": (
            lambda path: presets.save_preset(PRESET, path, blend, force=True),
            preset,
        ),
        "recipe.has_recipe": (recipe.has_recipe, image),
        "recipe.read_recipe": (recipe.read_recipe, image),
        "recipe.write_png": (lambda path: recipe.write_png(Image.new("RGB", (8, 8)), path, RECIPE), image),
        "references.make_references": (lambda path: references.make_references(blend, path), folder),
        "references.resolve_entry_paths": (
            lambda path: references.resolve_entry_paths(ENTRIES, path),
            folder,
        ),
        "search.open_library": (search.open_library, folder),
    }


def test_every_function_with_a_path_is_tested(tmp_path: Path) -> None:
    assert functions_with_paths(library) == set(calls(tmp_path))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_function_accepts_any_path(spelling: Callable[[Path], Any], tmp_path: Path) -> None:
    for name, (call, path) in calls(tmp_path).items():
        assert repr(call(spelling(path))) == repr(call(path)), name
