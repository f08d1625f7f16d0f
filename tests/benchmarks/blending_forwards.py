"""Cost of a forward pass with a blend in the weights or in parallel: operations, time, compiled graphs, allocation."""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.core.malloc import keep_freed_memory
from lora_diffusion.inference.in_place import weight_patch
from lora_diffusion.inference.parallel import parallel_patch
from lora_diffusion.models.load import Base, load_base, module_at
from tests.benchmarks.full_size import (
    RANK,
    Peer,
    attention_paths,
    attention_weights,
    base_around,
    blend_of,
    new_adapter,
    new_unet,
    peft_model,
    twin,
    write_adapters,
)
from tests.benchmarks.measuring import COUNTS, ROUNDS, SAMPLES, Group, Rounds, Row, worker


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_group() -> Group:
    """Count the ATen calls in one forward pass of a batch of 4."""
    base = base_around(new_unet("sd1"), "sd1")
    adapters = [new_adapter(base, seed) for seed in range(32)]
    sample, words = torch.randn(4, 4, 16, 16), torch.randn(4, 77, 768)

    def count(model: Any, **more: Any) -> int:
        with CountOperations() as counter:
            model(sample, torch.tensor(500), encoder_hidden_states=words, **more)
        return counter.count

    rows: list[Row] = []

    def add(what: str, **counts: int) -> None:
        bare = rows[0].ours if rows else counts["ours"]
        assert bare
        ratios = {who: round(n / bare, 3) if rows else n for who, n in counts.items()}
        rows.append(Row(what=what, unit="x bare" if rows else "operations", **ratios))

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
        with weight_patch(base) as patch:
            for number in (1, 8, 32):
                patch.apply(blend_of(adapters, [0.1] * number))
                add(f"a forward, {number} in place", ours=count(base.pipe.unet))
        with parallel_patch(base) as patch:
            for number in (1, 8):
                patch.apply([blend_of(adapters, [0.1] * number)])
                add(f"a forward, {number} in parallel", ours=count(base.pipe.unet), peer=theirs[number])
            patch.apply([blend_of([adapter], [1.0]) for adapter in adapters[:4]])
            add("a forward, 4 blends in 4 samples", ours=count(base.pipe.unet), peer=per_sample)
    return Group(rows=rows, details={})


def projections_group() -> Group:
    """Time the 128 projections alone, on 4 samples of 256 tokens."""
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
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), parallel_patch(base) as patch:
        peer = Peer(twin(base), write_adapters(base, Path(scratch), 8))
        peer.load_all()
        wrapped = twin(base)
        peft_model(wrapped, SAMPLES)
        for _ in range(ROUNDS):
            rounds.time("bare", partial(forward, base))
            for number in COUNTS:
                patch.apply([blend_of(adapters, [0.1] * number)])
                rounds.time(f"ours {number}", partial(forward, base))
            patch.apply([blend_of([adapter], [1.0]) for adapter in adapters[:4]])
            rounds.time("ours per sample", partial(forward, base))
            patch.undo()
            for number in (1, 8):
                peer.activate([0.1] * number)
                rounds.time(f"peer {number}", partial(forward, peer.base))
            rounds.time("peer per sample", partial(forward, wrapped, adapter_names=list(SAMPLES)))

    rows = [rounds.row(f"projections, {n} in parallel", str(n), unit="bare") for n in COUNTS]
    rows.append(rounds.row("projections, 4 blends in 4 samples", "per sample", unit="bare"))
    return Group(rows=rows, details={"times": rounds.details()})


def compile_group() -> Group:
    """Count the new graphs under torch.compile, on the embedded base."""
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
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), weight_patch(base) as patch:
        model = torch.compile(base.pipe.unet, backend="eager")
        graphs = new_graphs(model)
        assert graphs > 0 and new_graphs(model) == 0
        events: dict[str, Callable[[], None]] = {
            "the first adapter": lambda: patch.apply(blend_of([first], [1.0])),
            "another adapter": lambda: patch.apply(blend_of([other], [1.0])),
            "another weight": lambda: patch.apply(blend_of([other], [0.5])),
            "another rank": lambda: patch.apply(blend_of([larger], [0.5])),
            "several adapters": lambda: patch.apply(blend_of([first, other, larger], [0.5, 0.4, 0.3])),
            "undo": patch.undo,
        }
        for name, event in events.items():
            event()
            ours[name] = new_graphs(model)
        theirs = peer_graphs(Peer(second, write_adapters(base, Path(scratch), 2)), new_graphs)
    rows = [Row(what=f"new graphs: {name}", unit="graphs", ours=ours[name], peer=theirs.get(name)) for name in events]
    return Group(rows=rows, details={"graphs_of_bare_unet": graphs, "backend": "eager"})


def peer_graphs(peer: Peer, new_graphs: Callable[[Any], int]) -> dict[str, int]:
    """Count the new graphs for the same events with PEFT, without fusing, as far as PEFT supports them."""
    model = torch.compile(peer.base.pipe.unet, backend="eager")
    new_graphs(model)
    found: dict[str, int] = {}

    def both() -> None:
        peer.load(1)
        peer.pipe.set_adapters([peer.files[1].stem], [1.0])

    events: dict[str, Callable[[], None]] = {
        "the first adapter": partial(peer.load, 0),
        "another adapter": both,
        "another weight": lambda: peer.pipe.set_adapters([peer.files[1].stem], [0.5]),
        "several adapters": lambda: peer.activate([0.5, 0.4]),
        "undo": peer.unload,
    }
    for name, event in events.items():
        event()
        found[name] = new_graphs(model)
    return found


def forwards_with(mode: str) -> None:
    """Print the time and page faults of one forward pass for each line that is read from standard input."""
    if mode == "at run time":
        assert keep_freed_memory()
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
    """Time a forward pass at 32 x 32 with glibc's allocator at its default and set to keep freed memory.

    It is set by the environment, or at run time.
    """
    modes = ("default", "by environment", "at run time")
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
    bare = medians["default"]["seconds"]
    rows = [
        Row(what=f"a forward, allocator set {mode}", unit="x default", ours=round(medians[mode]["seconds"] / bare, 3))
        for mode in modes[1:]
    ]
    return Group(rows=rows, details=medians)
