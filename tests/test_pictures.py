"""The grid of captioned pictures and the line chart."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFont

from minimagen_fast.pictures import INK, LINE_COLORS, PAPER, _wrapped, captioned_grid, loss_curve


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def where(image: Image.Image, color: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of exactly that colour."""
    return np.nonzero((pixels(image) == color).all(-1))


def plain(color, size=(32, 32), mode="RGB"):
    return Image.new("RGB", size, color).convert(mode)


def test_pictures_stand_enlarged_in_order_above_their_captions():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]
    grid = captioned_grid([plain(color) for color in colors], ["a caption"] * 6)
    assert grid.mode == "RGB"
    corners = []
    for color in colors:
        rows, columns = where(grid, color)
        assert len(rows) == 128 * 128, "32 pixels a side, enlarged four times"
        assert np.ptp(rows) == np.ptp(columns) == 127
        below = pixels(grid)[rows.max() + 1 : rows.max() + 30, columns.min() : columns.max() + 1]
        assert (below < 128).all(-1).any(), "a caption below each"
        corners.append((rows.min(), columns.min()))
    assert corners == sorted(corners) and len({row for row, _ in corners}) == 2


def test_enlarged_without_smoothing():
    checkers = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    grid = pixels(captioned_grid([checkers], [""]))
    middle = grid[16:144, 16:144, 0]
    assert set(np.unique(middle)) == {0, 255}
    assert (middle.reshape(8, 16, 8, 16) == pixels(checkers)[:, None, :, None]).all()


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (7, 3), (8, 4), (16, 4), (24, 6)])
def test_columns_are_chosen(count, columns):
    grid = captioned_grid([plain((9, 9, 9))] * count, ["x"] * count)
    assert grid.width == 16 + columns * 144


def test_columns_and_scale_can_be_given():
    grid = captioned_grid([plain((9, 9, 9), (100, 100))] * 3, ["x"] * 3, columns=1, scale=2)
    assert grid.width == 16 + 216 and len(where(grid, (9, 9, 9))[0]) == 3 * 200 * 200


def test_long_captions_are_wrapped_within_their_column():
    picture = plain((9, 9, 9), (128, 128))
    short, long = (captioned_grid([picture], [text]) for text in ("one", "word " * 20 + "x" * 60))
    assert long.height > short.height and long.width == short.width
    dark = (pixels(long)[150:] < 128).all(-1)
    assert dark[:, 16:144].any() and not dark[:, :14].any() and not dark[:, 146:].any()


def test_a_word_of_any_length_is_wrapped_at_once(monkeypatch):
    measured = []

    def length(self, text, *rest):
        measured.append(len(text))
        return 10.0 * len(text)

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", length)
    font = ImageFont.load_default(14)
    assert _wrapped("ab " + "x" * 1000, font, 96) == ["ab", *["x" * 9] * 111, "x"]
    # Once as a whole, then no more than a line at a time.
    assert sorted(measured)[-2:] == [10, 1003] and len(measured) < 1100


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_mode_and_unequal_sizes(mode):
    grid = captioned_grid([plain((255, 255, 255), (4, 10), mode), plain((0, 0, 0), (300, 7))], ["a", "b"])
    assert grid.mode == "RGB" and grid.width == 16 + 2 * (300 + 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], []), "images is empty"),
        (([plain((0, 0, 0))], ["a", "b"]), "captions must be as many as images, 1; got 2"),
    ],
)
def test_grid_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        captioned_grid(*arguments)


@pytest.mark.parametrize("name", ["columns", "scale"])
def test_grid_refuses_numbers_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        captioned_grid([plain((0, 0, 0))], ["a"], **{name: 0})


def line_at(chart: Image.Image, color: tuple[int, int, int]) -> dict[int, float]:
    """Mean row of a line for each column, left of the legend; its edges are smooth, so few pixels are of its colour."""
    rows, columns = np.nonzero(np.abs(pixels(chart) - color).sum(-1) < 150)
    return {column: rows[columns == column].mean() for column in np.unique(columns) if column < 600}


def test_lines_follow_their_points():
    falling, rising = [(x, 1 - x / 100) for x in range(101)], [(x, x / 100) for x in range(101)]
    chart = loss_curve({"falling": falling, "rising": rising}, title="A title")
    assert chart.size == (800, 480) and chart.mode == "RGB"
    down, up = (line_at(chart, color) for color in LINE_COLORS[:2])
    first, last = min(down), max(down)
    assert last - first > 400
    slope = (down[last] - down[first]) / (last - first)
    assert slope > 0.3, "lower values stand lower"
    assert all(abs(down[c] - (down[first] + slope * (c - first))) < 1.5 for c in down), "straight"
    assert (up[max(up)] - up[min(up)]) / (max(up) - min(up)) == pytest.approx(-slope, abs=0.01)


def test_a_logarithmic_axis_makes_exponential_decay_straight():
    points = [(x, 10 ** (-x / 50)) for x in range(101)]
    line = line_at(loss_curve({"loss": points}, log_y=True), LINE_COLORS[0])
    first, last = min(line), max(line)
    slope = (line[last] - line[first]) / (last - first)
    assert all(abs(line[c] - (line[first] + slope * (c - first))) < 1.5 for c in line)


def test_points_that_cannot_be_drawn_leave_a_gap():
    points = [(x, math.nan if 40 <= x <= 60 else 0.5) for x in range(101)]
    columns = sorted(line_at(loss_curve({"loss": points}), LINE_COLORS[0]))
    assert max(b - a for a, b in zip(columns, columns[1:], strict=False)) > 100
    lonely = loss_curve({"loss": [(0, 1.0), (1, math.inf), (2, 1.0)]})
    assert line_at(lonely, LINE_COLORS[0]), "a single point is marked"


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("points", [[(5, 0.1)], [(0, 3.0), (1, 3.0)], [(0, 1e-9), (1e6, 1e9)]])
def test_hard_ranges(points, log_y):
    chart = loss_curve({"loss": points}, log_y=log_y, size=(240, 160))
    assert chart.size == (240, 160)
    assert len(where(chart, INK)[0]) > 100 and len(where(chart, PAPER)[0]) > 10_000


@pytest.mark.parametrize(
    "series, options, message",
    [
        ({}, {}, "no point"),
        ({"loss": []}, {}, "no point"),
        ({"loss": [(0, math.nan)]}, {}, "no point"),
        ({"loss": [(0, -1.0)]}, {"log_y": True}, "no point that can be drawn on a logarithmic axis"),
        ({"loss": [(0, 1.0)]}, {"size": (100, 100)}, "size must be at least"),
    ],
)
def test_chart_refuses(series, options, message):
    with pytest.raises(ValueError, match=message):
        loss_curve(series, **options)
