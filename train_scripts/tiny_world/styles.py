"""The same picture drawn in four styles that the embedded base never sees: material for style adapters.

Lines are about two pixels of 64 wide or more: anything finer does not survive the base's autoencoder.
"""

import colorsys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from train_scripts.tiny_world.render import OVERSAMPLING, SIZE_PX, draw_shape
from train_scripts.tiny_world.scene import Picture
from train_scripts.tiny_world.shapes import Colour, Points, Shape, darken, lighten, lit, mix

Rng = np.random.Generator
Style = Callable[..., Image.Image]

CREAM: Colour = (246, 236, 210)
INK: Colour = (30, 32, 62)
PALE_WASH: Colour = (222, 214, 198)
GREY_WASH: Colour = (176, 174, 178)
DEEP_WASH: Colour = (120, 122, 138)

PAPER: Colour = (252, 250, 244)
INDIGO: Colour = (92, 104, 186)

VOID: Colour = (20, 7, 42)
ICE: Colour = (206, 232, 255)
ELECTRIC: Colour = (150, 104, 255)

PALETTE: tuple[Colour, ...] = (
    (20, 16, 36),  # outline and black
    (29, 43, 83),  # navy
    (128, 50, 186),  # purple
    (0, 135, 81),  # dark green
    (60, 206, 72),  # green
    (171, 82, 54),  # brown
    (86, 82, 112),  # dark grey
    (131, 118, 156),  # lavender
    (194, 195, 206),  # light grey
    (255, 241, 232),  # white
    (255, 0, 77),  # red
    (255, 163, 0),  # orange
    (255, 236, 39),  # yellow
    (16, 90, 220),  # blue
    (41, 173, 255),  # sky blue
    (255, 119, 168),  # pink
    (255, 204, 170),  # peach
)
"""A fixed palette after PICO-8's, with a purple and a blue that its sixteen colours lack."""
OUTLINE = 0
SKY_ENTRIES = (1, 7, 8, 11, 14, 15, 16)
BLOCKS = 32
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16 + 1 / 32


def luma(colour: Colour) -> float:
    """Perceived brightness in 0..1 (Rec. 601)."""
    r, g, b = colour
    return (0.299 * r + 0.587 * g + 0.114 * b) / 255


def extent(shape: Shape) -> float:
    """The longer side of the shape's bounding box."""
    return float(np.ptp(shape.points, axis=0).max()) + shape.width


def clusters(shapes: tuple[Shape, ...]) -> Iterator[tuple[Shape, ...]]:
    """Runs of one colour that end with the first edged shape: the puffs of a cloud are one thing."""
    run: tuple[Shape, ...] = ()
    for shape in shapes:
        if run and (run[-1].edge or run[-1].fill != shape.fill):
            yield run
            run = ()
        run = (*run, shape)
    if run:
        yield run


def layers(picture: Picture) -> Iterator[tuple[tuple[Shape, ...], str]]:
    """All clusters back to front, each with the layer it belongs to."""
    for name in ("scenery", "subject", "weather"):
        for cluster in clusters(getattr(picture, name)):
            yield cluster, name


def silhouette(shapes: Iterable[Shape], side: int) -> Image.Image:
    """A mask of everything that the shapes cover."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for shape in shapes:
        draw_shape(draw, shape, side, fill=255)  # type: ignore[arg-type]
    return mask


def smooth_noise(rng: Rng, side: int, radius: float) -> np.ndarray:
    """Blurred white noise stretched to 0..1, `radius` in pixels of the canvas."""
    grain = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
    values = np.asarray(grain.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
    return (values - values.min()) / max(1.0, float(np.ptp(values)))


def densified(points: Points, step: float = 0.02) -> Points:
    """The line with extra points, so that no piece of it is longer than about `step`."""
    parts = []
    for a, b in pairwise(points):
        n = max(1, int(np.hypot(*(b - a)) / step))
        parts.append(a + (b - a) * np.linspace(0, 1, n, endpoint=False)[:, None])
    return np.concatenate([*parts, points[-1:]])


def draw_line(draw: ImageDraw.ImageDraw, points: Points, width: float, colour: Colour, side: int) -> None:
    """A polyline with round joints and ends; `width` as a fraction of the side."""
    pixels = [(float(x), float(y)) for x, y in points * side]
    radius = width * side / 2
    draw.line(pixels, fill=colour, width=max(1, round(2 * radius)), joint="curve")
    for x, y in pixels:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def closed(points: Points) -> Points:
    return np.concatenate([points, points[:1]])


# ---- ink ----


def wobbled(points: Points, rng: Rng, amount: float = 0.006) -> Points:
    """The line as a hand draws it: pushed about by slow waves."""
    t = np.linspace(0, 1, len(points))[:, None]
    phase = rng.uniform(0, 2 * np.pi, (2, 2))
    waves = np.sin(2 * np.pi * 2 * t + phase[0]) + 0.6 * np.sin(2 * np.pi * 5 * t + phase[1])
    fade = np.minimum(1, 12 * np.minimum(t, 1 - t))
    return points + amount * waves * fade


def hatching(side: int) -> Image.Image:
    """Diagonal ink lines over a grey wash, 1.5 px wide every 5 px of 64."""
    canvas = Image.new("RGB", (side, side), GREY_WASH)
    draw = ImageDraw.Draw(canvas)
    for x in np.arange(-1.0, 1.0, 5 / 64):
        draw_line(draw, np.array([(x, 1.0), (x + 1, 0.0)]), 1.6 / 64, mix(INK, GREY_WASH, 0.25), side)
    return canvas


def ink_tone(shape: Shape, layer: str) -> Colour | None:
    """Paper, wash or solid ink; None asks for hatching."""
    if layer == "weather":
        return DEEP_WASH
    thin = shape.width > 0 and not shape.edge
    if layer == "subject" and thin and luma(shape.fill) < 0.66:
        return INK  # thin legs and ropes have no outline of their own
    return wash_tone(luma(shape.fill), large=extent(shape) >= 0.2, subject=layer == "subject")


def wash_tone(value: float, *, large: bool, subject: bool) -> Colour | None:
    """The tone for a brightness: hatching only where it has room, solid ink only in the subject."""
    for least, tone in ((0.66, CREAM), (0.5, PALE_WASH), (0.4 if large else 0.28, GREY_WASH)):
        if value > least:
            return tone
    if value < 0.16:
        return INK if subject else DEEP_WASH
    return None if large and (subject or value > 0.26) else DEEP_WASH


def ink_sky(picture: Picture, side: int) -> Image.Image:
    """Bare paper by day, a wash that thins towards the horizon at sunset and at night."""
    depth = max(0.0, 0.62 - luma(picture.sky[0])) / 0.55
    t = np.clip(np.linspace(0, 1.5, side), 0, 1)[:, None, None]
    strength = depth * (1 - 0.55 * t)
    rows = np.array(CREAM) * (1 - strength) + np.array(DEEP_WASH) * strength
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).round().astype(np.uint8))


def fill_ink(canvas: Image.Image, shape: Shape, layer: str, hatch: Image.Image) -> None:
    tone = ink_tone(shape, layer)
    if tone is None:
        canvas.paste(hatch, mask=silhouette((shape,), canvas.width))
    else:
        draw_shape(ImageDraw.Draw(canvas), shape, canvas.width, fill=tone)


def outline_ink(canvas: Image.Image, shape: Shape, layer: str, rng: Rng) -> None:
    """The pen line around a shape, half of it outside; finer around small shapes so that they stay open."""
    broad, fine = (2.1, 1.5) if layer == "subject" else (1.6, 1.3)
    width = min(broad, max(fine, 0.15 * 64 * extent(shape))) / 64
    draw = ImageDraw.Draw(canvas)
    if shape.width > 0:
        draw_line(draw, shape.points, shape.width + 1.2 * width, INK, canvas.width)
    else:
        draw_line(draw, wobbled(densified(closed(shape.points)), rng), 2 * width, INK, canvas.width)


def ink(picture: Picture, rng: Rng, size_px: int = SIZE_PX) -> Image.Image:
    """Bold blue-black pen on cream paper, with grey washes and hatching for the dark parts."""
    side = size_px * OVERSAMPLING
    canvas, hatch = ink_sky(picture, side), hatching(side)
    halo = silhouette(picture.subject, side).filter(ImageFilter.GaussianBlur(1.5 / 64 * side))
    for cluster, layer in layers(picture):
        if cluster[0] is picture.subject[0]:
            # paper left bare around the subject keeps it apart from the scenery's lines
            canvas.paste(CREAM, mask=halo.point(lambda v: 255 if v > 12 else 0))
        if cluster[-1].edge:
            for shape in cluster:
                outline_ink(canvas, shape, layer, rng)
        for shape in cluster:
            fill_ink(canvas, shape, layer, hatch)
    return canvas.reduce(OVERSAMPLING)


# ---- watercolour ----


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
        if cluster[0] is picture.subject[0]:
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


# ---- pixel ----


def oklab(colours: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 to Oklab, the last axis."""
    share = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    return np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T


def palette_index(colour: Colour, entries: tuple[int, ...] = tuple(range(len(PALETTE)))) -> int:
    """The nearest palette entry; hue counts more than lightness, so a colour keeps its name."""
    difference = oklab(np.array(PALETTE)[list(entries)]) - oklab(np.array(colour))
    return entries[int((difference**2 @ np.array([0.35, 1.0, 1.0])).argmin())]


def majority(indices: np.ndarray, blocks: int) -> np.ndarray:
    """The commonest palette entry of every block; averaging would make colours outside the palette."""
    step = indices.shape[0] // blocks
    tiles = indices.reshape(blocks, step, blocks, step).transpose(0, 2, 1, 3).reshape(blocks, blocks, -1)
    votes = np.stack([(tiles == i).sum(axis=-1) for i in range(len(PALETTE))], axis=-1)
    return votes.argmax(axis=-1)


def dithered_sky(picture: Picture, rng: Rng) -> np.ndarray:
    """Two palette colours, blended by ordered dithering block by block; the pattern's start is random."""
    top, low = (palette_index(c, SKY_ENTRIES) for c in picture.sky)
    t = np.clip(np.linspace(-0.3, 1.5, BLOCKS), 0, 1)[:, None]
    pattern = np.tile(np.roll(BAYER, tuple(rng.integers(0, 4, 2)), axis=(0, 1)), (BLOCKS // 4, BLOCKS // 4))
    return np.where(t > pattern, low, top)


def block_outline(shapes: Iterable[Shape], side: int) -> Image.Image:
    """The mask of the shapes and one block around them."""
    mask = silhouette(shapes, side).resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
    grown = mask.point(lambda v: 255 if v > 110 else 0).filter(ImageFilter.MaxFilter(3))
    return grown.resize((side, side), Image.Resampling.NEAREST)


def pixel(picture: Picture, rng: Rng, size_px: int = SIZE_PX) -> Image.Image:
    """Pixel art: 32 crisp blocks across in a fixed palette, the subject outlined."""
    side = BLOCKS * 8
    sky = Image.fromarray(dithered_sky(picture, rng).astype(np.uint8))
    canvas = sky.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for cluster, layer in layers(picture):
        if cluster[0] is picture.subject[0]:
            canvas.paste(OUTLINE, mask=block_outline(picture.subject, side))
        for shape in cluster:
            # thinner strokes would lose the vote in most of their blocks
            seen = replace(shape, width=max(shape.width, 0.026)) if shape.width > 0.012 else shape
            # brightened, or at dusk yellow would become orange and red brown
            colour = lit(shape.fill, (1.2, 1.2, 1.2)) if layer == "subject" else shape.fill
            draw_shape(draw, seen, side, fill=palette_index(colour))  # type: ignore[arg-type]
    blocks = np.array(PALETTE, dtype=np.uint8)[majority(np.asarray(canvas), BLOCKS)]
    return Image.fromarray(blocks).resize((size_px, size_px), Image.Resampling.NEAREST)


# ---- neon ----


def glowing(colour: Colour) -> Colour:
    """The colour as a gas tube shows it: its hue at full strength, ice for whites, violet for greys."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    if saturation < 0.22:
        return ICE if value > 0.7 else ELECTRIC
    r, g, b = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, max(0.85, saturation), 1.0))
    return r, g, b


def neon_sky(picture: Picture, side: int) -> Image.Image:
    """Near black, with the sky's own hue glimmering at the horizon."""
    t = np.clip(np.linspace(-0.2, 1.3, side), 0, 1)[:, None, None] ** 2
    rows = np.array(VOID) * (1 - 0.3 * t) + 0.3 * t * np.array(glowing(picture.sky[1]))
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).round().clip(0, 255).astype(np.uint8))


