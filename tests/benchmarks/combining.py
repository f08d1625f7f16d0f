"""Time to combine four adapters of rank 64 into one, for all attention projections of SDXL's UNet.

    python -m tests.benchmarks.combining

Random float16 factors of the real shapes, from a UNet on the meta device. The exact sum stacks factors; compression to
rank 64 computes QR factors of the stacks and the SVD of a small matrix. It is compared with torch's SVD of the dense
delta in float32, which has the same result, measured on two modules of each shape and multiplied by the number of
modules. A second table has the time for one module of 1280 x 1280 by the sum of the ranks. CPU seconds of one thread.
Writes `combining.json` beside this script.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.factor_stack import Term
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.combine.exact_sum import combine, joint_sum
from lora_diffusion.algebra.reduce.resize import compress
from lora_diffusion.algebra.svd.svd import spectrum_of
from lora_diffusion.architectures.module_paths import ATTENTION_LEAVES, LAYOUTS, module_paths
from lora_diffusion.config.combine import RankRule
from lora_diffusion.models.load import quiet_libraries
from tests.benchmarks.full_size import CONFIGS
from tests.benchmarks.goals import at_least, at_most, not_below, write_report
from tests.benchmarks.measuring import machine

RANK = 64
WEIGHTS = (0.8, 0.6, -0.4, 0.5)
SAMPLED = 2
SIDE, STACKS = 1280, (16, 48, 64, 128, 256)
SHAPES = ([640, 640], [640, 2048], [1280, 1280], [1280, 2048])
REPEATS = 5
GOALS = {
    "whole_svd_over_compress": at_least(100),
    **{f"whole_svd/shapes/{shape}/lost_norm_differs_by": at_most(1e-5) for shape in SHAPES},
    **{
        f"one_module_of_1280_x_1280/{stack}/ratio": not_below(recorded, tolerance=0.3)
        for stack, recorded in zip(STACKS, (1229.8, 261.6, 198.4, 66.1, 17.6), strict=True)
    },
}


def attention_shapes() -> dict[str, tuple[int, int]]:
    """Return (out, in) of each attention projection of SDXL's UNet."""
    with torch.device("meta"), quiet_libraries():
        unet: Any = UNet2DConditionModel(**CONFIGS["sdxl"])
    leaves = tuple(f".{leaf}" for leaf in ATTENTION_LEAVES)
    paths = [path for path in module_paths(LAYOUTS["sdxl"]) if path.startswith("unet.") and path.endswith(leaves)]
    return {path: tuple(unet.get_submodule(path.removeprefix("unet.")).weight.shape) for path in paths}


def random_adapter(shapes: dict[str, tuple[int, int]], seed: int) -> Adapter:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).mul_(0.02).half()

    layers = {
        path: LoRALayer(down=normal(RANK, inner), up=normal(out, RANK), alpha=RANK / 2)
        for path, (out, inner) in shapes.items()
    }
    return Adapter(layers=layers, metadata=AdapterMetadata(family="sdxl"))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def whole_svd(terms: tuple[Term, ...]) -> tuple[float, float]:
    """Return the CPU seconds of the SVD of the dense delta, and the norm of the part beyond the rank."""
    delta = sum_deltas(terms)
    seconds, (_, values, _) = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
    return seconds, float(values[RANK:].double().norm())


def by_stack() -> list[dict[str, Any]]:
    """Return the median time in ms for one module, by the sum of the ranks."""
    rows: list[dict[str, Any]] = []
    for rank in STACKS:
        rng = torch.Generator().manual_seed(rank)
        layer = LoRALayer(
            down=torch.randn(rank, SIDE, generator=rng), up=torch.randn(SIDE, rank, generator=rng), alpha=1.0
        )
        delta = layer.delta()
        ours = median_ms(lambda layer=layer: spectrum_of([(1.0, layer)]))
        whole = median_ms(lambda delta=delta: torch.linalg.svd(delta, full_matrices=False))
        rows.append({"stack": rank, "ours_ms": ours, "whole_svd_ms": whole, "ratio": round(whole / ours, 1)})
    return rows


def median_ms(work: Callable[[], Any]) -> float:
    return round(1000 * statistics.median(timed(work)[0] for _ in range(REPEATS)), 2)


def main() -> None:
    torch.set_num_threads(1)
    shapes = attention_shapes()
    adapters = [random_adapter(shapes, seed) for seed in range(len(WEIGHTS))]
    pairs = zip(adapters, WEIGHTS, strict=True)
    blend = Blend(entries=tuple(WeightedAdapter(adapter=adapter, weight=weight) for adapter, weight in pairs))
    total = joint_sum(blend)
    exact_seconds = timed(lambda: combine(blend, AdapterMetadata()))[0]
    compress_seconds, (_, report) = timed(lambda: compress(total, RankRule(rank=RANK), AdapterMetadata()))
    rows: list[dict[str, Any]] = []
    for shape in sorted(set(shapes.values())):
        paths = [path for path, own in shapes.items() if own == shape]
        found = {path: whole_svd(total.layers[path]) for path in paths[:SAMPLED]}
        each = sum(seconds for seconds, _ in found.values()) / len(found)
        apart = max(abs(report.modules[path].lost / lost - 1) for path, (_, lost) in found.items())
        rows.append(
            {
                "shape": list(shape),
                "modules": len(paths),
                "measured": len(found),
                "seconds_each": round(each, 3),
                "lost_norm_differs_by": float(f"{apart:.1g}"),
            }
        )
    whole = sum(row["modules"] * row["seconds_each"] for row in rows)
    figures = {
        "machine": machine(),
        "what": f"{len(WEIGHTS)} adapters of rank {RANK}, {len(shapes)} modules, CPU seconds",
        "combine_exact_seconds": round(exact_seconds, 2),
        "compress_to_rank_64_seconds": round(compress_seconds, 2),
        "relative_error": round(report.total.relative, 4),
        "whole_svd": {
            "seconds_extrapolated": round(whole, 1),
            "how": f"measured on {SAMPLED} modules of each shape, times the modules of that shape",
            "shapes": rows,
        },
        "whole_svd_over_compress": round(whole / compress_seconds, 1),
        "one_module_of_1280_x_1280": by_stack(),
    }
    sys.exit(write_report(Path(__file__).with_suffix(".json"), figures, GOALS))


if __name__ == "__main__":
    main()
