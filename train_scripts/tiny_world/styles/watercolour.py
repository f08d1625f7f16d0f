"""Watercolour: thinned washes on white rough paper, darker where the pigment dried, paper left bare at the border."""

import numpy as np
from PIL import Image, ImageFilter

from train_scripts.tiny_world.render import OVERSAMPLING, SIZE_PX
from train_scripts.tiny_world.scene import Picture
from train_scripts.tiny_world.shapes import Colour, lighten, mix
from train_scripts.tiny_world.styles.drawing import Rng, extent, layers, luma, silhouette, smooth_noise

PAPER: Colour = (252, 250, 244)
INDIGO: Colour = (92, 104, 186)


def thinned(colour: Colour, *, accent: bool = False) -> Colour:
    """The pigment in much water: dark colours are lifted most, greys and blacks turn blue."""
    value = luma(colour)
    if accent and value < 0.2:
        return mix(colour, INDIGO, 0.3)
    dark = max(0.0, 1 - value / 0.45)
    grey = 1 - (max(colour) - min(colour)) / max(colour)
    cooled = mix(colour, INDIGO, min(0.75, 0.5 * dark + 0.45 * grey * (1 - value)))
    return lighten(cooled, 0.08 + 0.44 * dark + 0.6 * grey**0.5 * max(0.0, value - 0.5))


def wash(canvas: np.ndarray, mask: Image.Image, colour: Colour, flow: np.ndarray, edge_px: float) -> np.ndarray:
    """One wash of pigment laid over the canvas: uneven inside, dried richer along its edge."""
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(edge_px * 0.35)), dtype=np.float64) / 255
    inner = np.asarray(mask.filter(ImageFilter.GaussianBlur(edge_px * 1.2)), dtype=np.float64) / 255
    rim = (0.8 * np.clip(2 * (soft - inner), 0, 1))[..., None]
    thin, pigment = flow[..., None], np.array(colour, dtype=np.float64)
    body = np.array(lighten(colour, 0.55)) * thin + pigment * (1 - thin)
    body = body * (1 - rim) + (pigment**2 / 255 * 0.92) * rim
    cover = (0.92 * soft)[..., None]
    return canvas * (1 - cover) + body * cover


def bled(image: np.ndarray, rng: Rng, radius_px: float) -> np.ndarray:
    """The image with its colours run into each other where the paper was wet."""
    wet = np.clip(1.6 * smooth_noise(rng, image.shape[0], image.shape[0] / 14) - 0.6, 0, 0.6)[..., None]
    whole = Image.fromarray(image.round().clip(0, 255).astype(np.uint8))
    blurred = np.asarray(whole.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float64)
    return image * (1 - wet) + blurred * wet


def warped(image: np.ndarray, rng: Rng, amount_px: float) -> np.ndarray:
    """The image with its straight lines loosened by a slow random displacement."""
    side = image.shape[0]
    shift = [(smooth_noise(rng, side, side / 26) - 0.5) * 2 * amount_px for _ in range(2)]
    y, x = np.mgrid[0:side, 0:side]
    rows = np.clip(y + shift[0], 0, side - 1).round().astype(int)
    columns = np.clip(x + shift[1], 0, side - 1).round().astype(int)
    return image[rows, columns]


def bare_border(rng: Rng, side: int) -> np.ndarray:
    """1 where the paint lies, 0 at the ragged border where the paper shows."""
    y, x = np.mgrid[0:side, 0:side] / side
    distance = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    ragged = distance - 0.07 * smooth_noise(rng, side, side / 22)
    return np.clip(ragged / 0.018, 0, 1)


def watercolour_sky(picture: Picture, side: int, flow: np.ndarray) -> np.ndarray:
    t = np.clip(np.linspace(0, 1.4, side), 0, 1)[:, None, None]
    top, low = (np.array(thinned(c)) for c in picture.sky)
    sky = (1 - t) * top + t * low
    thin = 0.75 * flow[..., None] ** 1.5
    return sky * (1 - thin) + np.array(PAPER) * thin


def painted(picture: Picture, rng: Rng, side: int) -> np.ndarray:
    """The washes one over another, back to front."""
    edge_px = 1.6 / 64 * side
    flow = smooth_noise(rng, side, side / 16)
    canvas = watercolour_sky(picture, side, flow)
    for cluster, layer in layers(picture):
        if picture.subject and cluster[0] is picture.subject[0]:
            # the subject's place is left dry, or the scenery would shine through its thin paint
            mask = silhouette(picture.subject, side).filter(ImageFilter.GaussianBlur(edge_px * 0.5))
            dry = (np.asarray(mask, dtype=np.float64) / 255)[..., None]
            canvas = canvas * (1 - dry) + np.array(PAPER) * dry
        detail = extent(cluster[0]) < 0.12
        colour = thinned(cluster[0].fill, accent=layer == "subject" and not cluster[-1].edge)
        shifted = np.roll(flow, tuple(rng.integers(0, side, 2)), axis=(0, 1)) * (0.3 if detail else 1.0)
        canvas = wash(canvas, silhouette(cluster, side), colour, shifted, edge_px * (0.5 if detail else 1.0))
    return canvas


def watercolour(picture: Picture, rng: Rng, size_px: int = SIZE_PX) -> Image.Image:
    """Thin bleeding washes on rough white paper; nights are pale indigo."""
    side = size_px * OVERSAMPLING
    canvas = bled(painted(picture, rng, side), rng, 2.2 / 64 * side)
    canvas = warped(canvas, rng, 0.022 * side)
    paint = bare_border(rng, side)[..., None]
    canvas = canvas * paint + np.array(PAPER) * (1 - paint)
    small = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)).reduce(OVERSAMPLING)
    return on_rough_paper(small, rng)


def on_rough_paper(image: Image.Image, rng: Rng) -> Image.Image:
    """The image with the paper's tooth: a grain about two pixels wide."""
    side = image.width
    grain = smooth_noise(rng, side, 0.9 * side / 64) - 0.5
    values = np.asarray(image, dtype=np.float64) * (1 + 0.11 * grain[..., None])
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
