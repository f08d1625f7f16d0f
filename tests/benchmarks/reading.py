"""Speed of reading and converting adapter files, compared with reading the bytes, and with diffusers.

    python -m tests.benchmarks.reading

Each measurement runs in a process of its own, one after another, so that peak memory is that of the measurement alone.
The file has SD 1.5's size (rank 64, attention and feed-forward, float16). Writes `reading.json` beside this script.
"""

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.detection import block_channels
from lora_diffusion.architectures.module_paths import LAYOUTS, module_paths
from lora_diffusion.config.adapter_files import ConvertConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.formats.adapters.kohya import save_kohya
from lora_diffusion.formats.adapters.load import load_adapter, load_meta_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.workflows.adapters.convert import convert
from tests.benchmarks.goals import not_above, not_below, write_report

RANK, LARGE_RANK, RUNS, FOLDER = 64, 1400, 5, 100
READERS = ("bytes", "load_adapter", "load_meta_adapter", "diffusers")
LEAVES = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2")
GOALS = {
    **{
        f"{dialect}/{reader}/{figure}": not_above(recorded, tolerance=tolerance)
        for dialect, reader, seconds, peak_mb in (
            ("native", "load_adapter", 0.1124, 54.4),
            ("native", "outline_adapter", 0.0198, 0.418),
            ("kohya", "load_adapter", 0.0786, 55.66),
            ("kohya", "outline_adapter", 0.0269, 1.328),
        )
        for figure, recorded, tolerance in (("seconds", seconds, 0.5), ("peak_mb", peak_mb, 0.2))
    },
    "inspect_command/seconds": not_above(0.46, tolerance=0.5),
    "conversions_per_second": not_below(14.9, tolerance=0.35),
}


def full_size_adapter(rank: int) -> Adapter:
    """Create an adapter with random factors for SD 1.5's attention and feed-forward layers."""
    rng = torch.Generator().manual_seed(0)
    layers: dict[str, LoRALayer] = {}
    for path in module_paths(LAYOUTS["sd1"]):
        width = block_channels(path.removeprefix("unet."), "sd1") if path.endswith(LEAVES) else None
        if not path.startswith("unet.") or not width:
            continue
        inner = 768 if "attn2.to_k" in path or "attn2.to_v" in path else width * (4 if path.endswith("net.2") else 1)
        out = width * 8 if path.endswith("net.0.proj") else width
        down, up = torch.randn(rank, inner, generator=rng).half(), torch.randn(out, rank, generator=rng).half()
        layers[path] = LoRALayer(down=down, up=up, alpha=32.0)
    return Adapter(layers=layers, metadata=AdapterMetadata(name="benchmark", family="sd1"))


def diffusers_loader() -> Callable[[Path], Any]:
    """Return a function that loads the file into a diffusers pipeline with SD 1.5's UNet and random weights."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from lora_diffusion.models.load import load_base, quiet_libraries

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    unet = unet.half().to_empty(device="cpu")
    parts = {**load_base().pipe.components, "unet": unet}
    with quiet_libraries():
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)

    def load(path: Path) -> None:
        with quiet_libraries():
            pipe.load_lora_weights(path)

    return load


def reader(name: str) -> Callable[[Path], Any]:
    if name == "diffusers":
        return diffusers_loader()
    return {"bytes": Path.read_bytes, "load_adapter": load_adapter, "load_meta_adapter": load_meta_adapter}[name]


def measure_here(name: str, path: Path) -> None:
    """Print seconds and the growth of peak memory for one read in this process (Linux)."""
    load = reader(name)
    with path.open("rb") as file:  # so that the file is in the system's cache for all alike
        while file.read(2**20):
            pass
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    kept = load(path)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": memory_mb("VmHWM") - before}))
    del kept


def memory_mb(field: str) -> float:
    """Return a memory figure of this process from /proc in MB: VmRSS is the current size, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def measured(name: str, path: Path) -> dict[str, float]:
    """Return medians over new processes."""
    rows = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.reading", name, str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}


def inspect_seconds(path: Path) -> float:
    """Return the median duration of the whole command, including the start of the interpreter."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lora_diffusion.cli", "inspect", path], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds), 3)


def conversions_per_second(folder: Path) -> float:
    """Measure the conversion of a folder with copies of one adapter (1.4 MB) from native to kohya."""
    source = sample_data_folder() / "adapters" / "neon.safetensors"
    files = [Path(shutil.copy(source, folder / f"{i:03d}.safetensors")) for i in range(FOLDER)]
    (folder / "out").mkdir()
    started = time.perf_counter()
    for file in files:
        convert(file, folder / "out" / file.name, ConvertConfig(to="kohya"))
    return round(FOLDER / (time.perf_counter() - started), 1)


def main() -> None:
    if len(sys.argv) == 3:
        return measure_here(sys.argv[1], Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as scratch:
        native, kohya, large = (Path(scratch) / f"{name}.safetensors" for name in ("native", "kohya", "large"))
        adapter = full_size_adapter(RANK)
        save_kohya(full_size_adapter(LARGE_RANK), large)
        save_adapter(adapter, native)
        save_kohya(adapter, kohya)
        figures: dict[str, Any] = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "file_mb": round(native.stat().st_size / 2**20, 1),
            "runs": RUNS,
            "native": {name: measured(name, native) for name in READERS},
            "kohya": {name: measured(name, kohya) for name in READERS},
            "inspect_command": {
                "file_mb": round(large.stat().st_size / 2**20, 1),
                "seconds": inspect_seconds(large),
            },
            "conversions_per_second": conversions_per_second(Path(scratch)),
        }
    sys.exit(write_report(Path(__file__).with_suffix(".json"), figures, GOALS))


if __name__ == "__main__":
    main()
