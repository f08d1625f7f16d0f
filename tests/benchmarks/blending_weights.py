"""Cost and exactness of writing blends into the weights and undoing them."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.formats.adapters.load import load_adapter, load_meta_adapter
from lora_diffusion.inference.in_place import weight_patch
from lora_diffusion.models.load import Base
from tests.benchmarks.full_size import (
    RANK,
    ByHand,
    Peer,
    attention_paths,
    attention_weights,
    base_around,
    blend_of,
    copy_all,
    equal,
    new_unet,
    share_changed,
    twin,
    write_adapters,
)
from tests.benchmarks.measuring import COUNTS, OWN_ROUNDS, ROUNDS, Group, Rounds, Row, status_mb


def weights_group() -> Group:
    """Time apply, switch, new weights, undo and registration."""
    base = base_around(new_unet("sd1"), "sd1")
    rounds, changed, growth = Rounds(), dict[str, float](), 0.0
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), weight_patch(base) as patch:
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
                rounds.time(f"ours register {number}", lambda file=file: registered.append(load_meta_adapter(file)))
            growth = status_mb("VmRSS") - before
            changed |= peer_round(peer, own, rounds, i)
    rows = [rounds.row(f"apply {n} loaded", f"apply {n}") for n in COUNTS]
    rows += [rounds.row("switch to another file", "switch"), rounds.row("read a file", "read")]
    rows += [rounds.row("new weight for one of 4", "one weight")]
    rows += [rounds.row("new weights for all 4", "all weights")]
    rows += [rounds.row(f"undo {n}", f"undo {n}") for n in COUNTS]
    rows += [
        Row(
            what=f"weights changed by apply and undo {n}",
            unit="share",
            ours=changed[f"ours {n}"],
            peer=changed[f"peer {n}"],
        )
        for n in COUNTS
    ]
    rows += [rounds.row(f"register, number {n}", f"register {n}") for n in (1, 8, 50)]
    rows.append(Row(what="memory growth by 50 registered adapters", unit="MB", ours=round(growth, 2)))
    times = {
        n: found for n, found in rounds.details().items() if " register " not in n or n.endswith((" 1", " 8", " 50"))
    }
    return Group(rows=rows, details={"floor_in_copies": floors(base, rounds), "times": times})


def floors(base: Base, rounds: Rounds) -> dict[str, float]:
    """Measure lower limits: a copy of the weights, and the arithmetic of the product at the speed of a large matmul."""
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
    """Time one round of this library and return the fraction of weights that differ after apply and undo.

    Asserts what must hold for a blend in addition to its speed.
    """
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
    """Time one round of the peer and return the fraction of weights that differ after fuse and unfuse.

    The weights are restored after each round.
    """
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
    """Measure a blend of 5 in half precision: its time, and its error in multiples of rounding the exact value once."""
    found = {str(dtype).removeprefix("torch."): in_half(dtype) for dtype in (torch.float16, torch.bfloat16)}
    rows = [
        row
        for name, (rounds, errors) in found.items()
        for row in (
            Row(what=f"error of 5 in {name}", unit="roundings", ours=errors["ours"], peer=errors["peer"]),
            rounds.row(f"apply 5 loaded in {name}", "apply"),
        )
    ]
    return Group(rows=rows, details={name: rounds.details() for name, (rounds, _) in found.items()})


def in_half(dtype: torch.dtype) -> tuple[Rounds, dict[str, float]]:
    base = base_around(new_unet("sd1", dtype), "sd1")
    rounds, weights, fused = Rounds(), [0.3] * 5, list[Tensor]()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), weight_patch(base) as patch:
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
    """Return the norms of the differences from the blend in float64, over all modules."""
    squares = Counter[str]()
    for found, base, first, second in zip(layers, own, ours, theirs, strict=True):
        deltas = (w * x.scale * x.up.double() @ x.down.double() for w, x in zip(weights, found, strict=True))
        exact = sum(deltas, base.double())
        for name, value in (("once", exact.to(base.dtype)), ("ours", first), ("peer", second)):
            squares[name] += float((value.double() - exact).square().sum())  # type: ignore[assignment]
    return {name: square**0.5 for name, square in squares.items()}
