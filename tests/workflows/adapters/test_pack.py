"""Pack and unpack files: the same adapters again, and no file overwritten."""

import json
from pathlib import Path

import pytest
import torch

from lora_diffusion.adapters.adapter import cast_adapter
from lora_diffusion.algebra.reduce.shared_basis import share_bases
from lora_diffusion.cli import main
from lora_diffusion.cli.commands.pack import Unpack
from lora_diffusion.config.adapter_files import PackConfig
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.adapters.pack import save_pack
from lora_diffusion.workflows.adapters.pack import pack_files, unpack_file
from tests.helpers.packs import new_family, true_error


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
