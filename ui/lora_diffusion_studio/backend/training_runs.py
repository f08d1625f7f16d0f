"""Training runs of the studio: their images and captions, and a separate process that trains.

A crash of the process does not affect the studio.
"""

import base64
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_diffusion.config.defaults import default_settings
from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.data.checks import format_report
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.workflows.training.dataset_check import check_dataset_for_base
from lora_diffusion.workflows.training.run import REPORT_FILE
from lora_diffusion.workflows.training.sample_sheet import sheet_path
from lora_diffusion_studio.backend.config import check_file_name
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.backend.training_status import RunStatus, format_status, read_total_steps

MAX_FILES = 200
"""Maximum number of files in one upload."""
PURPOSES = ("style", "dreambooth")
NUM_SAMPLE_SHEETS = 4
"""How many times a run generates sample images."""
THUMBNAIL_PX = 64
_CAPTION_SUFFIXES = (".txt", ".caption")
_FORM_SETTINGS = ("steps", "trigger_words", "data.instance_prompt", "samples.prompts")
"""Settings that have a field of their own on the Train tab."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The values of the Train tab."""

    name: str
    purpose: str = "style"
    """One of `PURPOSES`."""
    base: str
    trigger_word: str = ""
    """Trigger word of a style."""
    instance_prompt: str = ""
    """Prompt of a DreamBooth subject, such as `photo of sks dog`."""
    steps: int = 0
    """Number of training steps. 0 for the default."""
    settings: str = ""
    """Other settings, one `section.key=value` per line."""
    sample_prompts: str = ""
    """Prompts of the sample images, one per line. Empty for the instance prompt or the first caption."""


