"""The README is run: every bash and Python block, in order, in one folder; and its map is the tree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_diffusion.config.settings import read_toml
from lora_diffusion.config.train import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it trains, and shares two cores with the other tests
def test_every_command_and_code_block_runs(tmp_path: Path) -> None:
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL):
        if language == "python":
            commands = [[sys.executable, "-c", text]]
        else:
            commands = [shlex.split(line, comments=True) for line in text.splitlines()]
        for command in commands:
            if command[0] == "make":
                assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
                continue
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            ran += 1
    assert ran >= 10
    outputs = {p.name: p.read_bytes() for p in (tmp_path / "outputs").iterdir()}
    assert (tmp_path / "again" / "00000.png").read_bytes() == outputs["00000.png"]
    shutil.rmtree(tmp_path / "merged")


def test_the_sample_configuration_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "my-style.toml"
    path.write_text(blocks("toml")[0])
    config = read_toml(path, TrainConfig)
    assert config.data.folder == tmp_path / "pictures"
    assert (config.adapter.rank, config.trigger_words) == (16, ("sks",))


def test_the_map_of_files_is_the_tree() -> None:
    mapped = set(re.findall(r"^\| `([\w./]+)` \|", README, flags=re.MULTILINE))
    modules = {f"lora_diffusion/{p.name}" for p in (ROOT / "lora_diffusion").glob("*.py")}
    packages = {f"lora_diffusion/{p.parent.name}/" for p in (ROOT / "lora_diffusion").glob("*/__init__.py")}
    scripts = {f"train_scripts/{p.name}" for p in (ROOT / "train_scripts").glob("*.py")}
    packages |= {f"train_scripts/{p.parent.name}/" for p in (ROOT / "train_scripts").glob("*/__init__.py")}
    expected = {p for p in modules | packages | scripts if not p.endswith("__init__.py")}
    assert expected | {"sample_data/", "tests/", "ui/"} == mapped


def test_the_accelerate_launch_line_names_a_module_that_runs() -> None:
    assert "accelerate launch -m lora_diffusion.cli train" in README
    done = subprocess.run(
        [sys.executable, "-m", "lora_diffusion.cli", "train", "--help"], capture_output=True, text=True, check=False
    )
    assert "CONFIG" in done.stdout.upper()
