"""The READMEs: commands run or say why not, links resolve, and the tables of packages and scripts are complete."""

import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from lora_diffusion.cli import main
from lora_diffusion.config.settings import read_toml
from lora_diffusion.config.train import TrainConfig
from tests.helpers.readme_sections import Block, Section, anchors, find_readmes, links, parse_sections

ROOT = Path(__file__).parents[1]
READMES = find_readmes(ROOT)
SECTIONS = [section for path in READMES for section in parse_sections(path, ROOT)]
FIRST_PAGE_LINES = 150
SECONDS = 60
"""Limit of one section, which takes at most six seconds on two idle cores."""


def readme_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def as_test(section: Section) -> object:
    """The section as a parameter; one that trains or samples is slow."""
    return pytest.param(section, id=section.name, marks=[pytest.mark.slow] if section.is_slow else [])


@pytest.mark.timeout(SECONDS)
@pytest.mark.filterwarnings("default")  # as users have them
@pytest.mark.parametrize("section", [as_test(section) for section in SECTIONS if section.runs])
def test_section(section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.delenv("LORA_DIFFUSION_LIBRARY", raising=False)
    with chdir(tmp_path):
        for block in section.blocks:
            run_block(block, f"{section.readme}:{block.line}")
    shutil.rmtree(tmp_path)  # checkpoints are large; after a failure they stay


def run_block(block: Block, place: str) -> None:
    """Run a block in the current folder: our commands and Python code in this process, which saves imports."""
    if block.file:
        Path(block.file).write_text(block.text, encoding="utf-8")
    if block.language == "python" and not block.skip:
        exec(compile(block.text, place, "exec"), {"__name__": "__main__"})
    for command in block.commands:
        if command[0] == "lora-diffusion":
            assert main(command[1:]) == 0, f"{place}: {command}"
        else:
            subprocess.run(command, check=True)


def test_the_command_of_the_readmes_is_installed() -> None:
    command = Path(sys.executable).with_name("lora-diffusion")
    assert "generate" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


def test_names_of_sections_are_unique() -> None:
    names = [section.name for section in SECTIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", READMES, ids=readme_name)
def test_every_block_runs_or_says_why_not(path: Path) -> None:
    for section in parse_sections(path, ROOT):
        for block in section.blocks:
            place = f"{section.readme}:{block.line}"
            if block.language in ("bash", "console", "python"):
                assert block.runs != bool(block.skip), f"{place}: neither runs nor says why not"
                assert not block.file, f"{place}: only a toml block is written to a file"
            if block.language == "toml":
                assert block.file, f"{place}: a toml block names its file"
            assert not block.append or block.language == "bash", f"{place}: only bash commands take arguments"


@pytest.mark.parametrize("path", READMES, ids=readme_name)
def test_settings_are_valid(path: Path, tmp_path: Path) -> None:
    for section in parse_sections(path, ROOT):
        for block in section.blocks:
            if block.language == "toml":
                file = tmp_path / block.file
                file.write_text(block.text, encoding="utf-8")
                config = read_toml(file, TrainConfig)
                assert config.data.folder == tmp_path / "pictures"


@pytest.mark.parametrize("path", READMES, ids=readme_name)
def test_links_resolve(path: Path) -> None:
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link} leads nowhere"
        page = target / "README.md" if target.is_dir() else target
        assert not anchor or anchor in anchors(page), f"{link}: {page.name} has no such heading"


@pytest.mark.parametrize("path", READMES, ids=readme_name)
def test_files_in_tables_exist(path: Path) -> None:
    for file in re.findall(
        r"`((?:lora_diffusion|train_scripts|ui|tests|sample_data)/[\w./-]+)`", path.read_text("utf-8")
    ):
        assert (ROOT / file).exists() or (path.parent / file).exists(), file


def test_make_commands_have_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line.split() for section in SECTIONS for block in section.blocks for line in block.command_lines]
    targets = {words[1] for words in lines if words[0] == "make"}
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= FIRST_PAGE_LINES


def test_every_package_and_script_is_listed() -> None:
    listed: set[str] = set()
    for readme in ("lora_diffusion/README.md", "train_scripts/README.md"):
        listed |= set(
            re.findall(r"^\| `([\w./]+)` \|", (ROOT / readme).read_text(encoding="utf-8"), flags=re.MULTILINE)
        )
    expected: set[str] = set()
    for top in ("lora_diffusion", "train_scripts"):
        expected |= {f"{top}/{p.name}" for p in (ROOT / top).glob("*.py") if p.name != "__init__.py"}
        expected |= {f"{top}/{p.parent.name}/" for p in (ROOT / top).glob("*/__init__.py")}
    assert listed == expected


def test_the_accelerate_launch_line_names_a_module_that_runs() -> None:
    commands = {line for section in SECTIONS for block in section.blocks for line in block.command_lines}
    assert "accelerate launch -m lora_diffusion.cli train my-style.toml" in commands
    done = subprocess.run(
        [sys.executable, "-m", "lora_diffusion.cli", "train", "--help"], capture_output=True, text=True, check=False
    )
    assert "CONFIG" in done.stdout.upper()
