"""Packs of adapters with shared bases: reported errors are the actual ones, and files restore what was saved."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash, cast_adapter
from lora_diffusion.adapters.layers import DoRALayer, LoHaLayer, LoRALayer
from lora_diffusion.algebra.reduce.shared_basis import AdapterPack, share_bases, unpack_adapter
from lora_diffusion.algebra.svd.svd import spectrum_of, truncate_spectrum
from lora_diffusion.cli import main
from lora_diffusion.cli.commands.pack import Unpack
from lora_diffusion.config.adapter_files import PackConfig
from lora_diffusion.core.dtypes import tensor_bytes
from lora_diffusion.errors import AdapterFormatError, ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.adapters.pack import PACK_KEY, check_not_pack, list_packed_adapters, load_pack, save_pack
from lora_diffusion.formats.safetensors import read_header, read_safetensors, write_safetensors
from lora_diffusion.workflows.adapters.pack import pack_files, unpack_file

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.0.resnets.0.conv1"
MIDDLE = "unet.mid_block.attentions.0.proj_in"
SHAPES = {QUERY: (14, 11), CONV: (8, 3, 3, 3), MIDDLE: (9, 9)}


def new_layer(rng: torch.Generator, shape: tuple[int, ...], rank: int, alpha: float) -> LoRALayer:
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=rng)
    return LoRALayer(up=up, down=torch.randn(rank, *shape[1:], generator=rng), alpha=alpha)


def new_family(seed: int, ranks: tuple[int, ...], strengths: tuple[float, ...] = ()) -> dict[str, Adapter]:
    """Create adapters of the given ranks, the first without the convolution, the last with biases and tokens."""
    rng = torch.Generator().manual_seed(seed)
    family: dict[str, Adapter] = {}
    for number, rank in enumerate(ranks):
        paths = [path for path in SHAPES if number or path != CONV]
        alpha = strengths[number] if strengths else 1.5
        layers = {path: new_layer(rng, SHAPES[path], rank, alpha) for path in paths}
        metadata = AdapterMetadata(name=f"header {number}", family="sd1", trigger_words=(f"word{number}", "sks"))
        family[f"file-{number}"] = Adapter(layers=layers, metadata=metadata)
    tokens = {"<a.b>": {"text_encoder": torch.randn(2, 16, generator=rng)}}
    last = f"file-{len(ranks) - 1}"
    family[last] = replace(family[last], biases={CONV: torch.randn(8, generator=rng)}, tokens=tokens)
    return family


def dense(layer: Any) -> Tensor:
    """Return the delta by definition, as a float64 matrix."""
    return layer.alpha / layer.rank * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))


def true_error(before: Adapter, after: Adapter) -> float:
    lost = sum(float((dense(x) - dense(after.layers[path])).square().sum()) for path, x in before.layers.items())
    return (lost / sum(float(dense(x).square().sum()) for x in before.layers.values())) ** 0.5


families = st.builds(
    new_family,
    seed=st.integers(0, 2**31),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
)


@settings(max_examples=20)
@given(families, st.integers(1, 16), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_reported_error_includes_rounding(adapters: dict[str, Adapter], rank: int, dtype: torch.dtype) -> None:
    family = share_bases(adapters, rank, dtype)
    for name, adapter in adapters.items():
        back = unpack_adapter(family, name)
        assert family.adapters[name].error == pytest.approx(true_error(adapter, back), abs=2e-6)
        for path, layer in adapter.layers.items():
            new = back.layers[path]
            assert isinstance(new, LoRALayer) and isinstance(layer, LoRALayer)
            assert new.weight_shape == layer.weight_shape
            assert new.rank <= min(layer.rank, rank)
            assert new.up.dtype == new.down.dtype == dtype


@settings(max_examples=10)
@given(families)
def test_rank_equal_to_the_sum_of_ranks_is_exact(adapters: dict[str, Adapter]) -> None:
    family = share_bases(adapters, sum(max(x.rank for x in a.layers.values()) for a in adapters.values()))  # type: ignore[attr-defined]
    for name, adapter in adapters.items():
        assert true_error(adapter, unpack_adapter(family, name)) < 1e-5
        assert family.adapters[name].error < 1e-5


@settings(max_examples=10)
@given(families)
def test_bases_are_orthonormal_and_cores_are_the_projections(adapters: dict[str, Adapter]) -> None:
    family = share_bases(adapters, 3)
    for path, module in family.modules.items():
        left, right = module.left.double(), module.right.double()
        assert torch.allclose(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64), atol=1e-5)
        assert torch.allclose(right @ right.T, torch.eye(right.shape[0], dtype=torch.float64), atol=1e-5)
        for name, adapter in adapters.items():
            if path in adapter.layers:
                best = left.T @ dense(adapter.layers[path]) @ right.T
                assert torch.allclose(family.adapters[name].cores[path].delta().double(), best, atol=1e-4)
            else:
                assert path not in family.adapters[name].cores


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_pack_of_one_adapter_is_its_truncated_svd(seed: int, rank: int) -> None:
    adapters = new_family(seed, (4,))
    back = unpack_adapter(share_bases(adapters, rank), "file-0")
    for path, layer in adapters["file-0"].layers.items():
        best = truncate_spectrum(spectrum_of([(1.0, layer)]), rank)
        left, values, right = torch.linalg.svd(dense(layer), full_matrices=False)
        bound = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(dense(back.layers[path]), bound, atol=1e-4)
        assert torch.allclose(dense(back.layers[path]), dense(best), atol=1e-4)


def squared_errors(family: AdapterPack) -> float:
    return sum(member.error**2 for member in family.adapters.values())


@settings(max_examples=10)
@given(families)
def test_error_decreases_with_the_rank(adapters: dict[str, Adapter]) -> None:
    errors = [squared_errors(share_bases(adapters, rank)) for rank in (1, 2, 4, 8, 16)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-9


def converged_error(deltas: list[Tensor], rank: int) -> float:
    """Return the error of Ye's alternating algorithm on dense float64 deltas after 100 iterations."""
    left = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)[0][:, :rank]
    right = left
    for _ in range(100):
        right = torch.linalg.svd(torch.cat([d.T @ left for d in deltas], dim=1), full_matrices=False)[0][:, :rank]
        left = torch.linalg.svd(torch.cat([d @ right for d in deltas], dim=1), full_matrices=False)[0][:, :rank]
    return sum(float(d.square().sum() - (left.T @ d @ right).square().sum()) for d in deltas)


