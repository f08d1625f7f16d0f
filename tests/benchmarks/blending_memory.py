"""Memory of blending, and the time to switch between many adapter files."""

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.in_place import Backup, weight_patch
from lora_diffusion.library.search import find_adapter, open_library
from lora_diffusion.models.load import Base, load_base, quiet_libraries
from tests.benchmarks.full_size import (
    Peer,
    attention_weights,
    base_around,
    blend_of,
    copy_all,
    equal,
    new_unet,
    pipeline_around,
    write_adapters,
)
from tests.benchmarks.measuring import Group, Rounds, Row, in_own_process, status_mb


@contextmanager
def peak_growth(field: str, found: dict[str, float]) -> Iterator[None]:
    """Sample a memory figure of this process every millisecond; yield its growth to the peak and to the end, in MB."""
    before, highest, done = status_mb(field), [0.0], threading.Event()

    def follow() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], status_mb(field))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        end = status_mb(field)
        found |= {"peak_mb": max(highest[0], end) - before, "after_mb": end - before}


def memory_of(mode: str, weights: str, folder: str) -> dict[str, float]:
    """Measure the memory for reading and applying a blend of 4 on a base from a folder."""
    base = load_base(str(Path(folder) / "base"))
    if weights == "copied":
        for parameter in base.pipe.unet.parameters():
            parameter.data = parameter.data.clone()
    files = sorted(Path(folder).glob("*.safetensors"))
    found: dict[str, float] = {}
    if mode == "peer":
        peer = Peer(base, files)
        with torch.no_grad(), peak_growth("RssAnon", found):
            peer.load_all()
            peer.activate([0.25] * 4)
            peer.fuse()
        return found
    backup: Backup = "file" if mode == "file" else "memory"
    with torch.no_grad(), weight_patch(base, backup=backup) as patch, peak_growth("RssAnon", found):
        patch.apply(blend_of([load_adapter(file) for file in files], [0.25] * 4))
    return found


def memory_group() -> Group:
    """Peak of the memory that a blend of 4 adds, as a share of the UNet's bytes.

    Weights that diffusers has loaded are pages of the file, and each page that is written to becomes memory of the
    process's own, whoever writes; weights that have been copied or moved are its own from the start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        base = base_around(new_unet("sd1"), "sd1")
        write_adapters(base, Path(scratch), 4)
        with quiet_libraries():
            pipeline_around(base.pipe.unet).save_pretrained(Path(scratch) / "base")
        total = sum(p.numel() * p.element_size() for p in base.pipe.unet.parameters()) / 2**20
        del base
        cases = [(mode, weights) for weights in ("mapped", "copied") for mode in ("memory", "file", "peer")]
        found = {case: in_own_process("memory_of", *case, scratch, keeping=False) for case in cases}
    shares = {case: round(growth["peak_mb"] / total, 4) for case, growth in found.items()}
    rows = [
        Row(
            what=f"peak memory, weights {weights}, originals from {mode}",
            unit="of the UNet",
            ours=shares[mode, weights],
            peer=shares["peer", weights],
        )
        for mode, weights in cases
        if mode != "peer"
    ]
    return Group(
        rows=rows, details={"unet_mb": round(total, 1), **{" ".join(c): growth for c, growth in found.items()}}
    )


def switch_times(base: Base, folder: Path, count: int) -> dict[str, list[float]]:
    """Measure the wall time in ms of random switches, alternating between a library of 10 and one of 100 adapters."""
    sizes = (10, 100)
    files = write_adapters(base, folder, sizes[-1])
    times: dict[str, list[float]] = {str(size): [] for size in sizes}
    for size in sizes:
        (folder / str(size)).mkdir()
        for file in files[:size]:
            (folder / str(size) / file.name).hardlink_to(file)
    libraries = {size: open_library(folder / str(size)) for size in sizes}
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad(), weight_patch(base) as patch:
        patch.apply(blend_of([load_adapter(files[0])], [1.0]))
        for _ in range(count):
            for size, library in libraries.items():
                name = files[int(torch.randint(size, (1,), generator=rng))].stem
                started = time.perf_counter()
                patch.apply(blend_of([load_adapter(find_adapter(library, name).path)], [1.0]))
                times[str(size)].append(1000 * (time.perf_counter() - started))
    return times


def switching_group() -> Group:
    rows, details = [], {}
    for base, count in ((load_base(), 200), (base_around(new_unet("sd1"), "sd1"), 20)):
        with tempfile.TemporaryDirectory() as scratch:
            times = switch_times(base, Path(scratch), count)
        for size, values in times.items():
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            for percent in (50, 99):
                what = f"switch on {base.name}, {size} registered, p{percent}"
                rows.append(Row(what=what, unit="ms", ours=round(cuts[percent - 1], 1)))
        details[base.name] = {"switches": count}
    return Group(rows=rows, details=details)


def sdxl_group() -> Group:
    """Time switches on a UNet of SDXL's size in float16, in multiples of a copy of its changed weights."""
    base = base_around(new_unet("sdxl", torch.float16), "sdxl")
    rounds, wall = Rounds(), []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), weight_patch(base) as patch:
        files = write_adapters(base, Path(scratch), 3)
        live = attention_weights(base)
        own, spare = ([weight.clone() for weight in live] for _ in range(2))
        patch.apply(blend_of([load_adapter(files[0])], [1.0]))
        for i in range(11):
            rounds.time("copy", partial(copy_all, spare, own))
            started = time.perf_counter()
            rounds.time("ours switch", lambda i=i: patch.apply(blend_of([load_adapter(files[(i + 1) % 3])], [1.0])))
            wall.append(1000 * (time.perf_counter() - started))
        patch.undo()
        assert equal(live, own), "undo is not exact"
    millions = sum(p.numel() for p in base.pipe.unet.parameters()) / 1e6
    rows = [
        rounds.row("switch on sdxl in float16", "switch"),
        Row(what="switch on sdxl in float16, p50", unit="ms", ours=round(statistics.median(wall[1:]), 1)),
        Row(what="switch on sdxl in float16, slowest of 10", unit="ms", ours=round(max(wall[1:]), 1)),
    ]
    return Group(rows=rows, details={"million_parameters": round(millions), "times": rounds.details()})
