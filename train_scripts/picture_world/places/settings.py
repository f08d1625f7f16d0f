"""Ten places where a scene can be set."""

from collections.abc import Callable

import numpy as np

from train_scripts.picture_world.palette import CREAM, LAMP, STONE, WHITE, WOOD
from train_scripts.picture_world.places.scenery import (
    Season,
    choose_x,
    draw_cactus,
    draw_ground,
    draw_hill,
    draw_mountain,
    draw_palm,
    draw_pine,
    draw_round_tree,
    scatter_accents,
)
from train_scripts.picture_world.shapes import Color, Shape, box, darken, ellipse, lighten, line, mix, polygon

Rng = np.random.Generator
Setting = Callable[[float, Season, Rng], list[Shape]]
"""Scenery for a horizon (y from 0 to 1), a season and a random generator, back to front."""
SAND: Color = (250, 222, 160)
DUNE: Color = (244, 200, 124)


def draw_meadow(horizon: float, season: Season, rng: Rng) -> list[Shape]:
    far = mix(season.grass, (120, 170, 200), 0.3)
    hills = [
        draw_hill(x, horizon, float(rng.uniform(0.25, 0.4)), float(rng.uniform(0.06, 0.14)), far)
        for x in choose_x(rng, 2)
    ]
    trees = [
        draw_round_tree(x, horizon + 0.04, float(rng.uniform(0.2, 0.34)), season)
        for x in choose_x(rng, int(rng.integers(1, 3)))
    ]
    accents = season.accents or (WHITE, (255, 226, 110))
    return [
        *hills,
        draw_ground(horizon, season.grass, wave=0.02, rng=rng),
        *[shape for tree in trees for shape in tree],
        *([] if season.snow else scatter_accents(horizon, accents, 16, rng)),
    ]


def draw_beach(horizon: float, _: Season, rng: Rng) -> list[Shape]:
    shore = horizon + float(rng.uniform(0.1, 0.16))
    sea = box(-0.1, horizon - 0.01, 1.1, 1.1, (46, 140, 210), fill_to=(90, 190, 224), part="ground")
    waves = [
        line([(x - 0.06, y), (x, y - 0.008), (x + 0.06, y)], 0.011, (214, 240, 250), part="scenery", rim=False)
        for x, y in zip(choose_x(rng, 3), rng.uniform(horizon + 0.03, shore - 0.03, 3).tolist(), strict=True)
    ]
    side = float(rng.choice([0.1, 0.9])) + float(rng.uniform(-0.05, 0.05))
    palm = draw_palm(side, shore + 0.08, float(rng.uniform(0.36, 0.46)), 0.25 if side < 0.5 else -0.25)
    shells = scatter_accents(shore, ((252, 176, 150), WHITE, (216, 178, 120)), 8, rng)
    foam = draw_ground(shore - 0.015, (236, 248, 252), wave=0.01, rng=rng)
    return [sea, *waves, foam, draw_ground(shore, SAND, wave=0.01, rng=rng), *palm, *shells]


def draw_desert(horizon: float, _: Season, rng: Rng) -> list[Shape]:
    dunes = [
        draw_hill(x, horizon, float(rng.uniform(0.3, 0.5)), float(rng.uniform(0.05, 0.12)), (232, 178, 104))
        for x in choose_x(rng, 2)
    ]
    cacti = [
        draw_cactus(x, horizon + float(rng.uniform(0.04, 0.1)), float(rng.uniform(0.16, 0.28)))
        for x in choose_x(rng, 2)
    ]
    stones = [
        ellipse(float(x), float(rng.uniform(horizon + 0.1, 0.95)), 0.025, 0.014, (196, 150, 100), part="scenery")
        for x in rng.uniform(0.05, 0.95, 4)
    ]
    return [*dunes, draw_ground(horizon, DUNE, wave=0.025, rng=rng), *[s for c in cacti for s in c], *stones]


def draw_snowfield(horizon: float, _: Season, rng: Rng) -> list[Shape]:
    hills = [
        draw_hill(x, horizon, float(rng.uniform(0.3, 0.45)), float(rng.uniform(0.06, 0.12)), (212, 228, 244))
        for x in choose_x(rng, 2)
    ]
    pines = [
        draw_pine(x, horizon + 0.04, float(rng.uniform(0.22, 0.36)), snowy=True)
        for x in choose_x(rng, int(rng.integers(2, 4)))
    ]
    ground = draw_ground(horizon, (240, 246, 252), wave=0.02, rng=rng)
    drifts = scatter_accents(horizon, ((214, 228, 244),), 8, rng)
    return [*hills, ground, *[s for p in pines for s in p], *drifts]


