"""What blending costs: against copying the touched weights, a loop written by hand, and diffusers with PEFT.

    python tests/benchmarks/blending.py [--only GROUP]

SD 1.5's UNet with random weights in float32; adapters of rank 16 on its 128 attention projections, in float16
files. One thread, CPU time of the process, variants in turn within each round, the first round dropped, medians.
"Copies" are multiples of a `copy_` of the 128 weights (374 MB) in the same run. Each group runs in a process of its
own, most of them with glibc's allocator told to keep its memory (see the group `allocator`). Writes `blending.json`
beside this script.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import (
    RANK,
    ByHand,
    Peer,
    attention_paths,
    attention_weights,
    base_around,
    blend_of,
    copy_all,
    equal,
    new_adapter,
    new_unet,
    peft_model,
    pipeline_around,
    share_changed,
    twin,
    write_adapters,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.adapter import Adapter
from lora_diffusion.branching import branching
from lora_diffusion.formats.reading import load_adapter, outline_adapter
from lora_diffusion.library import find, open_library
from lora_diffusion.models import Base, load_base, module_at, quiet_libraries
from lora_diffusion.patching import Backup, patching

ROUNDS = 6
OWN_ROUNDS = 2
"""So many rounds without diffusers, which is slow, for each one with it."""
COUNTS = (1, 4, 8)
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc never gives memory back, so that it need not be fetched, and zeroed, again."""
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
SAMPLES = ("one", "two", "three", "four")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; None is not measured."""

    what: str
    unit: str = "copies"
    ours: float | None = None
    hand: float | None = None
    peer: float | None = None
    goal: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    rows: list[Row]
    details: dict[str, Any]


class Rounds:
    """CPU seconds of this process by name; the first of each warms up."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, work: Callable[[], Any]) -> None:
        started = time.process_time()
        work()
        self.seconds[name].append(time.process_time() - started)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][1:])

    def ratio(self, name: str, unit: str = "copy") -> float:
        return round(self.median(name) / self.median(unit), 3)

    def row(self, what: str, name: str, goal: float | None = None, *, unit: str = "copy") -> Row:
        """What "ours <name>", "hand <name>" and "peer <name>" took."""
        timed = {who: f"{who} {name}" for who in ("ours", "hand", "peer")}
        ratios = {who: self.ratio(full, unit) for who, full in timed.items() if full in self.seconds}
        return Row(what=what, unit="copies" if unit == "copy" else f"x {unit}", goal=goal, **ratios)

    def details(self) -> dict[str, Any]:
        """Median and range in milliseconds."""
        kept = {name: [1000 * value for value in values[1:]] for name, values in self.seconds.items()}
        return {
            n: {"ms": round(statistics.median(v), 1), "range": [round(min(v), 1), round(max(v), 1)]}
            for n, v in kept.items()
        }


