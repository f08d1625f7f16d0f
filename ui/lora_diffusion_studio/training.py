"""Training from the studio: in a process of its own, so that a crash stays there and the studio stays usable."""

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
from lora_diffusion_studio.run_state import RunStatus, existing_or_none, format_status, read_total_steps
from lora_diffusion_studio.studio import Studio, check_name

MOST_PICTURES = 200
PURPOSES = ("style", "dreambooth")
SAMPLED = 4
"""So often samples are drawn in a run."""
THUMBNAIL_PX = 64
FIELDS = ("steps", "trigger_words", "data.instance_prompt", "samples.prompts")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as a visitor has set it."""

    name: str
    purpose: str = "style"
    base: str
    trigger: str = ""
    """Word that calls the style."""
    instance: str = ""
    """What a subject's pictures show."""
    steps: int = 0
    """0 for the default."""
    extra: str = ""
    """Other settings, `section.key=value`, a line each."""
    prompts: str = ""
    """Of the samples on the way, a line each; by default the first caption."""


class RunManager:
    """Manages the training runs of a studio, one at a time, as there is one device."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.process: subprocess.Popen[bytes] | None = None
        self.name, self.of_steps = "", 0

    def folder(self, name: str) -> Path:
        """Where a run's pictures, log and adapter are. Raises ConfigError for a name that cannot be one."""
        return self.studio.places.output / "training" / check_name(name)

    def add_pictures(self, name: str, files: Sequence[Path]) -> list[tuple[str, str]]:
        """Copy pictures, and captions that come with them; returns names and captions. Raises ConfigError."""
        folder = self.folder(name) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        if len(files) > MOST_PICTURES:
            raise ConfigError(f"{len(files)} files are more than the studio takes; {MOST_PICTURES} at most")
        for file in files:
            target = folder / Path(file.name).name
            if file.suffix.lower() in (".txt", ".caption"):
                shutil.copyfile(file, target)
                continue
            try:
                with Image.open(file) as picture:
                    picture.verify()
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                raise ConfigError(f"{file.name}: is no picture that can be read; leave it out") from None
            shutil.copyfile(file, target)
        return self.captions(name)

    def captions(self, name: str) -> list[tuple[str, str]]:
        """Pictures of a run with their captions."""
        folder = self.folder(name) / "pictures"
        pictures = sorted(path for path in folder.glob("*") if path.suffix not in (".txt", ".caption"))
        return [(path.name, read_caption(path)) for path in pictures]

    def thumbnail(self, name: str, picture: str) -> str:
        """A small copy of a picture as a data address, so that no other file has to be served."""
        stream = io.BytesIO()
        with Image.open(self.folder(name) / "pictures" / picture) as opened:
            opened.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
            small = opened.convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            small.save(stream, format="JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"

    def write_captions(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Keep captions beside their pictures. Raises ConfigError for a picture that is not there."""
        known = {picture for picture, _ in self.captions(name)}
        for picture, caption in rows:
            if picture not in known:
                raise ConfigError(f"{picture}: is no picture of this run")
            with atomic_file((self.folder(name) / "pictures" / picture).with_suffix(".txt")) as part:
                part.write_text(f"{caption}\n", encoding="utf-8")

    def check(self, job: Job) -> str:
        """The dataset check for a run. Raises DatasetError, BaseModelError."""
        self.studio.check_base(job.base)
        data = DataConfig(folder=self.folder(job.name) / "pictures", instance_prompt=job.instance)
        return format_report(check_dataset_for_base(data, job.base, job.trigger if job.purpose == "style" else ""))

    def command_words(self, job: Job) -> list[str]:
        """Return the command line of a run. Raises ConfigError."""
        self.studio.check_base(job.base)
        if job.purpose not in PURPOSES:
            raise ConfigError(f"{job.purpose!r}: choose {' or '.join(PURPOSES)}")
        folder = self.folder(job.name)
        words = ["train", job.purpose, str(folder / "pictures"), "--output", str(folder / f"{folder.name}.safetensors")]
        words += ["--base", job.base]
        words += ["--trigger", job.trigger] if job.purpose == "style" and job.trigger else []
        words += ["--instance", job.instance] if job.purpose == "dreambooth" else []
        sets = [line.strip() for line in job.extra.splitlines() if line.strip()]
        check_allowed_settings(sets)
        sets = [*self.sample_settings(job), *([f"steps={job.steps}"] if job.steps else []), *sets]
        return [*words, *(word for each in sets for word in ("--set", each))]

    def sample_settings(self, job: Job) -> list[str]:
        """Return settings that draw sample pictures during training."""
        prompts = [line.strip() for line in job.prompts.splitlines() if line.strip()]
        first = next((caption for _, caption in self.captions(job.name) if caption), "")
        prompts = prompts or [text for text in (job.instance, first, job.trigger) if text][:1]
        every = max(1, self.steps(job) // SAMPLED)
        told = [f"samples.prompts={json.dumps(prompts, ensure_ascii=False)}", f"samples.every={every}"]
        return told if prompts else []

    def command(self, job: Job) -> str:
        """Return the command line of a run as text to copy."""
        return shlex.join(["lora-diffusion", *self.command_words(job)])

    def start(self, job: Job) -> None:
        """Begin, or go on where a run was stopped. Raises ConfigError if one is running."""
        if self.process and self.process.poll() is None:
            raise ConfigError(f"the run {self.name!r} is going on; stop it, or wait for its end")
        words = self.command_words(job)
        self.check(job)
        with (self.folder(job.name) / "said.txt").open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lora_diffusion.cli", *words], stdout=said, stderr=said
            )
        self.name, self.of_steps = job.name, self.steps(job)

    def stop(self) -> None:
        """Ask the run to save its state and end."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def steps(self, job: Job) -> int:
        """How many steps a run takes: those that are asked for, else the default of its purpose and base."""
        family = find_checkpoint(job.base).family.name
        return job.steps or int(default_settings("style" if job.purpose == "style" else "dreambooth", family)["steps"])

    def state(self, name: str) -> RunStatus:
        """How a run stands, from what it writes."""
        folder = self.folder(name)
        run, adapter = folder / f"{folder.name}-run", folder / f"{folder.name}.safetensors"
        log = [line for line in read_log(run / LOG) if "loss" in line] if (run / LOG).is_file() else []
        running = self.name == name and self.process is not None and self.process.poll() is None
        ended = None if self.process is None or self.name != name else self.process.poll()
        steps = self.of_steps if self.name == name else read_total_steps(run)
        return RunStatus(
            text=format_status(log, steps, running=running, ended=ended, said=folder / "said.txt"),
            running=running,
            losses=tuple((line["step"], line["loss"]) for line in log),
            sheet=existing_or_none(sheet_path(run)),
            report=existing_or_none(run / REPORT_FILE),
            adapter=None if running else existing_or_none(adapter),
        )

    def publish(self, name: str) -> str:
        """Put a finished adapter into the library; returns its name there. Raises ConfigError."""
        adapter = self.state(name).adapter
        if adapter is None:
            raise ConfigError(f"{name}: has no finished adapter yet")
        target = self.studio.library().folder / adapter.name
        if target.exists():
            raise ConfigError(f"{adapter.name}: is in the library already; rename that one first")
        shutil.copyfile(adapter, target)
        return target.name


def check_allowed_settings(sets: Sequence[str]) -> None:
    """Raise ConfigError for settings with a field of their own, of other paths, or that run code."""
    for each in sets:
        key = each.partition("=")[0].strip()
        if key in FIELDS:
            raise ConfigError(f"{key}: has a field of its own; set it there")
        if key in ("output", "base", "optimizer.kind") or "folder" in key or key.startswith("tracking"):
            raise ConfigError(f"{key}: is not set from the studio; use the command line")


def read_caption(picture: Path) -> str:
    found = [path for path in (picture.with_suffix(".txt"), picture.with_suffix(".caption")) if path.is_file()]
    return " ".join(found[0].read_text(encoding="utf-8", errors="replace").split()) if found else ""