class TrainingRuns:
    """The training runs of a studio. One runs at a time, because there is one device."""

    def __init__(self, studio: Studio) -> None:
        """Create the runs of a studio; none is running."""
        self.studio = studio
        self._process: subprocess.Popen[bytes] | None = None
        """The process of the run that was started last."""
        self._name, self._total_steps = "", 0
        """Name and number of steps of the run that was started last."""

    def folder(self, name: str) -> Path:
        """Return the folder of a run, which contains its images, log and adapter.

        Raises:
            ConfigError: If the name is not a valid file name.
        """
        return self.studio.config.output / "training" / check_file_name(name)

    def add_files(self, name: str, files: Sequence[Path]) -> list[tuple[str, str]]:
        """Copy images and caption files into a run, and return all its images with their captions.

        Raises:
            ConfigError: If there are too many files, or one cannot be read as an image.
        """
        folder = self._image_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        if len(files) > MAX_FILES:
            raise ConfigError(f"{len(files)} files were uploaded; the studio accepts at most {MAX_FILES} at once")
        for file in files:
            if file.suffix.lower() not in _CAPTION_SUFFIXES:
                _check_image(file)
            shutil.copyfile(file, folder / file.name)
        return self.read_captions(name)

    def _image_folder(self, name: str) -> Path:
        return self.folder(name) / "pictures"

    def read_captions(self, name: str) -> list[tuple[str, str]]:
        """Return the images of a run, by file name, with their captions."""
        images = sorted(path for path in self._image_folder(name).glob("*") if path.suffix not in _CAPTION_SUFFIXES)
        return [(path.name, _read_caption(path)) for path in images]

    def write_captions(self, name: str, captions: Sequence[Sequence[str]]) -> None:
        """Write captions, given as pairs of image and caption, to text files beside the images.

        Raises:
            ConfigError: If the run does not have one of the images.
        """
        known = {image for image, _ in self.read_captions(name)}
        for image, caption in captions:
            if image not in known:
                raise ConfigError(f"{image}: this run has no such image")
            with atomic_file((self._image_folder(name) / image).with_suffix(".txt")) as part:
                part.write_text(f"{caption}\n", encoding="utf-8")

    def thumbnail_url(self, name: str, image: str) -> str:
        """Return a small copy of an image as a data URL, so that the original need not be served."""
        stream = io.BytesIO()
        with Image.open(self._image_folder(name) / image) as opened:
            opened.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
            small = opened.convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            small.save(stream, format="JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"

    def check_dataset(self, job: TrainingJob) -> str:
        """Return the report of the dataset check.

        Raises:
            DatasetError: If the images or captions are not fit for training.
            BaseModelError: If the base model cannot be read.
        """
        self.studio.check_base(job.base)
        data = DataConfig(folder=self._image_folder(job.name), instance_prompt=job.instance_prompt)
        trigger_word = job.trigger_word if job.purpose == "style" else ""
        return format_report(check_dataset_for_base(data, job.base, trigger_word))

    def format_command(self, job: TrainingJob) -> str:
        """Return the shell command of a run.

        Raises:
            ConfigError: If a setting cannot be set from the studio.
        """
        return shlex.join(["lora-diffusion", *self.command_arguments(job)])

    def command_arguments(self, job: TrainingJob) -> list[str]:
        """Return the arguments of `lora-diffusion` for a run.

        Raises:
            ConfigError: If a setting cannot be set from the studio.
        """
        self.studio.check_base(job.base)
        if job.purpose not in PURPOSES:
            raise ConfigError(f"{job.purpose!r} cannot be trained; choose {' or '.join(PURPOSES)}")
        folder = self.folder(job.name)
        output = folder / f"{folder.name}.safetensors"
        arguments = ["train", job.purpose, str(self._image_folder(job.name)), "--output", str(output)]
        arguments += ["--base", job.base]
        arguments += ["--trigger", job.trigger_word] if job.purpose == "style" and job.trigger_word else []
        arguments += ["--instance", job.instance_prompt] if job.purpose == "dreambooth" else []
        settings = [line.strip() for line in job.settings.splitlines() if line.strip()]
        _check_settings(settings)
        steps = [f"steps={job.steps}"] if job.steps else []
        settings = [*self._sample_settings(job), *steps, *settings]
        return [*arguments, *(word for each in settings for word in ("--set", each))]

    def _sample_settings(self, job: TrainingJob) -> list[str]:
        """Return the settings that generate sample images during training; empty without a prompt."""
        prompts = [line.strip() for line in job.sample_prompts.splitlines() if line.strip()]
        if not prompts:
            first_caption = next((caption for _, caption in self.read_captions(job.name) if caption), "")
            prompts = [text for text in (job.instance_prompt, first_caption, job.trigger_word) if text][:1]
        if not prompts:
            return []
        interval = max(1, self._count_steps(job) // NUM_SAMPLE_SHEETS)
        return [f"samples.prompts={json.dumps(prompts, ensure_ascii=False)}", f"samples.every={interval}"]

    def _count_steps(self, job: TrainingJob) -> int:
        family = find_checkpoint(job.base).family.name
        return job.steps or int(default_settings("style" if job.purpose == "style" else "dreambooth", family)["steps"])

    def start(self, job: TrainingJob) -> None:
        """Start a run in a separate process, or resume it if it was stopped.

        Raises:
            ConfigError: If a run is in progress, or a setting is invalid.
            DatasetError: If the images or captions are not fit for training.
        """
        if self._process and self._process.poll() is None:
            raise ConfigError(f"the run {self._name!r} is in progress; stop it, or wait until it has finished")
        arguments = self.command_arguments(job)
        self.check_dataset(job)
        with self._output_file(job.name).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lora_diffusion.cli", *arguments], stdout=output, stderr=output
            )
        self._name, self._total_steps = job.name, self._count_steps(job)

    def _output_file(self, name: str) -> Path:
        return self.folder(name) / "output.log"

    def stop(self) -> None:
        """Ask the running process to save its state and end."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def get_status(self, name: str) -> RunStatus:
        """Return the status of a run."""
        folder = self.folder(name)
        run_folder = folder / f"{folder.name}-run"
        log = [line for line in read_log(run_folder / LOG) if "loss" in line] if (run_folder / LOG).is_file() else []
        started_here = self._process is not None and self._name == name
        exit_code = self._process.poll() if self._process is not None and started_here else None
        running = started_here and exit_code is None
        total_steps = self._total_steps if started_here else read_total_steps(run_folder)
        output = self._output_file(name)
        return RunStatus(
            text=format_status(log, total_steps, running=running, exit_code=exit_code, output=output),
            running=running,
            losses=tuple((line["step"], line["loss"]) for line in log),
            sample_sheet=_existing(sheet_path(run_folder)),
            report=_existing(run_folder / REPORT_FILE),
            adapter=None if running else _existing(folder / f"{folder.name}.safetensors"),
        )

    def add_to_library(self, name: str) -> str:
        """Copy the adapter of a finished run into the library, and return its name there.

        Raises:
            ConfigError: If the run has no adapter yet, or the library has one of this name.
        """
        adapter = self.get_status(name).adapter
        if adapter is None:
            raise ConfigError(f"{name}: this run has not finished an adapter yet")
        target = self.studio.open_library().folder / adapter.name
        if target.exists():
            raise ConfigError(
                f"{adapter.name} is already in the library; rename that adapter on the Adapters tab first"
            )
        shutil.copyfile(adapter, target)
        return target.name


def _check_image(file: Path) -> None:
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ConfigError(f"{file.name} cannot be read as an image; upload images and .txt captions only") from None


def _check_settings(settings: Sequence[str]) -> None:
    """Raise ConfigError for settings that have a field of their own, set other paths, or run code."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in _FORM_SETTINGS:
            raise ConfigError(f"{key}: use the field on the Train tab instead")
        if key in ("output", "base", "optimizer.kind") or "folder" in key or key.startswith("tracking"):
            raise ConfigError(f"{key} cannot be set from the studio; use the command line")


def _read_caption(image: Path) -> str:
    files = [path for suffix in _CAPTION_SUFFIXES if (path := image.with_suffix(suffix)).is_file()]
    return " ".join(files[0].read_text(encoding="utf-8", errors="replace").split()) if files else ""


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