def status_mb(field: str) -> float:
    """A figure of this process from the system."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def weights_group() -> Group:
    """Apply, switch, new weights, undo and registering."""
    base = base_around(new_unet("sd1"), "sd1")
    rounds, changed, growth = Rounds(), dict[str, float](), 0.0
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), patching(base) as patch:
        files = write_adapters(base, Path(scratch), 50)
        adapters = [load_adapter(file) for file in files[: COUNTS[-1]]]
        peer = Peer(twin(base), files[: COUNTS[-1]])
        own = [weight.clone() for weight in attention_weights(base)]
        hand = ByHand(base, adapters, own)
        registered: list[Adapter] = []
        for i in range(ROUNDS):
            for j in range(OWN_ROUNDS):
                rounds.time("copy", partial(copy_all, hand.live, own))
                changed |= own_round(patch, adapters, files, rounds, hand, OWN_ROUNDS * i + j)
            before = status_mb("VmRSS")
            for number, file in enumerate(files, 1):
                rounds.time(f"ours register {number}", lambda file=file: registered.append(outline_adapter(file)))
            growth = status_mb("VmRSS") - before
            changed |= peer_round(peer, own, rounds, i)
    rows = [rounds.row(f"apply {n} read already", f"apply {n}", g) for n, g in zip(COUNTS, (2, 3.5, 5), strict=True)]
    rows += [rounds.row("switch to another file", "switch", 2.2), rounds.row("read a file", "read")]
    rows += [rounds.row("new weight for one of 4", "one weight", 3.5)]
    rows += [rounds.row("new weights for all 4", "all weights", 3.5)]
    rows += [rounds.row(f"undo {n}", f"undo {n}", 1.15) for n in COUNTS]
    rows += [
        Row(
            what=f"weights other than before {n}",
            unit="share",
            ours=changed[f"ours {n}"],
            peer=changed[f"peer {n}"],
            goal=0,
        )
        for n in COUNTS
    ]
    rows += [rounds.row(f"register, number {n}", f"register {n}", 0.1) for n in (1, 8, 50)]
    rows.append(Row(what="growth by 50 registered", unit="MB", ours=round(growth, 2)))
    times = {
        n: found for n, found in rounds.details().items() if " register " not in n or n.endswith((" 1", " 8", " 50"))
    }
    return Group(rows=rows, details={"floor_in_copies": floors(base, rounds), "times": times})


def floors(base: Base, rounds: Rounds) -> dict[str, float]:
    """A copy and the product's bare arithmetic, at the rate of a large product of matrices on this machine."""
    first, second = torch.randn(2048, 2048), torch.randn(2048, 2048)
    for _ in range(ROUNDS):
        rounds.time("a large product", lambda: torch.mm(first, second))
    rate = 2 * 2048**3 / min(rounds.seconds["a large product"])
    touched = sum(weight.numel() for weight in attention_weights(base))
    products = {n: 2 * touched * n * RANK / rate / rounds.median("copy") for n in COUNTS}
    return {"gflops": round(rate / 1e9, 1), **{str(n): round(1 + product, 2) for n, product in products.items()}}


def own_round(
    patch: Any, adapters: Sequence[Adapter], files: Sequence[Path], rounds: Rounds, hand: ByHand, number: int
) -> dict[str, float]:
    """Returns the share of the weights that apply and undo have changed; asserts what a blend must be besides fast."""
    changed: dict[str, float] = {}
    for count in COUNTS:
        weights = [0.9 - 0.1 * i for i in range(count)]
        rounds.time(f"hand apply {count}", partial(hand.apply, weights))
        expected = [weight.clone() for weight in hand.live] if number == 0 else []
        copy_all(hand.live, hand.own)
        rounds.time(f"ours apply {count}", lambda weights=weights: patch.apply(blend_of(adapters, weights)))
        assert all(map(partial(torch.allclose, atol=1e-6), expected, hand.live)), "the loop by hand does something else"
        rounds.time(f"ours undo {count}", patch.undo)
        changed[f"ours {count}"] = share_changed(hand.live, hand.own)
    patch.apply(blend_of(adapters, [0.5] * 4))
    one, every = [0.5, 0.5, 0.5, 0.6 + number / 100], [0.55 + number / 100] * 4
    rounds.time("ours one weight", lambda: patch.apply(blend_of(adapters, one)))
    rounds.time("ours all weights", lambda: patch.apply(blend_of(adapters, every)))
    reweighted = [weight.clone() for weight in hand.live]
    patch.undo()
    patch.apply(blend_of(adapters, every))
    assert equal(hand.live, reweighted), "new weights are not what a fresh application gives"
    patch.undo()
    rounds.time("hand all weights", partial(hand.reweight, every))
    copy_all(hand.live, hand.own)
    patch.apply(blend_of(adapters, [1.0]))
    rounds.time("ours switch", lambda: patch.apply(blend_of([load_adapter(files[1])], [1.0])))
    patch.undo()
    rounds.time("ours read", lambda: load_adapter(files[2]))
    return changed


