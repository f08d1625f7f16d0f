"""Random tiny bases, built from configuration, and adapters for them; the embedded base where meaning counts."""

import os
import random
import shutil

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share the cores; what they start inherits it

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import register_random, settings

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.targets import resolve_targets
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.inference.in_place import weight_at
from lora_diffusion.models.load import Base, load_base
from tests.helpers.picture_folders import write_pictures
from tests.helpers.random_bases import write_random_sd, write_random_sdxl

NewAdapter = Callable[..., Adapter]

# How long an example takes says what else the machine does, so no deadline. `laws` tries the same examples everywhere:
# a red run is the change's own. `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("explore", deadline=None)
settings.register_profile("laws", deadline=None, derandomize=True)
settings.load_profile("laws")

FIXED_SEED = 0


class TorchRandom:
    """torch's global generator with the interface of `random.Random` that hypothesis manages."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds it weakly
register_random(TORCH_RANDOM)  # so that each example starts from the same state, also while it is shrunk


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of random tests; a failed test reports the one that it had")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the global generators before the fixtures of every test; a failed test reports the seed."""
    given = item.config.getoption("--seed")
    seed = FIXED_SEED if given is None else given
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    report_seed(item, "global generators", seed)


@pytest.fixture
def drawn_seed(request: pytest.FixtureRequest) -> int:
    """A new seed in each run, for tests of what must hold at any moment; a failed test reports the seed."""
    given = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**32) if given is None else given
    report_seed(request.node, "drawn for this run", seed)
    return seed


def report_seed(item: pytest.Item, meaning: str, seed: int) -> None:
    """Add the seed to the report of a test, which is shown if it fails."""
    item.add_report_section("setup", f"seed ({meaning})", f"{seed}; repeat with --seed={seed}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep indexes of libraries out of the user's cache folder, also in subprocesses."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:  # without it, each process would list the system's fonts again
            patch.setenv("MPLCONFIGDIR", str(user_cache / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_sd(tmp_path_factory.mktemp("bases") / "random-sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_sdxl(tmp_path_factory.mktemp("bases") / "random-sdxl")


@pytest.fixture(scope="session")
def sd(sd_folder: Path) -> Base:
    return load_base(str(sd_folder), device=torch.device("cpu"))


@pytest.fixture(scope="session")
def sdxl(sdxl_folder: Path) -> Base:
    return load_base(str(sdxl_folder), device=torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny() -> Base:
    """The embedded base."""
    return load_base(device=torch.device("cpu"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of libraries lie in the test's own folder, and no library is named by the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_DIFFUSION_LIBRARY", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for adapters."""
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def untouched(sd: Base) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of every weight of the random base; the test fails if one has changed afterwards."""
    before = {path: weight_at(sd, path).clone() for path in sd.paths}
    yield before
    assert all(torch.equal(before[path], weight_at(sd, path)) for path in sd.paths)


def random_adapter(
    base: Base,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 2.0,
    unet: tuple[str, ...] = ("attention",),
    text_encoders: tuple[str, ...] = ("attention",),
) -> Adapter:
    """Normal factors for the targets of a base, small enough to be a plausible update."""
    rng = torch.Generator().manual_seed(seed)
    layers: dict[str, LoRALayer] = {}
    for path in resolve_targets(base.paths, unet=unet, text_encoders=text_encoders):
        out, *inner = weight_at(base, path).shape
        down = torch.randn(rank, *inner, generator=rng) * 0.2
        up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=rng) * 0.2
        layers[path] = LoRALayer(down=down, up=up, alpha=alpha)
    metadata = AdapterMetadata(name=f"random-{seed}", family=base.family.name, trigger_words=("sks",))
    return Adapter(layers=layers, metadata=metadata)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder to train on."""
    return write_pictures(tmp_path / "pictures")


@pytest.fixture(scope="session")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of a style of the embedded base, with their captions."""
    folder = tmp_path_factory.mktemp("styles") / "ink"
    folder.mkdir()
    for file in sorted((sample_data_folder() / "styles" / "ink").glob("0[0-3].*")):
        shutil.copy(file, folder)
    return folder