def test_bases_are_converged() -> None:
    """Without any iteration, the error on these inputs is 5 % higher."""
    ours = best = 0.0
    for seed in range(8):
        adapters, rank = new_family(seed, (1 + seed % 3, 2, 4)), 1 + seed % 5
        strengths = {n: sum(float(dense(x).square().sum()) for x in a.layers.values()) for n, a in adapters.items()}
        for path in SHAPES:
            deltas = [dense(a.layers[path]) / strengths[n] ** 0.5 for n, a in adapters.items() if path in a.layers]
            best += converged_error(deltas, rank)
        ours += squared_errors(share_bases(adapters, rank))
    assert ours <= 1.005 * best


def test_common_subspace_is_found() -> None:
    """Twelve adapters within a common subspace of 4 dimensions are represented exactly at rank 4."""
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(14, 4, generator=rng), torch.randn(4, 11, generator=rng)
    mixings = [(torch.randn(4, 2, generator=rng), torch.randn(2, 4, generator=rng)) for _ in range(12)]
    adapters = {
        str(n): Adapter(layers={QUERY: LoRALayer(up=left @ first, down=second @ right, alpha=2.0)})
        for n, (first, second) in enumerate(mixings)
    }
    assert max(member.error for member in share_bases(adapters, 4).adapters.values()) < 1e-5
    assert min(member.error for member in share_bases(adapters, 2).adapters.values()) > 0.05


def test_adapters_count_equally_regardless_of_their_strength() -> None:
    even = share_bases(new_family(1, (3, 3, 3)), 3)
    uneven = share_bases(new_family(1, (3, 3, 3), strengths=(1.5, 150.0, 0.015)), 3)
    errors = {name: member.error for name, member in even.adapters.items()}
    assert {name: member.error for name, member in uneven.adapters.items()} == pytest.approx(errors, abs=1e-4)