def peer_round(peer: Peer, own: Sequence[Tensor], rounds: Rounds, number: int) -> dict[str, float]:
    """Returns the share of the weights that fusing and unfusing has changed; they are put right each time."""
    changed: dict[str, float] = {}
    peer.unload()
    for index in range(len(peer.files)):
        rounds.time(f"peer register {index + 1}", partial(peer.load, index))
    for count in COUNTS:
        peer.activate([0.9 - 0.1 * i for i in range(count)])
        rounds.time(f"peer apply {count}", peer.fuse)
        rounds.time(f"peer undo {count}", peer.unfuse)
        changed[f"peer {count}"] = share_changed(attention_weights(peer.base), own)
        copy_all(attention_weights(peer.base), own)
    peer.activate([0.5] * 4)
    peer.fuse()
    rounds.time("peer one weight", lambda: peer.reweight([0.5, 0.5, 0.5, 0.6 + number / 100]))
    rounds.time("peer all weights", lambda: peer.reweight([0.55 + number / 100] * 4))
    peer.unfuse()
    peer.unload()
    peer.load(0)
    peer.fuse()
    rounds.time("peer switch", partial(peer.switch, 1))
    peer.unfuse()
    copy_all(attention_weights(peer.base), own)
    return changed


def rounding_group() -> Group:
    """A blend of 5 in half precision: its error, in those of rounding the exact value once, and what it costs."""
    found = {str(dtype).removeprefix("torch."): in_half(dtype) for dtype in (torch.float16, torch.bfloat16)}
    rows = [
        row
        for name, (rounds, errors) in found.items()
        for row in (
            Row(what=f"error of 5 in {name}", unit="roundings", ours=errors["ours"], peer=errors["peer"], goal=1.0),
            rounds.row(f"apply 5 read already in {name}", "apply"),
        )
    ]
    return Group(rows=rows, details={name: rounds.details() for name, (rounds, _) in found.items()})


def in_half(dtype: torch.dtype) -> tuple[Rounds, dict[str, float]]:
    base = base_around(new_unet("sd1", dtype), "sd1")
    rounds, weights, fused = Rounds(), [0.3] * 5, list[Tensor]()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), patching(base) as patch:
        files = write_adapters(base, Path(scratch), 5)
        adapters = [load_adapter(file) for file in files]
        peer = Peer(twin(base), files)
        peer.load_all()
        peer.activate(weights)
        live, theirs = attention_weights(base), attention_weights(peer.base)
        own = [weight.clone() for weight in live]
        for _ in range(ROUNDS):
            patch.undo()
            copy_all(theirs, own)
            rounds.time("copy", partial(copy_all, live, own))
            rounds.time("ours apply", lambda: patch.apply(blend_of(adapters, weights)))
            rounds.time("peer apply", peer.fuse)
            fused = [weight.clone() for weight in theirs]
            peer.unfuse()
        layers = [[adapter.layers[path] for adapter in adapters] for path in attention_paths(base)]
        errors = rounding_errors(layers, weights, own, live, fused)
    return rounds, {who: round(error / errors["once"], 4) for who, error in errors.items()}


