"""A merge that is stopped, killed or runs out of disk space leaves the whole output or none, and unchanged inputs."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.models.load import load_base, quiet_libraries
from tests.conftest import random_adapter
from tests.helpers.forked_processes import run_cli, start_forked


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def hashes(self) -> list[str]:
        files = [self.adapter, *sorted(self.base.rglob("*.safetensors"))]
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def command(self, output: Path) -> list[str]:
        return ["merge", "--base", str(self.base), "--adapter", str(self.adapter), "--output", str(output)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Inputs:
    """Write a base whose UNet, 90 MB in float16, takes long enough to merge to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    with quiet_libraries():
        wide = {**base.pipe.unet.config, "block_out_channels": (192, 448), "norm_num_groups": 32}
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(wide)  # type: ignore[assignment]
        base.pipe.register_modules(unet=unet.half())
        base.pipe.save_pretrained(folder / "base")
    large = load_base(str(folder / "base"), device=torch.device("cpu"))
    save_adapter(random_adapter(large, seed=1, unet=("all",), text_encoders=()), folder / "adapter.safetensors")
    return Inputs(base=folder / "base", adapter=folder / "adapter.safetensors")


def interrupt(inputs: Inputs, output: Path, number: signal.Signals, delay: float) -> tuple[str, int]:
    """Start the command, send a signal `delay` seconds after it began to write, and return its stderr and exit code."""
    process = start_forked(run_cli, inputs.command(output), errors_of(output))
    while process.is_alive() and not scratch_folders(output):
        time.sleep(0.001)
    time.sleep(delay)
    if process.is_alive():
        os.kill(process.pid, number)
    return wait(process, output)


def wait(process: BaseProcess, output: Path) -> tuple[str, int]:
    """Wait for the end of a command, and return its stderr and exit code."""
    process.join(60)
    assert process.exitcode is not None, "the command did not end within 60 seconds"
    return errors_of(output).read_text(), process.exitcode


def run(inputs: Inputs, output: Path, *flags: str, file_limit: int | None = None) -> tuple[str, int]:
    """Run the command, and return its stderr and exit code."""
    return wait(start_forked(run_cli, [*inputs.command(output), *flags], errors_of(output), file_limit), output)


def errors_of(output: Path) -> Path:
    """Return the file for the command's stderr, which is not beside the output."""
    return output.parent.with_name(f"{output.parent.name}-stderr.txt")


def scratch_folders(output: Path) -> list[Path]:
    return list(output.parent.glob(f".{output.name}.*"))


@pytest.fixture
def delays(drawn_seed: int) -> Iterator[float]:
    """Yield random delays in seconds; they differ between runs, because the result must not depend on them."""
    rng = random.Random(drawn_seed)
    return iter(lambda: rng.uniform(0, 0.3), None)


@pytest.mark.parametrize(
    ("number", "output"), [(signal.SIGTERM, "merged"), (signal.SIGINT, "merged.safetensors")], ids=["term", "int"]
)
def test_a_stopped_merge_leaves_the_whole_output_or_none(
    number: signal.Signals, output: str, inputs: Inputs, delays: Iterator[float], tmp_path: Path
) -> None:
    before, target, delay = inputs.hashes(), tmp_path / output, next(delays)
    text, code = interrupt(inputs, target, number, delay)
    assert inputs.hashes() == before
    assert not scratch_folders(target), (delay, text)
    if code != 0:
        assert code == 128 + number, (delay, text)
        assert text.splitlines()[-1].startswith("stopped"), (delay, text)
    assert target.exists() == (code == 0), (delay, text)


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_the_next_merge_removes_temporary_files_of_a_killed_one(
    output: str, inputs: Inputs, delays: Iterator[float], tmp_path: Path
) -> None:
    before, target, delay = inputs.hashes(), tmp_path / output, next(delays)
    interrupt(inputs, target, signal.SIGKILL, delay)
    assert inputs.hashes() == before
    refused = target.is_dir()  # the first merge had finished, and an existing folder is never replaced
    text, code = run(inputs, target, "--force")
    assert code == (2 if refused else 0), (delay, text)
    assert not scratch_folders(target), delay
    assert target.exists()


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_a_full_disk_leaves_no_output(output: str, inputs: Inputs, tmp_path: Path) -> None:
    """A limit on the file size makes writing fail in the middle of the UNet."""
    before = inputs.hashes()
    text, code = run(inputs, tmp_path / output, file_limit=20_000_000)
    assert code == 2, text
    (sentence,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert sentence.endswith("cannot be written (File too large); choose another output")
    assert output in sentence
    assert list(tmp_path.iterdir()) == []
    assert inputs.hashes() == before
