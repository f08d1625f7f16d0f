"""Filled vector shapes: the building blocks of every figure, prop and background.

Coordinates: x grows to the right and y grows downward. Figures are drawn in a unit box (x from -0.5 to 0.5, y from 0 at
the top to 1 at the feet) and moved into the picture, whose sides are 0 to 1, by `place_shapes`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import skia

Color = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One filled area.

    Attributes:
        path: Outline of the area.
        fill: Color of the area, or of its top if `fill_to` is given.
        fill_to: Color at the bottom of a vertical gradient.
        alpha: Opacity from 0 to 1.
        part: Part of the figure this shape belongs to, such as "head"; used to render malformed figures.
        rim: Whether line styles outline the shape; false for small details inside a larger shape.
        glows: Whether the shape keeps its color at night, like a lit window.
    """

    path: skia.Path
    fill: Color
    fill_to: Color | None = None
    alpha: float = 1.0
    part: str = "body"
    rim: bool = True
    glows: bool = False


def mix(a: Color, b: Color, amount: float) -> Color:
    """Linear mix of two colors; `amount` 0 is `a`, 1 is `b`."""
    red, green, blue = (round((1 - amount) * x + amount * y) for x, y in zip(a, b, strict=True))
    return red, green, blue


def lighten(color: Color, amount: float) -> Color:
    return mix(color, (255, 255, 255), amount)


def darken(color: Color, amount: float) -> Color:
    return mix(color, (16, 12, 28), amount)


def multiply(color: Color, factors: Sequence[float]) -> Color:
    """The color under a colored light."""
    red, green, blue = (min(255, round(c * f)) for c, f in zip(color, factors, strict=True))
    return red, green, blue


def luminance(color: Color) -> float:
    """Perceived brightness from 0 to 1 (Rec. 709 weights on gamma-encoded values)."""
    return (0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]) / 255


def ellipse(x: float, y: float, rx: float, ry: float, fill: Color, *, turn: float = 0, **options) -> Shape:
    """Ellipse around (x, y), turned clockwise by `turn` degrees."""
    path = skia.Path().addOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry))
    if turn:
        path = _transformed(path, skia.Matrix().setRotate(turn, x, y))
    return Shape(path=path, fill=fill, **options)


def box(left: float, top: float, right: float, bottom: float, fill: Color, *, radius: float = 0, **options) -> Shape:
    """Rectangle with corners rounded by `radius`."""
    path = skia.Path().addRoundRect(skia.Rect.MakeLTRB(left, top, right, bottom), radius, radius)
    return Shape(path=path, fill=fill, **options)


def polygon(points: Sequence[Point], fill: Color, **options) -> Shape:
    return Shape(path=skia.Path.Polygon([skia.Point(*p) for p in points], True), fill=fill, **options)


def blob(points: Sequence[Point], fill: Color, **options) -> Shape:
    """Closed smooth curve through the points (Catmull-Rom)."""
    path = skia.Path()
    path.moveTo(*points[0])
    _follow([points[-1], *points, points[0], points[1]], path)
    path.close()
    return Shape(path=path, fill=fill, **options)


def line(points: Sequence[Point], width: float, fill: Color, *, smooth: bool = True, **options) -> Shape:
    """Stroke with round ends through the points."""
    path = skia.Path()
    path.moveTo(*points[0])
    if smooth and len(points) > 2:
        _follow([points[0], *points, points[-1]], path)
    else:
        for point in points[1:]:
            path.lineTo(*point)
    return Shape(path=outline_path(path, width), fill=fill, **options)


def outline_path(path: skia.Path, width: float) -> skia.Path:
    """The area that a pen of `width` covers along the path."""
    pen = skia.Paint(Style=skia.Paint.kStroke_Style, StrokeWidth=width)
    pen.setStrokeCap(skia.Paint.kRound_Cap)
    pen.setStrokeJoin(skia.Paint.kRound_Join)
    area = skia.Path()
    pen.getFillPath(path, area, skia.Rect.MakeLTRB(-9, -9, 9, 9), 400.0)
    return area


def _follow(points: Sequence[Point], path: skia.Path) -> None:
    """Append cubic curves through all points but the first and the last, which give the end directions."""
    for (x0, y0), (x1, y1), (x2, y2), (x3, y3) in zip(points, points[1:], points[2:], points[3:], strict=False):
        path.cubicTo(x1 + (x2 - x0) / 6, y1 + (y2 - y0) / 6, x2 - (x3 - x1) / 6, y2 - (y3 - y1) / 6, x2, y2)


def _transformed(path: skia.Path, matrix: skia.Matrix) -> skia.Path:
    result = skia.Path()
    path.transform(matrix, result)
    return result


def transform_shapes(shapes: Iterable[Shape], matrix: skia.Matrix) -> list[Shape]:
    return [replace(shape, path=_transformed(shape.path, matrix)) for shape in shapes]


def place_shapes(
    shapes: Iterable[Shape], *, x: float, bottom: float, height: float, mirrored: bool = False, lean: float = 0
) -> list[Shape]:
    """Move shapes from their unit box to the picture, feet at (x, bottom), tilted by `lean` degrees."""
    matrix = skia.Matrix()
    matrix.setRotate(lean, 0, 1)
    matrix.postScale(-height if mirrored else height, height)
    matrix.postTranslate(x, bottom - height)
    return transform_shapes(shapes, matrix)


def light_shapes(shapes: Iterable[Shape], factors: Sequence[float]) -> list[Shape]:
    """Multiply colors by a light, except those of glowing shapes."""
    return [
        shape
        if shape.glows
        else replace(
            shape,
            fill=multiply(shape.fill, factors),
            fill_to=multiply(shape.fill_to, factors) if shape.fill_to else None,
        )
        for shape in shapes
    ]


def bounds(shapes: Iterable[Shape]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of all shapes together."""
    boxes = [shape.path.getBounds() for shape in shapes]
    return (
        min(b.left() for b in boxes),
        min(b.top() for b in boxes),
        max(b.right() for b in boxes),
        max(b.bottom() for b in boxes),
    )


def star_points(x: float, y: float, radius: float, *, points: int = 5, inner: float = 0.45) -> list[Point]:
    """Corners of a star that stands on two points."""
    corners: list[Point] = []
    for i in range(2 * points):
        reach = radius if i % 2 == 0 else radius * inner
        angle = math.pi * i / points - math.pi / 2
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners
