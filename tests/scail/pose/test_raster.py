"""Shapes against pictures that OpenCV 5.0 drew (`line`, `circle`, `ellipse2Poly` with `fillConvexPoly`)."""

from __future__ import annotations

import numpy as np
import pytest

from scail.pose import raster

HEIGHT, WIDTH = 10, 16

THIN = """
..##............
....##..........
......##........
........##......
..........##....
............#..."""
THIN_CUT = """
##..............
..###...........
.....###........
........###.....
...........###..
..............##"""
THICK = """
..#.............
.####...........
..#####.........
....#####.......
......#####.....
........#####...
..........####..
............#..."""
THICK_CUT = """
###.............
#######.........
##########......
...##########...
......##########
.........#######
.............###"""
ELLIPSE = """
..######........
.#########......
.##########.....
.###########....
.############...
.#############..
..############..
...###########..
....##########..
.....#########..
.......######..."""


def drawn(pixels: raster.Pixels, height: int = HEIGHT, width: int = WIDTH) -> str:
    canvas = np.full((height, width), ".")
    canvas[pixels.y, pixels.x] = "#"
    return "\n".join("".join(row) for row in canvas if "#" in row)


@pytest.mark.parametrize(
    ("start", "end", "thickness", "expected"),
    [
        ((2, 2), (12, 7), 1, THIN),
        ((-6, 1), (19, 8), 1, THIN_CUT),
        ((2, 2), (12, 7), 2, THICK),
        ((-6, 1), (19, 8), 2, THICK_CUT),
    ],
)
def test_lines_are_those_of_opencv(start, end, thickness, expected):
    pixels = raster.draw_lines(np.array([start]), np.array([end]), thickness, height=HEIGHT, width=WIDTH)

    assert drawn(pixels) == expected.strip("\n")


def test_the_filled_ellipse_is_that_of_opencv():
    pixels = raster.draw_ellipses(np.array([(7, 6)]), np.array([7]), 4, np.array([30]), height=14, width=WIDTH)

    assert drawn(pixels, height=14) == ELLIPSE.strip("\n")


@pytest.mark.parametrize(("radius", "num_pixels"), [(1, 5), (2, 13), (4, 49)])
def test_discs_are_round_and_symmetric(radius, num_pixels):
    pixels = raster.draw_discs(np.array([(8, 5)]), radius, height=HEIGHT, width=WIDTH)
    points = set(zip(pixels.x - 8, pixels.y - 5, strict=True))

    assert len(points) == len(pixels.x) == num_pixels
    assert points == {(-x, y) for x, y in points} == {(y, x) for x, y in points}


@pytest.mark.parametrize("thickness", [1, 2])
def test_a_line_does_not_depend_on_its_direction(thickness):
    rng = np.random.default_rng(0)
    start, end = rng.integers(2, (WIDTH - 2, HEIGHT - 2), (2, 200, 2))

    there = raster.draw_lines(start, end, thickness, height=HEIGHT, width=WIDTH)
    back = raster.draw_lines(end, start, thickness, height=HEIGHT, width=WIDTH)

    assert set(zip(*there, strict=True)) == set(zip(*back, strict=True))


@pytest.mark.parametrize("thickness", [1, 2])
def test_many_lines_are_drawn_as_each_alone_and_in_order(thickness):
    rng = np.random.default_rng(1)
    start, end = rng.integers(-10, 30, (2, 50, 2))
    together = raster.draw_lines(start, end, thickness, height=HEIGHT, width=WIDTH)

    assert (np.diff(together.owner) >= 0).all()
    for line in range(50):
        part = slice(line, line + 1)
        alone = raster.draw_lines(start[part], end[part], thickness, height=HEIGHT, width=WIDTH)
        own = together.owner == line
        pixels = set(zip(alone.x, alone.y, strict=True))
        assert set(zip(together.x[own], together.y[own], strict=True)) == pixels


def test_no_shapes_give_no_pixels():
    none = np.empty((0, 2), np.int64)

    for thickness in (1, 2):
        assert len(raster.draw_lines(none, none, thickness, height=HEIGHT, width=WIDTH).x) == 0
    assert len(raster.draw_discs(none, 4, height=HEIGHT, width=WIDTH).x) == 0
    assert len(raster.draw_ellipses(none, none[:, 0], 4, none[:, 0], height=HEIGHT, width=WIDTH).x) == 0
