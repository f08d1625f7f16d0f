"""Size and error of a pack of 1,000 adapters with shared bases, by the rank of the bases.

    python -m tests.benchmarks.packing

Two simulated families: independent adapters, and adapters whose factors share common directions with some noise. For
comparison, the error of compressing every adapter separately by SVD to the same number of bytes.
"""

import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.reduce.shared_basis import share_bases, unpack_adapter
from lora_diffusion.algebra.svd.svd import spectrum_of
from lora_diffusion.formats.adapters.pack import load_pack, save_pack
from tests.benchmarks.goals import not_above, write_report
from tests.benchmarks.measuring import machine, status_mb

ADAPTERS, RANK = 1000, 8
COMMON_DIRECTIONS, PRIVATE_SHARE = 32, 0.1
"""Directions that a family has in common at each module, and the size of an adapter's own noise beside them."""
RANKS = (8, 32, 64, 128, 640)
WIDTHS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 320,
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": 320,
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 640,
}
"""Outputs, and inputs, of the modules."""
Spectra = Mapping[str, Mapping[str, torch.Tensor]]
GOALS = {
    **{
        f"common subspace and private noise/{rank}/{figure}": not_above(recorded, tolerance=0.05)
        for rank, share, error in (
            (8, 0.025, 0.9407),
            (32, 0.0937, 0.1356),
            (64, 0.1728, 0.1281),
            (128, 0.3308, 0.1137),
        )
        for figure, recorded in (("share_of_bytes", share), ("error/median", error))
    },
    "independent/640/error/worst": not_above(0.0006, tolerance=0.2),
    "common subspace and private noise/640/error/worst": not_above(0.0006, tolerance=0.2),
    "common subspace and private noise/32/cpu_seconds_to_read_one": not_above(0.035, tolerance=1.0),
    "cpu_seconds": not_above(95, tolerance=0.5),
    "peak_mb": not_above(660, tolerance=0.15),
}


def family(common: bool) -> dict[str, Adapter]:
    """Create random adapters in float16, by name."""
    rng = torch.Generator().manual_seed(0)
    bases = {p: [torch.randn(side, COMMON_DIRECTIONS, generator=rng) for _ in "ab"] for p, side in WIDTHS.items()}

    def factor(base: torch.Tensor) -> torch.Tensor:
        own = torch.randn(base.shape[0], RANK, generator=rng)
        mixing = torch.randn(COMMON_DIRECTIONS, RANK, generator=rng) / math.sqrt(COMMON_DIRECTIONS)
        return (base @ mixing + PRIVATE_SHARE * own if common else own) * 0.02

    def adapter(name: str) -> Adapter:
        layers = {
            path: LoRALayer(up=factor(left).half(), down=factor(right).T.contiguous().half(), alpha=float(RANK))
            for path, (left, right) in bases.items()
        }
        return Adapter(layers=layers, metadata=AdapterMetadata(name=name, family="sd1"))

    return {name: adapter(name) for name in (f"{number:04d}" for number in range(ADAPTERS))}


def spectra_of(adapters: Mapping[str, Adapter]) -> Spectra:
    """Return the singular values by adapter and module."""
    return {n: {p: spectrum_of([(1.0, x)]).values for p, x in a.layers.items()} for n, a in adapters.items()}


def alone(spectra: Spectra, rank: int) -> float:
    """Return the median error of adapters that are truncated separately, which is optimal for each of them."""
    errors: list[float] = []
    for values in spectra.values():
        lost = math.hypot(*(float(v[rank:].double().square().sum().sqrt()) for v in values.values()))
        errors.append(lost / math.hypot(*(float(v.double().square().sum().sqrt()) for v in values.values())))
    return round(median(errors), 4)


def measured(adapters: Mapping[str, Adapter], spectra: Spectra, rank: int, scratch: Path) -> dict[str, Any]:
    """Pack, write, and read one adapter back."""
    path = scratch / "pack.safetensors"
    before = 2 * sum(adapter.num_parameters for adapter in adapters.values())
    started = time.process_time()
    packed = share_bases(adapters, rank, torch.float16)
    seconds = time.process_time() - started
    save_pack(packed, path)
    started = time.process_time()
    unpack_adapter(load_pack(path, ["0500"]), "0500")
    one_member = time.process_time() - started
    errors = [part.error for part in packed.adapters.values()]
    share = path.stat().st_size / before
    same_bytes = math.floor(share * RANK)
    return {
        "rank": rank,
        "mb_before": round(before / 2**20, 1),
        "mb_after": round(path.stat().st_size / 2**20, 1),
        "share_of_bytes": round(share, 4),
        "error": {"median": round(median(errors), 4), "worst": round(max(errors), 4)},
        "alone_by_svd": {"rank": same_bytes, "share_of_bytes": same_bytes / RANK, "median": alone(spectra, same_bytes)},
        "cpu_seconds": round(seconds, 1),
        "cpu_seconds_to_read_one": round(one_member, 4),
    }


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"machine": machine(), "adapters": ADAPTERS, "rank_of_each": RANK}
    started = time.process_time()
    for kind, common in (("independent", False), ("common subspace and private noise", True)):
        adapters = family(common)
        spectra = spectra_of(adapters)
        with tempfile.TemporaryDirectory() as scratch:
            figures[kind] = [measured(adapters, spectra, rank, Path(scratch)) for rank in RANKS]
    figures["common_directions"], figures["private_share"] = COMMON_DIRECTIONS, PRIVATE_SHARE
    figures["cpu_seconds"], figures["peak_mb"] = round(time.process_time() - started), round(status_mb("VmHWM"))
    sys.exit(write_report(Path(__file__).with_suffix(".json"), figures, GOALS))


if __name__ == "__main__":
    main()