def rounding_errors(
    layers: Sequence[Sequence[Any]],
    weights: Sequence[float],
    own: Sequence[Tensor],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
) -> dict[str, float]:
    """Norms of the differences from the blend in float64, over all modules."""
    squares = Counter[str]()
    for found, base, first, second in zip(layers, own, ours, theirs, strict=True):
        deltas = (w * x.scale * x.up.double() @ x.down.double() for w, x in zip(weights, found, strict=True))
        exact = sum(deltas, base.double())
        for name, value in (("once", exact.to(base.dtype)), ("ours", first), ("peer", second)):
            squares[name] += float((value.double() - exact).square().sum())  # type: ignore[assignment]
    return {name: square**0.5 for name, square in squares.items()}


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_group() -> Group:
    """ATen calls in one forward of a batch of 4."""
    base = base_around(new_unet("sd1"), "sd1")
    adapters = [new_adapter(base, seed) for seed in range(32)]
    sample, words = torch.randn(4, 4, 16, 16), torch.randn(4, 77, 768)

    def count(model: Any, **more: Any) -> int:
        with CountOperations() as counter:
            model(sample, torch.tensor(500), encoder_hidden_states=words, **more)
        return counter.count

    rows: list[Row] = []

    def add(what: str, goal: float | None = None, **counts: int) -> None:
        bare = rows[0].ours if rows else counts["ours"]
        assert bare
        ratios = {who: round(n / bare, 3) if rows else n for who, n in counts.items()}
        rows.append(Row(what=what, unit="x bare" if rows else "operations", goal=goal, **ratios))

    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        add("a forward", ours=count(base.pipe.unet))
        peer = Peer(twin(base), write_adapters(base, Path(scratch), 8))
        peer.load_all()
        theirs = {}
        for number in (1, 8):
            peer.activate([0.1] * number)
            theirs[number] = count(peer.base.pipe.unet)
        wrapped = peft_model(twin(base), SAMPLES)
        per_sample = count(wrapped, adapter_names=list(SAMPLES))
        with patching(base) as patch:
            for number in (1, 8, 32):
                patch.apply(blend_of(adapters, [0.1] * number))
                add(f"a forward, {number} in place", 1.0, ours=count(base.pipe.unet))
        with branching(base) as branch:
            for number in (1, 8):
                branch.apply([blend_of(adapters, [0.1] * number)])
                add(f"a forward, branch of {number}", ours=count(base.pipe.unet), peer=theirs[number])
            branch.apply([blend_of([adapter], [1.0]) for adapter in adapters[:4]])
            add("a forward, 4 blends in 4 samples", ours=count(base.pipe.unet), peer=per_sample)
    return Group(rows=rows, details={})


def projections_group() -> Group:
    """The 128 projections alone, on 4 samples of 256 tokens."""
    base = base_around(new_unet("sd1"), "sd1")
    adapters = [new_adapter(base, seed) for seed in range(8)]
    widths = {
        path: weight.shape[1] for path, weight in zip(attention_paths(base), attention_weights(base), strict=True)
    }
    inputs = {width: torch.randn(4, 256, width) for width in sorted(set(widths.values()))}

    def forward(place: Base, **more: Any) -> None:
        for path, width in widths.items():
            module_at(place, path)(inputs[width], **more)

    rounds = Rounds()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), branching(base) as branch:
        peer = Peer(twin(base), write_adapters(base, Path(scratch), 8))
        peer.load_all()
        wrapped = twin(base)
        peft_model(wrapped, SAMPLES)
        for _ in range(ROUNDS):
            rounds.time("bare", partial(forward, base))
            for number in COUNTS:
                branch.apply([blend_of(adapters, [0.1] * number)])
                rounds.time(f"ours {number}", partial(forward, base))
            branch.apply([blend_of([adapter], [1.0]) for adapter in adapters[:4]])
            rounds.time("ours per sample", partial(forward, base))
            branch.undo()
            for number in (1, 8):
                peer.activate([0.1] * number)
                rounds.time(f"peer {number}", partial(forward, peer.base))
            rounds.time("peer per sample", partial(forward, wrapped, adapter_names=list(SAMPLES)))

    rows = [rounds.row(f"projections, branch of {n}", str(n), unit="bare") for n in COUNTS]
    rows.append(rounds.row("projections, 4 blends in 4 samples", "per sample", 1.15, unit="bare"))
    return Group(rows=rows, details={"times": rounds.details()})


