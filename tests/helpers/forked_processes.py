"""Processes that are forked from a server with the libraries loaded, so that each starts at once.

A new interpreter takes four to six seconds to import torch and diffusers. The server imports them once for all tests of
a worker; only tests of the import itself need a new interpreter.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.training.train import train

PRELOADED = ["lora_diffusion.cli", "lora_diffusion.workflows.merge", "lora_diffusion.training.train"]


def start_forked(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start a function of a module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run_cli(arguments: list[str], errors: Path, file_limit: int | None = None) -> None:
    """Run a command as its own process does; stderr goes to a file.

    Args:
        arguments: The command line after `lora-diffusion`.
        errors: File for stderr.
        file_limit: Size in bytes that a written file may reach, as on a disk that becomes full.
    """
    from lora_diffusion.cli import main

    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(arguments))


def run_training(config: TrainConfig) -> None:
    """Train without messages."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    train(config)


def run_distributed(config: TrainConfig, rank: int, port: int, stop_rank: int | None, output: Path) -> None:
    """Train as one of two processes of a launcher, and write what the process saw to a JSON file.

    Args:
        config: Settings of the run.
        rank: Number of this process.
        port: Port at which the processes meet.
        stop_rank: Process that sends itself SIGTERM after step 2; None to train to the end.
        output: File for `[is_main_process, steps, local_size]`, the last of which is the number of frozen parameters of
            the UNet that this process holds.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    sizes: list[int] = []

    def watch(run: Any, step: int) -> None:
        if step == 0:
            frozen = [p for p in run.base.pipe.unet.parameters() if not p.requires_grad]
            sizes.append(sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in frozen))
        if step == 2 and rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config, watch)
    output.write_text(json.dumps([result.is_main_process, result.steps, *sizes[:1]]))