def tube_colour(shape: Shape, layer: str) -> Colour:
    """The subject burns brighter than what is around it."""
    return glowing(shape.fill) if layer == "subject" else darken(glowing(shape.fill), 0.35)


def is_lamp(shape: Shape, layer: str) -> bool:
    """Whether a shape without an outline is small or thin enough to shine as a whole."""
    thin = shape.width > 0 and layer == "subject"
    return not shape.edge and luma(shape.fill) > 0.2 and (thin or extent(shape) < 0.13)


def outline_tube(tubes: ImageDraw.ImageDraw, shape: Shape, layer: str, side: int) -> None:
    """A bright line around the shape; for a stroke, what is left of it when its middle is taken out later."""
    width = (2.3 if layer == "subject" else 1.8) / 64
    if shape.width > 0:
        draw_line(tubes, shape.points, shape.width + 0.5 * width, tube_colour(shape, layer), side)
    else:
        draw_line(tubes, closed(shape.points), 1.5 * width, tube_colour(shape, layer), side)


def draw_tubes(
    body: ImageDraw.ImageDraw, tubes: ImageDraw.ImageDraw, cluster: tuple[Shape, ...], layer: str, side: int
) -> None:
    """Nearly black bodies that hide what is behind them, and a bright outline around them together."""
    black: Colour = (0, 0, 0)
    outlined = cluster[-1].edge
    for shape in cluster if outlined else ():
        outline_tube(tubes, shape, layer, side)
    for shape in cluster:
        bright = tube_colour(shape, layer)
        draw_shape(body, shape, side, fill=mix(VOID, bright, 0.12 if shape.edge else 0.22))
        inside = inset(shape, 1.1 / 64) if outlined else shape
        draw_shape(tubes, inside, side, fill=bright if is_lamp(shape, layer) and not outlined else black)


def inset(shape: Shape, amount: float) -> Shape:
    """The shape made smaller by `amount` on every side, roughly."""
    if shape.width > 0:
        return replace(shape, width=max(0.001, shape.width - 2 * amount))
    middle = (shape.points.min(axis=0) + shape.points.max(axis=0)) / 2
    half = np.maximum(np.ptp(shape.points, axis=0) / 2, 1e-6)
    return replace(shape, points=middle + (shape.points - middle) * np.maximum(0, 1 - amount / half))


def neon(picture: Picture, rng: Rng, size_px: int = SIZE_PX) -> Image.Image:
    """Glowing tubes on black violet, with bloom; `rng` varies how brightly the sign burns."""
    side = size_px * OVERSAMPLING
    canvas = neon_sky(picture, side)
    tubes = Image.new("RGB", (side, side))
    for cluster, layer in layers(picture):
        draw_tubes(ImageDraw.Draw(canvas), ImageDraw.Draw(tubes), cluster, layer, side)
    canvas = ImageChops.lighter(canvas, tubes)
    power = float(rng.uniform(0.9, 1.1))
    for radius_px, gain in ((1.0, 0.5), (3.5, 0.9)):
        bloom = tubes.filter(ImageFilter.GaussianBlur(radius_px / 64 * side))
        canvas = ImageChops.screen(canvas, bloom.point(lambda v, k=gain * power: min(255, round(v * k))))
    return canvas.reduce(OVERSAMPLING)


STYLES: dict[str, Style] = {"ink": ink, "watercolour": watercolour, "pixel": pixel, "neon": neon}