def compile_group() -> Group:
    """New graphs under torch.compile, on the embedded base."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.config.recompile_limit = 64
    base, second = load_base(), load_base()
    config = base.pipe.unet.config
    arguments = (
        torch.randn(2, config.in_channels, 8, 8),
        torch.tensor(5),
        torch.randn(2, 77, config.cross_attention_dim),
    )

    def new_graphs(model: Any) -> int:
        before = counters["stats"]["unique_graphs"]
        model(*arguments)
        return int(counters["stats"]["unique_graphs"] - before)

    first, other, larger = new_adapter(base, 0), new_adapter(base, 1), new_adapter(base, 2, 2 * RANK)
    ours: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), patching(base) as patch:
        model = torch.compile(base.pipe.unet, backend="eager")
        graphs = new_graphs(model)
        assert graphs > 0 and new_graphs(model) == 0
        events: dict[str, Callable[[], None]] = {
            "the first adapter": lambda: patch.apply(blend_of([first], [1.0])),
            "another one": lambda: patch.apply(blend_of([other], [1.0])),
            "another weight": lambda: patch.apply(blend_of([other], [0.5])),
            "another rank": lambda: patch.apply(blend_of([larger], [0.5])),
            "several at once": lambda: patch.apply(blend_of([first, other, larger], [0.5, 0.4, 0.3])),
            "undo": patch.undo,
        }
        for name, event in events.items():
            event()
            ours[name] = new_graphs(model)
        theirs = peer_graphs(Peer(second, write_adapters(base, Path(scratch), 2)), new_graphs)
    rows = [
        Row(what=f"new graphs: {name}", unit="graphs", ours=ours[name], peer=theirs.get(name), goal=0)
        for name in events
    ]
    return Group(rows=rows, details={"graphs_of_bare_unet": graphs, "backend": "eager"})


def peer_graphs(peer: Peer, new_graphs: Callable[[Any], int]) -> dict[str, int]:
    """The same events, unfused, as far as PEFT has them."""
    model = torch.compile(peer.base.pipe.unet, backend="eager")
    new_graphs(model)
    found: dict[str, int] = {}

    def both() -> None:
        peer.load(1)
        peer.pipe.set_adapters([peer.files[1].stem], [1.0])

    events: dict[str, Callable[[], None]] = {
        "the first adapter": partial(peer.load, 0),
        "another one": both,
        "another weight": lambda: peer.pipe.set_adapters([peer.files[1].stem], [0.5]),
        "several at once": lambda: peer.activate([0.5, 0.4]),
        "undo": peer.unload,
    }
    for name, event in events.items():
        event()
        found[name] = new_graphs(model)
    return found


@contextmanager
def peak_growth(field: str, found: dict[str, float]) -> Iterator[None]:
    """Follow a figure of this process every millisecond; its growth to the peak and to the end, in MB."""
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
    """What reading and applying a blend of 4 takes on a base from a folder."""
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
    with torch.no_grad(), patching(base, backup=backup) as patch, peak_growth("RssAnon", found):
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
            goal=0.05 if mode == "file" else None,
        )
        for mode, weights in cases
        if mode != "peer"
    ]
    return Group(
        rows=rows, details={"unet_mb": round(total, 1), **{" ".join(c): growth for c, growth in found.items()}}
    )


def switch_times(base: Base, folder: Path, count: int) -> dict[str, list[float]]:
    """Wall milliseconds of switches at random, in turn in a library of 10 and in one of 100."""
    sizes = (10, 100)
    files = write_adapters(base, folder, sizes[-1])
    times: dict[str, list[float]] = {str(size): [] for size in sizes}
    for size in sizes:
        (folder / str(size)).mkdir()
        for file in files[:size]:
            (folder / str(size) / file.name).hardlink_to(file)
    libraries = {size: open_library(folder / str(size)) for size in sizes}
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad(), patching(base) as patch:
        patch.apply(blend_of([load_adapter(files[0])], [1.0]))
        for _ in range(count):
            for size, library in libraries.items():
                name = files[int(torch.randint(size, (1,), generator=rng))].stem
                started = time.perf_counter()
                patch.apply(blend_of([load_adapter(find(library, name).path)], [1.0]))
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
    """Switches on a UNet of SDXL's size in float16; copies are of its own touched weights."""
    base = base_around(new_unet("sdxl", torch.float16), "sdxl")
    rounds, wall = Rounds(), []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), patching(base) as patch:
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


