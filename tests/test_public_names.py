"""The names that `lora_diffusion` exports: one list, all of them there, none of them heavy to import."""

import importlib.metadata
import subprocess
import sys

import pytest

import lora_diffusion


def test_the_list_of_names_and_the_table_of_their_modules_agree() -> None:
    assert set(lora_diffusion.__all__) == set(lora_diffusion.HOMES)
    assert len(lora_diffusion.__all__) == len(set(lora_diffusion.__all__))
    assert lora_diffusion.__all__ == sorted(lora_diffusion.__all__)


@pytest.mark.parametrize("name", lora_diffusion.__all__)
def test_every_exported_name_exists_and_is_documented(name: str) -> None:
    value = getattr(lora_diffusion, name)
    assert value.__doc__
    assert name in dir(lora_diffusion)


def test_the_version_is_the_installed_one() -> None:
    assert lora_diffusion.__version__ == importlib.metadata.version("lora-diffusion")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = lora_diffusion.lora


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = (
        "import sys, lora_diffusion; print({'torch', 'diffusers', 'transformers', 'gradio', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
