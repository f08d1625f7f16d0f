"""The public names of `lora_diffusion`: listed once, documented, and imported when first used."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_diffusion
from lora_diffusion import errors
from tests.helpers.readme_sections import find_readmes, parse_sections

ROOT = Path(__file__).parents[1]
STUB = Path(lora_diffusion.__file__).with_suffix(".pyi")
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "ray", "gradio", "numpy", "pydantic")


def stub_imports() -> dict[str, str]:
    """The module of each name in the stub."""
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names), "a name is not re-exported"
    return {alias.name: f"lora_diffusion.{node.module}" for node in imports for alias in node.names}


def test_the_stub_is_the_list_of_names() -> None:
    assert lora_diffusion.__all__ == sorted(stub_imports())


def test_each_name_is_in_the_stub_once() -> None:
    assert len(re.findall(r"^from ", STUB.read_text(encoding="utf-8"), flags=re.MULTILINE)) == len(stub_imports())


@pytest.mark.parametrize(("name", "module"), stub_imports().items())
def test_every_name_is_defined_where_the_stub_says_and_documented(name: str, module: str) -> None:
    value = getattr(lora_diffusion, name)
    assert value is getattr(importlib.import_module(module), name)
    assert value.__module__ == module, "the stub names a module that only imports it"
    assert inspect.getdoc(value)
    assert name in dir(lora_diffusion)


def test_every_exception_is_exported() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(lora_diffusion.__all__)


@pytest.mark.parametrize("path", find_readmes(ROOT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_readmes_import_from_the_package_itself(path: Path) -> None:
    for section in parse_sections(path, ROOT):
        for block in section.blocks:
            if block.language == "python" and not block.skip:
                for node in ast.walk(ast.parse(block.text)):
                    if isinstance(node, ast.ImportFrom):
                        assert not (node.module or "").startswith("lora_diffusion."), f"{section.name}: {node.module}"


def test_the_readme_lists_every_name() -> None:
    text = (ROOT / "lora_diffusion/README.md").read_text(encoding="utf-8")
    table = text[text.index("## Python API") : text.index("### Generate")]
    assert set(re.findall(r"`(\w+)`", table)) >= set(lora_diffusion.__all__)


def test_the_version_is_the_installed_one() -> None:
    assert lora_diffusion.__version__ == importlib.metadata.version("lora-diffusion")
    assert "__version__" in dir(lora_diffusion)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'lora_diffusion' has no attribute 'lora'"):
        _ = lora_diffusion.lora  # pyright: ignore


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = f"import sys, lora_diffusion; print(set({HEAVY}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
