"""From a scene to placed, lit shapes in layers, ready for a style to draw."""

from dataclasses import dataclass, replace

import numpy as np

from train_scripts.picture_world.figures.props import draw_prop
from train_scripts.picture_world.figures.subjects import draw_subject
from train_scripts.picture_world.places.light import LIGHTS, draw_sky, draw_weather
from train_scripts.picture_world.places.scenery import SEASONS
from train_scripts.picture_world.places.settings import SETTINGS
from train_scripts.picture_world.scene import Figure, Scene, find_subject
from train_scripts.picture_world.shapes import Shape, ellipse, light_shapes, place_shapes

Rng = np.random.Generator
HEIGHTS = {"near": 0.6, "normal": 0.46, "far": 0.33}
"""Height of a cat in the picture."""
SIDE_X = {"left": 0.26, "middle": 0.5, "right": 0.74}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one figure stands: center, feet, height of a cat there, and the lean in degrees."""

    x: float
    bottom: float
    height: float
    lean: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A scene as shapes in picture coordinates, back to front.

    Attributes:
        background: Sky, ground and scenery.
        figures: Shapes of each figure with its shadow and prop, in the order of the scene's figures.
        order: Indices into `figures`, back to front.
        weather: Rain or snow in front of everything.
    """

    background: tuple[Shape, ...]
    figures: tuple[tuple[Shape, ...], ...]
    order: tuple[int, ...]
    weather: tuple[Shape, ...]

    def shapes(self) -> list[Shape]:
        """All shapes, back to front."""
        figures = [shape for i in self.order for shape in self.figures[i]]
        return [*self.background, *figures, *self.weather]


def compose(scene: Scene) -> Drawing:
    """Draw the scene as shapes; the same scene always gives the same drawing."""
    rng = np.random.default_rng(scene.seed)
    light = LIGHTS[scene.time]
    horizon = float(rng.uniform(0.5, 0.66))
    on_earth, indoors = scene.setting != "moon", scene.setting == "room"
    sky = draw_sky(scene.time, scene.weather, min(1.0, horizon + 0.15), rng, on_earth=on_earth)
    weather = draw_weather(scene.weather, rng)
    factors = tuple((1 + f) / 2 for f in light.scenery) if indoors else light.scenery
    scenery = light_shapes(SETTINGS[scene.setting](horizon, SEASONS[scene.season], rng), factors)
    placements = place_figures(scene, horizon, rng)
    figures = [_draw_figure(f, p, scene, rng) for f, p in zip(scene.figures, placements, strict=True)]
    return Drawing(
        background=(*sky, *(weather if indoors else []), *scenery),
        figures=tuple(tuple(light_shapes(shapes, light.figure)) for shapes in figures),
        order=tuple(sorted(range(len(placements)), key=lambda i: placements[i].bottom)),
        weather=tuple([] if indoors else weather),
    )


def place_figures(scene: Scene, horizon: float, rng: Rng) -> list[Placement]:
    """Feet on the ground: the farther a figure is, the higher and the smaller."""
    height = HEIGHTS[scene.distance] * float(rng.uniform(0.88, 1.12))
    depth = {"near": 0.93, "normal": 0.86, "far": 0.76}[scene.distance]
    bottom = max(horizon + 0.1, depth + float(rng.uniform(-0.05, 0.05)))
    lean = float(rng.uniform(-8, 8))
    if len(scene.figures) == 1:
        margin = 0.42 * height * find_subject(scene.figures[0].subject).height
        x = min(max(SIDE_X[scene.side] + float(rng.uniform(-0.08, 0.08)), margin), 1 - margin)
        return [Placement(x=x, bottom=bottom, height=height, lean=lean)]
    height *= 0.82
    if scene.relation == "in front of":
        x = 0.5 + float(rng.uniform(-0.14, 0.14))
        offset = float(rng.choice([-1, 1])) * float(rng.uniform(0.15, 0.22))
        front = Placement(x=x, bottom=min(0.96, bottom + 0.06), height=height, lean=lean)
        return [front, Placement(x=x + offset, bottom=max(horizon + 0.06, bottom - 0.06), height=height * 1.05)]
    gap = float(rng.uniform(0.23, 0.27))
    middle = 0.5 + float(rng.uniform(-0.03, 0.03))
    return [
        Placement(x=middle - gap, bottom=bottom + float(rng.uniform(-0.02, 0.02)), height=height, lean=lean),
        Placement(x=middle + gap, bottom=bottom + float(rng.uniform(-0.02, 0.02)), height=height, lean=-lean),
    ]


def _draw_figure(figure: Figure, placement: Placement, scene: Scene, rng: Rng) -> list[Shape]:
    """Shadow, figure and prop, placed."""
    subject = find_subject(figure.subject)
    height = placement.height * subject.height
    bottom, lean = placement.bottom, placement.lean
    flies = figure.pose in subject.flies
    shadow_width = height * 0.34
    if flies:
        bottom = max(height + 0.04, bottom - float(rng.uniform(0.14, 0.3)))
        lean *= 2.5
    shapes = draw_subject(figure.subject, figure.pose, figure.color)
    if figure.prop:
        prop = draw_prop(figure.prop, subject.hat, rng)
        shapes = [*prop, *shapes] if figure.prop in ("balloon", "umbrella") else [*shapes, *prop]
    placed = place_shapes(shapes, x=placement.x, bottom=bottom, height=height, mirrored=figure.mirrored, lean=lean)
    if flies and scene.setting != "room":
        return placed
    shadow = ellipse(
        placement.x, placement.bottom, shadow_width, height * 0.045, (20, 24, 50), alpha=0.22, part="shadow", rim=False
    )
    return [shadow, *placed]


def without_figures(drawing: Drawing) -> Drawing:
    """The empty scene: background and weather only."""
    return replace(drawing, figures=(), order=())
