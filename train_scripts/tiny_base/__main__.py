"""Train the embedded base from nothing, in stages, and export it.

    torchrun --nproc-per-node 2 -m train_scripts.tiny_base vae
    python -m train_scripts.tiny_base latents --seed 0
    python -m train_scripts.tiny_base unet
    python -m train_scripts.tiny_base export

The UNet takes many hours of one thread; the command continues where an earlier one stopped. `--resume` continues the
autoencoder from the weights in `--out`. Set OMP_WAIT_POLICY=PASSIVE on a busy machine.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from tyro.conf import subcommand

OUT = Path.home() / ".cache" / "lora_diffusion" / "tiny-base" / "tiny-sd"
"""Outside the work tree, because the training outlives it."""


@dataclass(frozen=True, kw_only=True)
class Vae:
    """Stage one: the autoencoder."""

    out: Path = OUT
    steps: int = 2400
    batch: int = 8
    """Pictures per process and step."""
    lr: float = 3e-3
    resume: bool = False

    def run(self) -> None:
        from train_scripts.tiny_base.vae_training import train_vae

        train_vae(self.out, steps=self.steps, batch=self.batch, lr=self.lr, resume=self.resume)


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Stage two: draw the training pictures and keep their latents beside `out`."""

    out: Path = OUT
    count: int = 60_000
    seed: int = 0

    def run(self) -> None:
        from train_scripts.tiny_base.latents import cache_latents

        cache_latents(self.out / "vae", self.out.parent / f"latents{self.seed}.pt", count=self.count, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Unet:
    """Stage three: UNet and text encoder together."""

    out: Path = OUT
    samples: int = 1_600_000
    """Latents to see in all, over all runs."""
    batch: int = 96
    lr: float = 2e-3

    def run(self) -> None:
        from train_scripts.tiny_base.unet_training import train_unet

        train_unet(self.out, samples=self.samples, batch=self.batch, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Stage four: the trained pipeline in float16, as it is committed."""

    out: Path = OUT
    target: Path = Path("sample_data/tiny-sd")

    def run(self) -> None:
        from train_scripts.tiny_base.export import export

        export(self.out, self.target)


Stage = (
    Annotated[Vae, subcommand("vae")]
    | Annotated[Latents, subcommand("latents")]
    | Annotated[Unet, subcommand("unet")]
    | Annotated[Export, subcommand("export")]
)


def main() -> None:
    stage = tyro.cli(Stage, description=__doc__)
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    stage.run()


if __name__ == "__main__":
    main()
