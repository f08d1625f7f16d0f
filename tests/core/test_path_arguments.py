"""Functions of core, adapters, config and prompts that take a path accept strings and any `os.PathLike`."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from PIL import Image, PngImagePlugin

import lora_diffusion
from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import WeightedAdapter
from lora_diffusion.adapters.coefficients import read_block_presets
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.adapters.masks import mask_hash
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.settings import read_toml
from lora_diffusion.core.atomic_files import (
    atomic_file,
    atomic_folder,
    check_output,
    check_writable,
    count_bytes,
    file_hash,
    sync_to_disk,
)
from lora_diffusion.core.background_writer import background_writer
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.prompts.image_metadata import read_infotext

PACKAGES = ("adapters", "algebra", "core", "prompts")


class PathLike:
    """A path that is neither a string nor a `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture(params=[str, Path, PathLike])
def spell(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return request.param


def test_no_public_function_takes_only_a_path_object() -> None:
    found: list[str] = []
    for package in PACKAGES:
        folder = Path(lora_diffusion.__file__).parent / package
        for info in pkgutil.walk_packages([str(folder)], f"lora_diffusion.{package}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                    hints = {"".join(str(hint).split()) for hint in parameter_hints(value)}
                    found += [f"{info.name}.{name}"] if any("Path" in h and "PathLike" not in h for h in hints) else []
    assert not found, "accept str | os.PathLike[str]"


def parameter_hints(function: Callable[..., Any]) -> list[Any]:
    """The types of a function's parameters; names that are imported for type checkers only stay strings."""
    try:
        hints = get_type_hints(function)
    except NameError:
        hints = dict(function.__annotations__)
    return [hint for name, hint in hints.items() if name != "return"]


def test_files_and_folders_are_written_atomically(spell: Callable[[Path], Any], tmp_path: Path) -> None:
    with atomic_file(spell(tmp_path / "a.txt")) as part:
        part.write_text("four")
    with atomic_folder(spell(tmp_path / "folder")) as part:
        (part / "b.txt").write_text("b")
    sync_to_disk(spell(tmp_path / "a.txt"))
    assert (tmp_path / "folder" / "b.txt").read_text() == "b"
    assert count_bytes(spell(tmp_path / "a.txt")) == 4
    assert count_bytes(spell(tmp_path / "folder")) == 1


def test_a_background_writer_opens_it(spell: Callable[[Path], Any], tmp_path: Path) -> None:
    with background_writer(spell(tmp_path / "a.bin")) as writer:
        writer.write(b"abc")
    assert file_hash(spell(tmp_path / "a.bin")).startswith("ba7816bf")  # the SHA-256 of "abc" in FIPS 180-4


def test_outputs_are_checked(spell: Callable[[Path], Any], tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    source.touch()
    check_writable(spell(output))
    check_output(spell(output), [spell(source)], force=False)
    with pytest.raises(OutputError, match="is one of the inputs"):
        check_output(spell(source), [spell(source)], force=True)


def test_block_presets_and_masks_are_read(spell: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "presets.txt").write_text(f"MINE:{','.join(['1'] * 12)}\n")
    assert read_block_presets(spell(tmp_path / "presets.txt")) == {"MINE": ((1.0,) * 12,)}
    assert len(mask_hash(spell(tmp_path / "presets.txt"))) == 64
    with pytest.raises(ConfigError, match=r"missing\.png: cannot be read as a mask"):
        mask_hash(spell(tmp_path / "missing.png"))


def test_infotext_is_read(spell: Callable[[Path], Any], tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a house\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    info = read_infotext(spell(tmp_path / "a.png"))
    assert info is not None
    assert info.prompt == "a house"


def test_settings_are_read(spell: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "merge.toml").write_text('precision = "float16"')
    assert read_toml(spell(tmp_path / "merge.toml"), MergeConfig).precision == "float16"
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        read_toml(spell(tmp_path / "missing.toml"), MergeConfig)


def test_a_weighted_adapter_has_the_stem_of_its_path_as_name(spell: Callable[[Path], Any]) -> None:
    layer = LoRALayer(down=torch.ones(1, 2), up=torch.ones(2, 1), alpha=1.0)
    adapter = Adapter(layers={"unet.conv_in": layer})
    assert WeightedAdapter(adapter=adapter, path=spell(Path("neon.safetensors"))).name == "neon"