def forwards_with(mode: str) -> None:
    """For each line that comes in, print what one forward takes."""
    if mode == "at run time":
        libc = ctypes.CDLL(None)
        assert libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    unet = new_unet("sd1")
    arguments = (torch.randn(1, 4, 32, 32), torch.tensor(500), torch.randn(1, 77, 768))
    for _ in sys.stdin:
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        with torch.no_grad():
            unet(*arguments)
        seconds = time.process_time() - started
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        print(json.dumps({"seconds": round(seconds, 3), "faults": faults}), flush=True)


def allocator_group() -> Group:
    """A forward at 32 x 32 with glibc's allocator as it is, told by its environment to keep memory, and told later."""
    modes = ("as it is", "by environment", "at run time")
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    with ExitStack() as stack:
        workers = {mode: stack.enter_context(worker("forwards_with", mode, keeping=mode == modes[1])) for mode in modes}
        for _ in range(ROUNDS):
            for mode, process in workers.items():
                assert process.stdin and process.stdout
                print(file=process.stdin, flush=True)
                found[mode].append(json.loads(process.stdout.readline()))
    medians = {
        mode: {key: statistics.median(row[key] for row in forwards[1:]) for key in forwards[0]}
        for mode, forwards in found.items()
    }
    bare = medians["as it is"]["seconds"]
    rows = [
        Row(what=f"a forward, allocator told {mode}", unit="x as it is", ours=round(medians[mode]["seconds"] / bare, 3))
        for mode in modes[1:]
    ]
    return Group(rows=rows, details=medians)


GROUPS: dict[str, Callable[[], Group]] = {
    "weights": weights_group,
    "rounding": rounding_group,
    "operations": operations_group,
    "projections": projections_group,
    "compile": compile_group,
    "memory": memory_group,
    "switching": switching_group,
    "allocator": allocator_group,
    "sdxl": sdxl_group,
}
WORKERS: dict[str, Callable[..., Any]] = {
    "memory_of": memory_of,
    "forwards_with": forwards_with,
    **{name: lambda work=work: asdict(work()) for name, work in GROUPS.items()},
}


def worker(name: str, *arguments: str, keeping: bool = True) -> subprocess.Popen[str]:
    """A fresh process that does this."""
    environment = {key: value for key, value in os.environ.items() if key not in KEEPING}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", **(KEEPING if keeping else {})}
    command = [sys.executable, __file__, "--worker", name, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def in_own_process(name: str, *arguments: str, keeping: bool = True) -> Any:
    """What a worker finds in a fresh process."""
    with worker(name, *arguments, keeping=keeping) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} {arguments} failed; its own message is above")
    return json.loads(output.splitlines()[-1])


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    libraries = {name: version(name) for name in ("torch", "diffusers", "peft")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = {"processor": names[0], "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
    return {"architecture": platform.machine(), **cpu, "memory_gb": round(memory, 1), "threads": 1, **libraries}


def table(groups: dict[str, Any]) -> str:
    lines = ["| | unit | ours | by hand | diffusers + PEFT | goal | ours / by hand |", "|---|---|---|---|---|---|---|"]
    for group in groups.values():
        for row in group["rows"]:
            cells = ["" if row[key] is None else f"{row[key]:g}" for key in ("ours", "hand", "peer", "goal")]
            cells.append(f"{row['ours'] / row['hand']:.2f}" if row["hand"] else "")
            lines.append(f"| {row['what']} | {row['unit']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=GROUPS, help="run one group; the other figures stay as they are")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        name, *arguments = options.worker
        found = WORKERS[name](*arguments)
        return print(json.dumps(found)) if found is not None else None
    output = Path(__file__).with_name("blending.json")
    groups = json.loads(output.read_text())["groups"] if options.only and output.is_file() else {}
    for name in [options.only] if options.only else GROUPS:
        started, load = time.perf_counter(), round(os.getloadavg()[0], 1)
        found = in_own_process(name)
        groups[name] = {**found, "wall_seconds": round(time.perf_counter() - started), "load": load}
        ordered = {name: groups[name] for name in GROUPS if name in groups}
        output.write_text(json.dumps({"machine": machine(), "rounds": ROUNDS, "groups": ordered}, indent=1) + "\n")
    print(table(groups))


if __name__ == "__main__":
    main()
