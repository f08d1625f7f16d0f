"""What time of day and weather do to the sky and to colors."""

from dataclasses import dataclass

import numpy as np

from train_scripts.picture_world.shapes import Color, Shape, box, ellipse, lighten, line, mix

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Light:
    """Sky colors at the top and at the horizon, and factors for the colors of scenery and figures."""

    sky: tuple[Color, Color]
    scenery: tuple[float, float, float]
    figure: tuple[float, float, float]


LIGHTS: dict[str, Light] = {
    "day": Light(sky=((92, 176, 246), (206, 236, 252)), scenery=(1, 1, 1), figure=(1, 1, 1)),
    "sunset": Light(sky=((196, 88, 140), (255, 196, 104)), scenery=(0.98, 0.77, 0.7), figure=(1.0, 0.92, 0.88)),
    "night": Light(sky=((16, 20, 66), (54, 66, 130)), scenery=(0.37, 0.43, 0.68), figure=(0.76, 0.79, 0.95)),
}
TIMES = tuple(LIGHTS)
WEATHERS = ("clear", "cloudy", "rain", "snow")


def draw_sky(time: str, weather: str, bottom: float, rng: Rng, *, on_earth: bool = True) -> list[Shape]:
    """Gradient, then sun or moon and stars, then clouds; stars alone on the moon."""
    top, low = LIGHTS[time].sky
    gray = {"day": (150, 164, 182), "sunset": (150, 116, 134), "night": (40, 44, 66)}[time]
    amount = {"clear": 0.0, "cloudy": 0.3, "rain": 0.75, "snow": 0.5}[weather]
    top, low = mix(top, gray, amount), mix(low, lighten(gray, 0.25), amount)
    shapes = [box(0, 0, 1, bottom, top, fill_to=low, part="sky", rim=False)]
    if not on_earth:
        return [*shapes, *draw_stars(rng)]
    if weather in ("clear", "cloudy"):
        shapes += draw_celestial_body(time, bottom, rng)
    return [*shapes, *draw_clouds(time, weather, rng)]


def draw_stars(rng: Rng) -> list[Shape]:
    return [
        ellipse(float(x), float(y), r, r, (255, 250, 220), part="sky", rim=False)
        for x, y, r in zip(
            rng.uniform(0.03, 0.97, 14), rng.uniform(0.03, 0.5, 14), rng.uniform(0.006, 0.011, 14), strict=True
        )
    ]


def draw_celestial_body(time: str, horizon: float, rng: Rng) -> list[Shape]:
    x = float(rng.uniform(0.1, 0.9))
    if time == "day":
        y = float(rng.uniform(0.1, 0.22))
        halo = ellipse(x, y, 0.115, 0.115, (255, 240, 170), alpha=0.45, part="sky", rim=False)
        return [halo, ellipse(x, y, 0.08, 0.08, (255, 224, 92), part="sky")]
    if time == "sunset":
        return [ellipse(x, horizon - float(rng.uniform(-0.01, 0.06)), 0.13, 0.13, (255, 232, 150), part="sky")]
    stars = draw_stars(rng)
    y = float(rng.uniform(0.12, 0.22))
    moon = ellipse(x, y, 0.075, 0.075, (252, 246, 208), part="sky")
    if rng.random() < 0.5:
        return [*stars, moon, ellipse(x + 0.02, y - 0.015, 0.018, 0.018, (228, 220, 184), part="sky", rim=False)]
    crescent = ellipse(x + 0.035, y - 0.015, 0.062, 0.062, LIGHTS["night"].sky[0], part="sky", rim=False)
    return [*stars, moon, crescent]


def draw_cloud(x: float, y: float, size: float, color: Color) -> list[Shape]:
    return [
        ellipse(x + dx * size, y + dy * size, rx * size, ry * size, color, part="sky", rim=False)
        for dx, dy, rx, ry in (
            (-0.9, 0.12, 0.7, 0.42),
            (0.9, 0.14, 0.7, 0.4),
            (-0.25, -0.25, 0.72, 0.66),
            (0.4, -0.1, 0.7, 0.55),
        )
    ]


def draw_clouds(time: str, weather: str, rng: Rng) -> list[Shape]:
    """One small cloud now and then under a clear sky, several under a cloudy one."""
    bright = {"day": (250, 251, 254), "sunset": (252, 200, 190), "night": (92, 100, 138)}[time]
    dull = {"day": (150, 158, 172), "sunset": (150, 118, 134), "night": (58, 62, 84)}[time]
    color = mix(bright, dull, {"clear": 0.0, "cloudy": 0.12, "rain": 0.75, "snow": 0.4}[weather])
    count = int(rng.integers(0, 2)) if weather == "clear" else int(rng.integers(3, 5))
    shapes: list[Shape] = []
    for i in range(count):
        x = float((i + rng.uniform(0.1, 0.9)) / max(count, 1))
        shapes += draw_cloud(x, float(rng.uniform(0.07, 0.26)), float(rng.uniform(0.07, 0.115)), color)
    return shapes


def draw_weather(weather: str, rng: Rng) -> list[Shape]:
    """Rain or snow in front of everything."""
    if weather == "rain":
        return [
            line([(x, y), (x - 0.022, y + 0.065)], 0.011, (214, 232, 252), alpha=0.8, part="weather", rim=False)
            for x, y in _scatter(26, rng)
        ]
    if weather == "snow":
        return [
            ellipse(x, y, r, r, (255, 255, 255), part="weather", rim=False)
            for (x, y), r in zip(_scatter(30, rng), rng.uniform(0.008, 0.016, 30), strict=True)
        ]
    return []


def _scatter(count: int, rng: Rng) -> list[tuple[float, float]]:
    """Points spread over the picture, one in each cell of a 6-column grid that is drawn at random."""
    cells = rng.permutation(36)[:count]
    return [(float((c % 6 + rng.random()) / 6), float((c // 6 + rng.random()) / 6)) for c in cells]
