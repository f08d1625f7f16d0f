"""The world's own style: flat colors with a thin rim of a darker tone around figures."""

import skia
from PIL import Image

from train_scripts.picture_world.canvas import SIZE_PX, fill_paint, new_surface, to_picture
from train_scripts.picture_world.compose import Drawing
from train_scripts.picture_world.shapes import Shape, darken, outline_path

RIM_WIDTH = 0.017
"""Width of the pen for rims; half of it stays visible outside the shape."""
UNRIMMED = ("sky", "ground", "scenery", "shadow", "weather")


def draw_flat(canvas: skia.Canvas, shapes: list[Shape]) -> None:
    for shape in shapes:
        if shape.rim and shape.part not in UNRIMMED:
            rim = skia.Paint(AntiAlias=True, Color=skia.ColorSetRGB(*darken(shape.fill, 0.45)))
            canvas.drawPath(outline_path(shape.path, RIM_WIDTH), rim)
        canvas.drawPath(shape.path, fill_paint(shape))


def render_flat(drawing: Drawing, size_px: int = SIZE_PX) -> Image.Image:
    """Render in the style that the embedded base learns."""
    surface = new_surface(size_px)
    draw_flat(surface.getCanvas(), drawing.shapes())
    return to_picture(surface)
