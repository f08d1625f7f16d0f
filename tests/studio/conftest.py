"""A studio with two adapters."""

import shutil
from pathlib import Path

import pytest

from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion_studio.backend.studio import Studio


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    """A studio with the adapters neon and gloop and the embedded base model."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("neon", "gloop"):
        shutil.copy(sample_data_folder() / "adapters" / f"{name}.safetensors", library)
    return Studio(StudioConfig(library=library, output=tmp_path / "out", bases=("tiny-sd",)))