def draw_forest(horizon: float, season: Season, rng: Rng) -> list[Shape]:
    ground = mix(season.grass, (70, 110, 60), 0.0 if season.snow else 0.4)
    back = [
        s
        for x in choose_x(rng, 6)
        for s in draw_pine(x, horizon + 0.02, float(rng.uniform(0.34, 0.46)), snowy=season.snow, color=(92, 140, 116))
    ]
    front: list[Shape] = []
    for x in choose_x(rng, 4):
        size = float(rng.uniform(0.42, 0.6))
        base = horizon + float(rng.uniform(0.04, 0.09))
        pine = rng.random() < 0.4
        front += draw_pine(x, base, size, snowy=season.snow) if pine else draw_round_tree(x, base, size, season)
    return [
        *back,
        draw_ground(horizon, ground, wave=0.015, rng=rng),
        *front,
        *scatter_accents(horizon, season.accents, 14, rng),
    ]


def draw_city(horizon: float, season: Season, rng: Rng) -> list[Shape]:
    street = horizon + 0.1
    shapes: list[Shape] = []
    for x in choose_x(rng, 6):
        width, top = float(rng.uniform(0.075, 0.115)), horizon - float(rng.uniform(0.14, 0.42))
        tone = mix((110, 128, 164), (176, 150, 150), float(rng.random()))
        shapes.append(box(x - width, top, x + width, street, tone, part="scenery"))
        if season.snow:
            shapes.append(box(x - width, top - 0.012, x + width, top + 0.014, WHITE, part="scenery", rim=False))
        for row in np.arange(top + 0.045, horizon, 0.075):
            for side in (-0.45, 0.45):
                wx = x + side * width
                if rng.random() < 0.75:
                    pane = box(
                        wx - 0.018,
                        float(row),
                        wx + 0.018,
                        float(row) + 0.036,
                        LAMP,
                        part="scenery",
                        rim=False,
                        glows=True,
                    )
                    shapes.append(pane)
    road = (104, 106, 118)
    sidewalk = WHITE if season.snow else (188, 186, 190)
    dashes = [
        box(x - 0.05, 0.86, x + 0.05, 0.875, (236, 226, 180), part="scenery", rim=False)
        for x in (0.1, 0.37, 0.64, 0.91)
    ]
    shapes += [
        box(-0.1, street - 0.02, 1.1, 1.1, sidewalk, part="ground"),
        box(-0.1, street + 0.05, 1.1, 1.1, road, part="ground"),
    ]
    return [*shapes, *dashes]


def draw_mountains(horizon: float, season: Season, rng: Rng) -> list[Shape]:
    peaks: list[Shape] = []
    for x in choose_x(rng, 3):
        tone = mix((128, 134, 160), (150, 128, 130), float(rng.random()))
        peaks += draw_mountain(x, horizon + 0.02, float(rng.uniform(0.24, 0.34)), float(rng.uniform(0.22, 0.42)), tone)
    ground = season.grass if season.snow else mix(season.grass, (150, 140, 110), 0.3)
    rocks = [
        polygon([(x - 0.04, y), (x - 0.015, y - 0.035), (x + 0.02, y - 0.03), (x + 0.042, y)], STONE, part="scenery")
        for x, y in zip(choose_x(rng, 3), rng.uniform(horizon + 0.08, 0.95, 3).tolist(), strict=True)
    ]
    return [*peaks, draw_ground(horizon, ground, wave=0.02, rng=rng), *rocks]


def draw_farm(horizon: float, season: Season, rng: Rng) -> list[Shape]:
    x = float(rng.choice([0.2, 0.8])) + float(rng.uniform(-0.06, 0.06))
    base, red = horizon + 0.05, (192, 62, 54)
    barn = [
        box(x - 0.13, base - 0.16, x + 0.13, base, red, part="scenery"),
        polygon(
            [
                (x - 0.155, base - 0.15),
                (x - 0.09, base - 0.24),
                (x, base - 0.285),
                (x + 0.09, base - 0.24),
                (x + 0.155, base - 0.15),
            ],
            WHITE if season.snow else (120, 64, 60),
            part="scenery",
        ),
        box(x - 0.05, base - 0.1, x + 0.05, base, WHITE, part="scenery"),
        line([(x - 0.05, base - 0.1), (x + 0.05, base)], 0.011, red, part="scenery", rim=False),
        line([(x + 0.05, base - 0.1), (x - 0.05, base)], 0.011, red, part="scenery", rim=False),
    ]
    field = WHITE if season.snow else mix(season.grass, (236, 206, 96), 0.55)
    ground = draw_ground(horizon, field, wave=0.015, rng=rng)
    fence_y = horizon + 0.075
    fence = [box(-0.1, fence_y + dy, 1.1, fence_y + dy + 0.014, CREAM, part="scenery") for dy in (0.0, 0.035)]
    fence += [
        box(px - 0.011, fence_y - 0.025, px + 0.011, fence_y + 0.07, CREAM, part="scenery")
        for px in np.arange(0.06, 1, 0.148).tolist()
    ]
    rows = [
        line(
            [(rx, horizon + 0.13), (0.5 + (rx - 0.5) * 2.2, 1.05)],
            0.014,
            darken(field, 0.16),
            part="scenery",
            rim=False,
        )
        for rx in np.linspace(0.05, 0.95, 7).tolist()
    ]
    return [ground, *rows, *barn, *fence]


