"""Flags derive from the settings classes: names, defaults and help texts are declared only there."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro
from pydantic.fields import FieldInfo

from lora_diffusion import cli
from lora_diffusion.cli import COMMANDS, command_class, main
from lora_diffusion.cli.flags import format_default, given_settings
from lora_diffusion.config.adapter_files import ConvertConfig, ExtractConfig, PackConfig, PruneConfig
from lora_diffusion.config.combine import CombineConfig, ConsensusConfig, RankRule
from lora_diffusion.config.defaults import DefaultsConfig, QuickTrainConfig
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, BaseConfig, GenerateConfig, LoadConfig
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BlendPreset, Composition
from lora_diffusion.config.settings import Settings
from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.config.train import DataConfig, SamplesConfig
from lora_diffusion.core.tables import format_table

SAMPLING = (GenerateConfig, Composition, BaseConfig, LoadConfig)
SETTINGS: dict[str, tuple[type[Settings], ...]] = {
    **dict.fromkeys(("generate", "grid", "blocks"), SAMPLING),
    "preset": (*SAMPLING, BlendPreset),
    "merge": (MergeConfig, LoadConfig),
    "distill": (DistillConfig, Composition, BaseConfig, LoadConfig),
    "combine": (RankRule, ConsensusConfig, CombineConfig),
    "resize": (RankRule, CombineConfig),
    "extract": (RankRule, ExtractConfig),
    "approximate": (RankRule, ExtractConfig),
    "prune": (PruneConfig,),
    "convert": (ConvertConfig,),
    "library pack": (PackConfig,),
    "train style": (DefaultsConfig, QuickTrainConfig),
    "train dreambooth": (DefaultsConfig, QuickTrainConfig),
    **dict.fromkeys(("dataset check", "methods"), (BaseConfig,)),
    **dict.fromkeys(("analyze", "inspect", "verify"), (LoadConfig,)),
    "ui": (StudioConfig,),
}
"""Settings classes of each command that has some; those that come first win."""


def one_line(text: str) -> str:
    return " ".join(text.split())


def help_by_flag(command: str) -> dict[str, str]:
    """Help text with default of each flag of a command, by name."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        tyro.cli(command_class(command), args=["--help"])
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (line.strip("│ ") for line in printed.getvalue().splitlines()):
        if line.startswith(("--", "-h,")):
            invocation = line.partition("   ")[0]
            names = [name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", invocation)]
        for name in names:
            texts[name] = one_line(f"{texts.get(name, '')} {line}")
    return texts


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")


def settings_of(command: str) -> Iterator[tuple[str, FieldInfo]]:
    """Settings of a command that have a flag."""
    flags = help_by_flag(command)
    seen: set[str] = set()
    for kind in SETTINGS[command]:
        for name, info in kind.model_fields.items():
            if name in flags and name not in seen:
                seen.add(name)
                yield name, info


@pytest.mark.parametrize("command", SETTINGS)
def test_flags_have_help_and_default_of_the_settings_class(command: str) -> None:
    flags = help_by_flag(command)
    found = dict(settings_of(command))
    assert found
    for name, info in found.items():
        assert one_line(info.description or "MISSING") in flags[name], name
        default = info.get_default(call_default_factory=True)
        hints = re.findall(r"\((?:default: |required|repeatable)[^()]*\)", flags[name])
        assert len(hints) <= 1, flags[name]
        if not hints:
            assert default in (None, False, "") or (command, name) == ("preset", "name"), name
        elif hints[0].startswith("(default: ") and not info.is_required():
            assert hints[0].startswith(f"(default: {format_default(default)}"), name


def test_every_command_with_a_settings_class_is_listed() -> None:
    """A command whose module makes flags of a settings class must be in the table above."""
    for command, (module, _) in COMMANDS.items():
        source = (Path(cli.__file__).parent / "commands" / f"{module}.py").read_text()
        if "optional_flags(" in source and command not in ("inspect", "verify", "library", "library unpack"):
            assert command in SETTINGS, command


def test_the_command_line_declares_no_numbers_and_no_choices() -> None:
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for kind in ast.walk(ast.parse(path.read_text())):
            if not isinstance(kind, ast.ClassDef):
                continue
            for field in (each for each in kind.body if isinstance(each, ast.AnnAssign)):
                where = f"{path.name}: {kind.name}.{ast.unparse(field.target)}"
                assert "Literal" not in ast.unparse(field.annotation), where
                if isinstance(field.value, ast.Constant):
                    assert field.value.value is None or isinstance(field.value.value, bool | str), where


def test_images_have_one_default_guidance_scale() -> None:
    for kind in (GenerateConfig, DistillConfig, SamplesConfig):
        assert kind.model_fields["guidance_scale"].default == DEFAULT_GUIDANCE_SCALE


def test_the_former_name_of_ziplora_is_read_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ConsensusConfig.model_validate({"method": "zip"}).method == "ziplora"
    command = ["combine", "a.safetensors", "b.safetensors", str(tmp_path / "out.safetensors"), "--method", "zip"]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[0] == "note: --method zip is now called ziplora"


@pytest.mark.parametrize(
    ("kind", "former", "name", "value"),
    [
        (Composition, "projection", "projection_strength", 3.0),
        (ConsensusConfig, "strength", "projection_strength", 3.0),
        (DistillConfig, "most_prompts", "max_prompts", 6),
        (DataConfig, "largest_aspect", "max_aspect_ratio", 1.5),
    ],
)
def test_settings_are_read_by_their_former_names(kind: type[Settings], former: str, name: str, value: float) -> None:
    required = {Composition: {"mode": "np-lora"}, ConsensusConfig: {"method": "np-lora"}, DataConfig: {"folder": "a"}}
    settings = kind.model_validate({**required.get(kind, {}), former: value})
    assert settings == kind.model_validate({**required.get(kind, {}), name: value})
    assert settings.model_dump()[name] == value


@pytest.mark.parametrize(
    ("command", "former", "field"),
    [
        ("generate", "--projection", "composition"),
        ("combine", "--strength", "consensus"),
        ("distill", "--most-prompts", "settings"),
    ],
)
def test_former_flags_still_work(command: str, former: str, field: str) -> None:
    arguments = {"combine": ["a", "b"], "distill": ["--output", "a"]}.get(command, [])
    parsed = tyro.cli(command_class(command), args=[*arguments, former, "7"])
    assert "7" in given_settings(getattr(parsed, field)).values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["combine", "a", "b", "c", "--method", "zap"], "combine: 'method' is 'zap': input should be 'ties', 'dare'"),
        (["prune", "a", "b"], "prune: 'keep' is missing"),
        (["prune", "a", "b", "--keep", "much"], "prune: 'keep' is 'much': input should be a valid number"),
        (["convert", "a", "b"], "convert: 'to' is missing"),
        (["convert", "a", "b", "--to", "peft"], "'to' is 'peft': input should be 'native', 'kohya' or 'embedding'"),
        (["library", "pack", "a", "b", "--rank", "0"], "'rank' is '0': input should be greater than 0"),
        (["resize", "a", "b", "--first", "none"], "'first' is 'none': input should be a valid integer"),
        (["extract", "a", "b", "--base", "c", "--rank", "2", "--method", "fast"], "'exact' or 'randomized'"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tables_align_wide_characters_and_cells_of_several_lines() -> None:
    assert format_table([], [("日本", "1\n2"), ("abc", "3\a")], left=(0, 1)) == "日本  1\n      2\nabc   3"


def test_tables_are_plain_in_pipes() -> None:
    code = (
        "from lora_diffusion.core.tables import format_table\n"
        "print(format_table(['block', 'error'], [['a [b]', '0.5'], ['longer', '12']]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "block   error\na [b]     0.5\nlonger     12\n"
