"""A merge that is stopped, killed or runs out of disk space leaves the whole output or none, and unchanged inputs."""

import hashlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.models.load import load_base, quiet_libraries
from tests.conftest import random_adapter


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def hashes(self) -> list[str]:
        files = [self.adapter, *sorted(self.base.rglob("*.safetensors"))]
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def command(self, output: Path) -> list[str]:
        merge = ["merge", "--base", str(self.base), "--adapter", str(self.adapter), "--output", str(output)]
        return [sys.executable, "-m", "lora_diffusion.cli", *merge]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Inputs:
    """Write a base whose UNet, 190 MB in float16, takes long enough to merge to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    with quiet_libraries():
        wide = {**base.pipe.unet.config, "block_out_channels": (256, 640), "norm_num_groups": 32}
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(wide)  # type: ignore[assignment]
        base.pipe.register_modules(unet=unet.half())
        base.pipe.save_pretrained(folder / "base")
    large = load_base(str(folder / "base"), device=torch.device("cpu"))
    save_adapter(random_adapter(large, seed=1, unet=("all",), text_encoders=()), folder / "adapter.safetensors")
    return Inputs(base=folder / "base", adapter=folder / "adapter.safetensors")


def start(inputs: Inputs, output: Path) -> subprocess.Popen[str]:
    """Start the command and wait until its temporary folder appears beside the output."""
    process = subprocess.Popen(inputs.command(output), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not scratch_folders(output):
        time.sleep(0.001)
    return process


def interrupt(inputs: Inputs, output: Path, number: signal.Signals, delay: float) -> tuple[str, int]:
    """Start the command, send a signal `delay` seconds after it began to write, and return its stderr and exit code."""
    process = start(inputs, output)
    time.sleep(delay)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    return text, process.returncode


def scratch_folders(output: Path) -> list[Path]:
    return list(output.parent.glob(f".{output.name}.*"))


@pytest.fixture
def delays(drawn_seed: int) -> Iterator[float]:
    """Yield random delays in seconds; they differ between runs, because the result must not depend on them."""
    rng = random.Random(drawn_seed)
    return iter(lambda: rng.uniform(0, 0.4), None)


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
    again = subprocess.run([*inputs.command(target), "--force"], capture_output=True, text=True, timeout=60)
    assert again.returncode == (2 if refused else 0), (delay, again.stderr)
    assert not scratch_folders(target), delay
    assert target.exists()


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_a_full_disk_leaves_no_output(output: str, inputs: Inputs, tmp_path: Path) -> None:
    """A limit on the file size makes writing fail in the middle of the UNet."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    before = inputs.hashes()
    done = subprocess.run(
        inputs.command(tmp_path / output), capture_output=True, text=True, timeout=60, preexec_fn=limited
    )
    assert done.returncode == 2, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert sentence.endswith("cannot be written (File too large); choose another output")
    assert output in sentence
    assert list(tmp_path.iterdir()) == []
    assert inputs.hashes() == before
