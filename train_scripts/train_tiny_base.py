"""Train the embedded base from nothing, in three stages, and export it.

    torchrun --nproc-per-node 2 -m train_scripts.train_tiny_base vae
    python -m train_scripts.train_tiny_base latents
    torchrun --nproc-per-node 2 -m train_scripts.train_tiny_base unet
    python -m train_scripts.train_tiny_base export

Without `torchrun` a stage runs in one process. `--resume` continues a stage from the weights in `--out`; copy
`sample_data/tiny-sd` there to continue from the committed ones. Set OMP_WAIT_POLICY=PASSIVE on a busy machine.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from tyro.conf import subcommand


@dataclass(frozen=True, kw_only=True)
class Vae:
    """Stage one: the autoencoder."""

    out: Path = Path("runs/tiny-sd")
    steps: int = 1300
    batch: int = 8
    """Pictures per process and step."""
    lr: float = 3e-3
    resume: bool = False

    def run(self) -> None:
        from train_scripts.tiny_world.vae_training import train_vae

        train_vae(self.out, steps=self.steps, batch=self.batch, lr=self.lr, resume=self.resume)


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Stage two: draw the training pictures and keep their latents beside `out`."""

    out: Path = Path("runs/tiny-sd")
    count: int = 40_000
    seed: int = 0

    def run(self) -> None:
        from train_scripts.tiny_world.unet_training import cache_latents

        cache_latents(self.out / "vae", self.out.parent / f"latents{self.seed}.pt", count=self.count, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Unet:
    """Stage three: UNet and text encoder together."""

    out: Path = Path("runs/tiny-sd")
    steps: int = 3000
    batch: int = 24
    """Latents per process and step."""
    lr: float = 2e-3
    resume: bool = False

    def run(self) -> None:
        from train_scripts.tiny_world.unet_training import train_unet

        train_unet(self.out, steps=self.steps, batch=self.batch, lr=self.lr, resume=self.resume)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Stage four: the trained pipeline in float16, as it is committed."""

    out: Path = Path("runs/tiny-sd")
    target: Path = Path("sample_data/tiny-sd")

    def run(self) -> None:
        from train_scripts.tiny_world.unet_training import export

        export(self.out, self.target)


Stage = (
    Annotated[Vae, subcommand("vae")]
    | Annotated[Latents, subcommand("latents")]
    | Annotated[Unet, subcommand("unet")]
    | Annotated[Export, subcommand("export")]
)


def main() -> None:
    stage = tyro.cli(Stage, description=__doc__)
    if "WORLD_SIZE" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    stage.run()


if __name__ == "__main__":
    main()