def test_layers_of_zeros_are_supported() -> None:
    adapters = new_family(2, (2, 2))
    zeros = {path: replace(x, up=torch.zeros_like(x.up)) for path, x in adapters["file-0"].layers.items()}  # type: ignore[attr-defined]
    family = share_bases({**adapters, "file-0": Adapter(layers=zeros)}, 2)
    assert family.adapters["file-0"].error == 0
    assert family.adapters["file-1"].error < 1e-5
    assert all(float(dense(layer).norm()) == 0 for layer in unpack_adapter(family, "file-0").layers.values())


def stored_bytes(family: AdapterPack, name: str) -> dict[str, bytes]:
    """Return the raw bytes of one adapter's cores and of the bases it uses."""
    member = family.adapters[name]
    tensors = {f"{path} {factor}": x for path, core in member.cores.items() for factor, x in core.factors.items()}
    for path in member.cores:
        tensors |= {f"{path} left": family.modules[path].left, f"{path} right": family.modules[path].right}
    return {key: bytes(tensor_bytes(tensor)) for key, tensor in tensors.items()}


@settings(max_examples=10)
@given(families, st.integers(1, 12), st.sampled_from([torch.float32, torch.float16]))
def test_file_restores_every_adapter(
    tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Adapter], rank: int, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("packs") / "pack.safetensors"
    family = share_bases(adapters, rank, dtype)
    save_pack(family, path)
    assert list_packed_adapters(path) == tuple(adapters)
    whole = load_pack(path)
    for name, adapter in adapters.items():
        alone = load_pack(path, [name])
        assert list(alone.adapters) == [name]
        for read in (whole, alone):
            assert stored_bytes(read, name) == stored_bytes(family, name)
            assert unpack_adapter(read, name).metadata == adapter.metadata
            assert unpack_adapter(read, name).biases.keys() == adapter.biases.keys()
            assert unpack_adapter(read, name).tokens.keys() == adapter.tokens.keys()
            assert true_error(adapter, unpack_adapter(read, name)) == pytest.approx(
                family.adapters[name].error, abs=2e-6
            )
        assert alone.adapters[name].error == pytest.approx(family.adapters[name].error, abs=1e-12)
    last = list(adapters)[-1]
    assert torch.equal(unpack_adapter(whole, last).biases[CONV], adapters[last].biases[CONV])
    words = unpack_adapter(whole, last).tokens["<a.b>"]["text_encoder"]
    assert torch.equal(words, adapters[last].tokens["<a.b>"]["text_encoder"])


def test_adapter_with_only_a_token_can_be_packed(tmp_path: Path) -> None:
    adapters = new_family(3, (2,))
    adapters["word"] = Adapter(layers={}, tokens={"<w>": {"text_encoder": torch.ones(1, 16)}})
    save_pack(share_bases(adapters, 2), tmp_path / "pack.safetensors")
    back = unpack_adapter(load_pack(tmp_path / "pack.safetensors"), "word")
    assert adapter_hash(back) == adapter_hash(adapters["word"])


def test_loading_one_adapter_does_not_read_the_others(tmp_path: Path) -> None:
    """Invalid tensors of other adapters do not matter."""
    path = tmp_path / "pack.safetensors"
    save_pack(share_bases(new_family(4, (2, 3)), 4), path)
    expected = adapter_hash(unpack_adapter(load_pack(path), "file-1"))
    tensors, entries = read_safetensors(path)
    broken = {key: torch.zeros_like(x) if key.startswith("0.") else x for key, x in tensors.items()}
    write_safetensors(path, broken, entries)
    assert adapter_hash(unpack_adapter(load_pack(path, ["file-1"]), "file-1")) == expected
    with pytest.raises(AdapterFormatError, match=r"file-0: the record and the cores do not match; the file is damaged"):
        load_pack(path)


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_rejected(rank: int) -> None:
    with pytest.raises(ConfigError, match="expected an integer of at least 1"):
        share_bases(new_family(0, (2,)), rank)


