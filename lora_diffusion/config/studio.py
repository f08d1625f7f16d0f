"""Settings of the studio."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lora_diffusion.config.settings import BASE_FORMS, EMBEDDED_BASE, BaseQuantization, Settings


class StudioConfig(Settings):
    """Settings of the studio: what it offers, and who can reach it.

    Users of the studio cannot make it read or write any folder but `library` and `output`.
    """

    bases: Annotated[
        tuple[str, ...],
        Field(min_length=1, description=f"Base models to offer, the first one by default: {BASE_FORMS}."),
    ] = (EMBEDDED_BASE,)
    quantize: BaseQuantization = "none"
    library: Path | None = None
    """Folder of adapters; by default a folder in the output, with the built-in adapters."""
    output: Path = Path("studio")
    """Folder for images, presets and everything else that the studio writes."""
    host: str = "127.0.0.1"
    """Network address to listen on."""
    port: Annotated[int, Field(ge=0, lt=2**16)] | None = None
    """Network port to listen on; the first free one from 7860 by default."""
    share: bool = False
    """Open a public address through Gradio's servers."""
    password: str = ""
    """Password of the user `studio`, required if other machines can connect."""
    api: bool = False
    """Offer the endpoints `/generate` and `/adapters` to programs that use `gradio_client`."""

    @property
    def presets(self) -> Path:
        """Folder of the presets that users saved."""
        return self.output / "presets"

    @property
    def masks(self) -> Path:
        """Folder of the region masks that users painted."""
        return self.output / "masks"
