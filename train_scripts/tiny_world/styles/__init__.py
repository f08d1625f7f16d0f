"""The same picture drawn in styles that the embedded base never sees: material for style adapters."""

from collections.abc import Callable

from PIL import Image

from train_scripts.tiny_world.styles.ink import ink
from train_scripts.tiny_world.styles.neon import neon
from train_scripts.tiny_world.styles.watercolour import watercolour

Style = Callable[..., Image.Image]

STYLES: dict[str, Style] = {"ink": ink, "watercolour": watercolour, "neon": neon}