def test_incompatible_families_shapes_and_kinds_are_rejected() -> None:
    one = new_family(0, (2, 2))
    other = replace(one["file-1"], metadata=AdapterMetadata(family="sdxl"))
    with pytest.raises(FamilyMismatchError, match=r"file-0 is for SD 1.x and file-1 is for SDXL"):
        share_bases({**one, "file-1": other}, 2)
    wide = Adapter(layers={QUERY: new_layer(torch.Generator(), (14, 12), 2, 1.0)})
    with pytest.raises(ConfigError, match=rf"{QUERY}: has shape \(14, 11\) in file-0 and \(14, 12\) in wide"):
        share_bases({**one, "wide": wide}, 2)
    with pytest.raises(ConfigError, match="no adapters"):
        share_bases({}, 2)
    a, b = torch.ones(4, 2), torch.ones(2, 4)
    loha = LoHaLayer(w1_a=a, w1_b=b, w2_a=a, w2_b=b, alpha=2.0)
    dora = DoRALayer(inner=LoRALayer(up=a, down=b, alpha=1.0), magnitude=torch.ones(4, 1))
    tucker = LoRALayer(up=a[..., None, None], down=b[..., None, None], mid=torch.ones(2, 2, 3, 3), alpha=1.0)
    for layer, words in ((loha, "a LoHa layer"), (dora, "a DoRA layer"), (tucker, "LoRA with a Tucker core")):
        with pytest.raises(ConfigError, match=f"odd: {MIDDLE} is {words}; only plain LoRA can share bases"):
            share_bases({"odd": Adapter(layers={MIDDLE: layer})}, 2)


def test_packs_and_adapters_are_not_confused(tmp_path: Path) -> None:
    adapters = new_family(5, (2, 2))
    save_pack(share_bases(adapters, 2), tmp_path / "pack.safetensors")
    with pytest.raises(AdapterFormatError):
        load_adapter(tmp_path / "pack.safetensors")
    entries = read_header(tmp_path / "pack.safetensors").metadata
    with pytest.raises(AdapterFormatError, match=r"p: is a pack of 2 adapters .* `lora-diffusion library unpack`"):
        check_not_pack(entries, "p")
    save_adapter(adapters["file-0"], tmp_path / "plain.safetensors")
    check_not_pack(read_header(tmp_path / "plain.safetensors").metadata, "p")
    with pytest.raises(AdapterFormatError, match="is not a pack of adapters"):
        load_pack(tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match=r"none of its 2 adapters is named 'file-x'; did you mean 'file-[01]'"):
        load_pack(tmp_path / "pack.safetensors", ["file-x"])
    with pytest.raises(ConfigError, match="no adapter named 'file-x'"):
        unpack_adapter(load_pack(tmp_path / "pack.safetensors"), "file-x")


def without(key: str) -> Any:
    return lambda tensors, _: tensors.pop(key)


