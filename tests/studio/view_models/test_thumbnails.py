"""Thumbnails of adapters and presets."""

from pathlib import Path

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion_studio.view_models.thumbnails import make_thumbnail


def test_thumbnail_without_a_readable_image_is_a_tile(tmp_path: Path) -> None:
    assert (
        make_thumbnail("neon", None).size == make_thumbnail("neon", sample_data_folder() / "adapters" / "neon.png").size
    )
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert make_thumbnail("neon", tmp_path / "bad.png").tobytes() == make_thumbnail("neon", None).tobytes()
    assert make_thumbnail("neon", tmp_path / "gone.png").tobytes() == make_thumbnail("neon", None).tobytes()