def draw_moon(horizon: float, _: Season, rng: Rng) -> list[Shape]:
    gray = (186, 184, 198)
    earth_x, earth_y = float(rng.uniform(0.15, 0.85)), float(rng.uniform(0.14, 0.26))
    earth = [
        ellipse(earth_x, earth_y, 0.095, 0.095, (86, 156, 232), part="scenery", glows=True),
        ellipse(earth_x - 0.03, earth_y - 0.02, 0.04, 0.032, (110, 196, 120), part="scenery", rim=False, glows=True),
        ellipse(earth_x + 0.04, earth_y + 0.035, 0.03, 0.022, (110, 196, 120), part="scenery", rim=False, glows=True),
    ]
    ridges = [
        draw_hill(x, horizon, float(rng.uniform(0.2, 0.35)), float(rng.uniform(0.04, 0.1)), darken(gray, 0.15))
        for x in choose_x(rng, 3)
    ]
    craters: list[Shape] = []
    for x in choose_x(rng, 4):
        y, r = float(rng.uniform(horizon + 0.07, 0.95)), float(rng.uniform(0.035, 0.07))
        craters += [
            ellipse(x, y, r, r * 0.4, darken(gray, 0.2), part="scenery"),
            ellipse(x, y + r * 0.08, r * 0.78, r * 0.27, darken(gray, 0.34), part="scenery", rim=False),
        ]
    return [*earth, *ridges, draw_ground(horizon, gray, wave=0.015, rng=rng), *craters]


def draw_room(horizon: float, _: Season, rng: Rng) -> list[Shape]:
    """A room whose window shows the sky; the wall leaves the window open."""
    wall = [(238, 214, 180), (186, 214, 208), (232, 196, 204), (206, 206, 236)][int(rng.integers(4))]
    x, top = float(rng.choice([0.26, 0.74])) + float(rng.uniform(-0.08, 0.08)), float(rng.uniform(0.1, 0.16))
    left, right, bottom = x - 0.14, x + 0.14, top + 0.27
    walls = [
        box(-0.1, -0.1, left, horizon, wall, part="ground", rim=False),
        box(right, -0.1, 1.1, horizon, wall, part="ground", rim=False),
        box(left - 0.005, -0.1, right + 0.005, top, wall, part="ground", rim=False),
        box(left - 0.005, bottom, right + 0.005, horizon, wall, part="ground", rim=False),
    ]
    frame = [
        line(
            [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)],
            0.026,
            WHITE,
            smooth=False,
            part="scenery",
        ),
        line([(x, top), (x, bottom)], 0.016, WHITE, part="scenery", rim=False),
        line([(left, (top + bottom) / 2), (right, (top + bottom) / 2)], 0.016, WHITE, part="scenery", rim=False),
    ]
    other = 1 - x
    painting = [
        box(other - 0.1, top + 0.03, other + 0.1, top + 0.19, WOOD, part="scenery"),
        box(
            other - 0.08,
            top + 0.05,
            other + 0.08,
            top + 0.17,
            mix(wall, (90, 140, 190), 0.7),
            part="scenery",
            rim=False,
        ),
    ]
    floor = draw_ground(horizon, (190, 134, 90))
    boards = [
        line([(px, horizon), (0.5 + (px - 0.5) * 1.8, 1.05)], 0.008, (160, 108, 70), part="scenery", rim=False)
        for px in np.linspace(0, 1, 6).tolist()
    ]
    rug = ellipse(
        0.5,
        float(rng.uniform(0.86, 0.92)),
        0.4,
        0.085,
        [(206, 92, 92), (96, 132, 190), (120, 168, 120)][int(rng.integers(3))],
        part="scenery",
    )
    skirting = box(-0.1, horizon - 0.03, 1.1, horizon, lighten(wall, 0.5), part="scenery", rim=False)
    return [*walls, *frame, *painting, skirting, floor, *boards, rug]


SETTINGS: dict[str, Setting] = {
    "meadow": draw_meadow,
    "beach": draw_beach,
    "desert": draw_desert,
    "snow": draw_snowfield,
    "forest": draw_forest,
    "city": draw_city,
    "mountains": draw_mountains,
    "farm": draw_farm,
    "moon": draw_moon,
    "room": draw_room,
}
SEASONAL = ("meadow", "forest", "city", "mountains", "farm")
"""Settings that look different from season to season; the others are drawn as in summer."""