def cut(key: str) -> Any:
    return lambda tensors, _: tensors.update({key: tensors[key][:-1].clone()})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(f"left.{QUERY}"), f"no shared factors that fit {QUERY}"),
        (cut(f"left.{QUERY}"), f"no shared factors that fit {QUERY}"),
        (without("1.record"), "file-1: the record and the cores do not match"),
        (without("1.cores"), "file-1: the record and the cores do not match"),
        (cut("1.cores"), "file-1: the record and the cores do not match"),
        (cut("1.record"), "file-1: the record and the cores do not match"),
        (lambda _, entries: entries.update({PACK_KEY: "{}"}), "cannot be read"),
        (lambda _, entries: entries.update({PACK_KEY: "no"}), "cannot be read"),
    ],
)
def test_damaged_packs_are_rejected(tmp_path: Path, damage: Any, words: str) -> None:
    path = tmp_path / "pack.safetensors"
    save_pack(share_bases(new_family(6, (2, 2)), 3), path)
    tensors, entries = read_safetensors(path)
    damage(tensors, entries)
    write_safetensors(path, tensors, entries)
    with pytest.raises(AdapterFormatError, match=words):
        load_pack(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with three float16 adapters, one of them in a subfolder."""
    for name, adapter in new_family(7, (2, 3, 2)).items():
        inner = tmp_path / "in" / ("more" if name == "file-2" else "")
        save_adapter(cast_adapter(adapter, torch.float16), inner / f"{name}.safetensors")
    return tmp_path / "in"


def test_packing_and_unpacking_a_folder(files: Path, tmp_path: Path) -> None:
    pack, out = tmp_path / "pack.safetensors", tmp_path / "out"
    done = pack_files([files], pack, PackConfig(rank=4))
    sources = {path.stem: path for path in files.rglob("*.safetensors")}
    assert done.bytes_before == sum(path.stat().st_size for path in sources.values())
    assert done.bytes_after == pack.stat().st_size
    unpacked = unpack_file(pack, out)
    assert sorted(unpacked.files) == sorted(sources) == sorted(done.errors)
    assert unpacked.errors == done.errors
    for name, path in sources.items():
        before, after = load_adapter(path), load_adapter(out / f"{name}.safetensors")
        assert done.errors[name] == pytest.approx(true_error(before, after), abs=2e-6)
        assert after.metadata == before.metadata
        assert {factor.dtype for layer in after.layers.values() for factor in layer.factors.values()} == {torch.float16}
    one = unpack_file(pack, tmp_path / "one", name="file-1")
    assert one.files["file-1"].read_bytes() == (out / "file-1.safetensors").read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 1


def test_existing_files_and_inputs_are_not_overwritten(files: Path, tmp_path: Path) -> None:
    pack, out, first = tmp_path / "pack.safetensors", tmp_path / "out", files / "file-0.safetensors"
    pack_files([files], pack, PackConfig(rank=2))
    with pytest.raises(OutputError, match="already exists; choose another output, or replace it with --force"):
        pack_files([files], pack, PackConfig(rank=3))
    pack_files([files], pack, PackConfig(rank=3, force=True))
    with pytest.raises(OutputError, match="is one of the inputs"):
        pack_files([files], first, PackConfig(rank=3, force=True))
    with pytest.raises(OutputError, match=r"expected a file to write that ends in \.safetensors"):
        pack_files([files], tmp_path / "pack", PackConfig(rank=3))
    with pytest.raises(ConfigError, match="are both named 'file-0'"):
        pack_files([files, first], tmp_path / "x.safetensors", PackConfig(rank=3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no adapters in"):
        pack_files([tmp_path / "empty"], tmp_path / "x.safetensors", PackConfig(rank=3))
    unpack_file(pack, out, name="file-1")
    with pytest.raises(OutputError, match="already exists; choose another output, or replace it with --force"):
        unpack_file(pack, out)
    assert len(list(out.iterdir())) == 1
    unpack_file(pack, out, force=True)
    assert len(list(out.iterdir())) == 3
    with pytest.raises(OutputError, match="is the pack itself"):
        renamed = pack.rename(tmp_path / "file-1.safetensors")
        unpack_file(renamed, tmp_path, force=True)


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "", "a\\b"])
def test_names_with_paths_are_rejected(tmp_path: Path, name: str) -> None:
    pack = tmp_path / "pack.safetensors"
    save_pack(share_bases({name: new_family(8, (2,))["file-0"]}, 2), pack)
    with pytest.raises(ConfigError, match="which is not a valid file name"):
        unpack_file(pack, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [pack]


def test_pack_and_unpack_commands_report_sizes_and_errors(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = tmp_path / "pack.safetensors"
    command = ["library", "pack", str(files), str(pack), "--rank", "3"]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["adapters"] == 3
    assert facts["bytes_after"] == pack.stat().st_size
    worst = max(facts["errors"], key=facts["errors"].get)
    assert facts["error"] == {"worst": {worst: facts["errors"][worst]}, "median": sorted(facts["errors"].values())[1]}
    assert main([*command, "--force"]) == 0
    assert f"worst {facts['errors'][worst]:.3g} ({worst})" in capsys.readouterr().out
    Unpack(pack=pack, folder=tmp_path / "out", name="file-1").run()
    assert f"worst {facts['errors']['file-1']:.3g} (file-1)" in capsys.readouterr().out
    Unpack(pack=pack, folder=tmp_path / "all", json=True).run()
    assert json.loads(capsys.readouterr().out)["errors"] == facts["errors"]
    assert main(["library", "pack", str(pack), "--rank", "3"]) == 2
    assert "at least one adapter or folder" in capsys.readouterr().err
