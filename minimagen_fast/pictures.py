"""Pictures for people: tensors as PIL images, a captioned grid of images, a line chart of losses."""

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (34, 34, 34)
FAINT = (228, 228, 228)
# Okabe & Ito (2008), "Color Universal Design": told apart with every common colour vision. Their yellow is left out: it
# is too light for lines on paper.
LINE_COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))

# A picture is enlarged by a whole number to about this many pixels a side, so that those of a 32x32 one can be seen.
COMFORTABLE_SIDE = 128
# Lines are drawn this many times larger and reduced: PIL's own have jagged edges.
OVERSAMPLING = 4


# Modes of PIL images by number of channels.
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def to_pil_images(images: torch.Tensor) -> list[Image.Image]:
    """Convert images in [0, 1], shape (b, c, h, w) with 1 to 4 channels, to 8-bit PIL images.

    The modes are L, LA, RGB and RGBA for 1, 2, 3 and 4 channels.

    Raises:
        ValueError: for any other number of channels.
    """
    channels = images.shape[1]
    if channels not in PIL_MODES:
        raise ValueError(f"PIL images have 1 to 4 channels, these have {channels}; use return_pil_images=False")
    pixels = images.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    if channels == 1:
        pixels = pixels[..., 0]
    return [Image.fromarray(image) for image in pixels]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """``text`` in lines no wider than ``width`` pixels; a word that is wider is cut."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        line = ""
        # Letter by letter, so that a line is all that is ever measured: a word may be of any length.
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    return [*lines, line] if line else lines


def _columns_for(count: int) -> int:
    """As many columns as rows, or up to twice as many where that leaves no gap in the last row."""
    side = math.ceil(math.sqrt(count))
    return next((columns for columns in range(side, 2 * side) if count % columns == 0), side)


def captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Lay pictures out in a grid, each above its caption.

    Args:
        images: the pictures, of any mode and size.
        captions: one for each picture; a long one is wrapped to the width of its column.
        columns: how many pictures stand side by side. Default: about as many as there are rows.
        scale: the whole number by which every picture is enlarged, pixel by pixel. Default: what brings the largest
            to about 128 pixels a side; pictures larger than that stay as they are.

    Returns:
        The grid as an RGB picture.

    Raises:
        ValueError: if there are no pictures, not as many captions, or ``columns`` or ``scale`` is below 1.
    """
    if not images:
        raise ValueError("images is empty: there is nothing to lay out")
    if len(images) != len(captions):
        raise ValueError(f"captions must be as many as images, {len(images)}; got {len(captions)}")
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None to have it chosen; got {value}")

    if scale is None:
        scale = max(1, round(COMFORTABLE_SIDE / max(max(image.size) for image in images)))
    columns = min(columns or _columns_for(len(images)), len(images))
    rows = math.ceil(len(images) / columns)

    gap = 16
    font = _font(14)
    line_height = 18
    width = max(max(image.width for image in images) * scale, 96)
    height = max(image.height for image in images) * scale
    texts = [_wrapped(caption, font, width) for caption in captions]
    # Each row is as high as its longest caption needs.
    row_lines = [max(map(len, texts[row * columns : (row + 1) * columns])) for row in range(rows)]
    row_heights = [height + 6 + lines * line_height + gap for lines in row_lines]

    grid = Image.new("RGB", (gap + columns * (width + gap), gap + sum(row_heights)), PAPER)
    draw = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(index, columns)
        left = gap + column * (width + gap)
        top = gap + sum(row_heights[:row])
        enlarged = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        grid.paste(enlarged, (left + (width - enlarged.width) // 2, top + height - enlarged.height))
        for number, line in enumerate(lines):
            draw.text(
                (left + width / 2, top + height + 6 + number * line_height), line, fill=INK, font=font, anchor="ma"
            )
    return grid


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about ``count`` of them, from ``low`` to ``high``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``, with their doubles and quintuples where those alone would be few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(exponents) > 5 else (1, 2, 5)
    return [f * 10.0**e for e in exponents for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001]


def _label(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:,.6g}" if 1e-4 <= abs(value) < 1e7 else f"{value:.0e}"


def loss_curve(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    size: tuple[int, int] = (800, 480),
    title: str = "Training loss",
    x_label: str = "step",
    y_label: str = "loss",
    log_y: bool = False,
) -> Image.Image:
    """Draw a line chart.

    Args:
        series: a name and its (x, y) points in the order of x, for each line. Points that are not finite, or not above
            zero where ``log_y``, leave a gap.
        size: width and height of the picture in pixels, at least (240, 160).
        title: what stands above the chart.
        x_label: what stands below it.
        y_label: what stands above its vertical axis.
        log_y: whether the vertical axis is logarithmic. A linear one starts at zero where no value lies below.

    Returns:
        The chart as an RGB picture.

    Raises:
        ValueError: if ``size`` is too small, or no point can be drawn.
    """
    if size[0] < 240 or size[1] < 160:
        raise ValueError(f"size must be at least (240, 160) pixels; got {size}")

    def drawable(point: tuple[float, float]) -> bool:
        return all(map(math.isfinite, point)) and (point[1] > 0 or not log_y)

    points = [point for line in series.values() for point in line if drawable(point)]
    if not points:
        raise ValueError("series holds no point that can be drawn" + (" on a logarithmic axis" if log_y else ""))

    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if log_y:
        y_low, y_high = y_low / 1.15, y_high * 1.15
        y_ticks = _logarithmic_ticks(y_low, y_high)
    else:
        y_low = min(y_low, 0.0)
        y_high += 0.05 * (y_high - y_low) or 1.0
        y_ticks = _linear_ticks(y_low, y_high, max(2, size[1] // 80))
    x_ticks = _linear_ticks(x_low, x_high, max(2, size[0] // 110))

    small, large = _font(13), _font(17)
    left = 24 + math.ceil(max(small.getlength(_label(tick)) for tick in y_ticks or [0.0]))
    right, top, bottom = size[0] - 28, 66, size[1] - 52

    def column(x: float) -> float:
        return left + (right - left) * (x - x_low) / (x_high - x_low)

    def row(y: float) -> float:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log_y else (y - y_low) / (y_high - y_low)
        return bottom - (bottom - top) * share

    canvas = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), PAPER)
    draw = ImageDraw.Draw(canvas)

    def stroke(path: Sequence[tuple[float, float]], color: tuple[int, int, int], width: float) -> None:
        scaled = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in path]
        draw.line(scaled, fill=color, width=round(width * OVERSAMPLING), joint="curve")

    for tick in y_ticks:
        stroke([(left, row(tick)), (right, row(tick))], FAINT, 1)
    stroke([(left, top), (left, bottom), (right, bottom)], INK, 1)
    for tick in x_ticks:
        stroke([(column(tick), bottom), (column(tick), bottom + 5)], INK, 1)
    colors = [LINE_COLORS[index % len(LINE_COLORS)] for index in range(len(series))]
    for line, color in zip(series.values(), colors, strict=True):
        run: list[tuple[float, float]] = []
        for point in [*line, (math.nan, math.nan)]:
            if drawable(point):
                run.append((column(point[0]), row(point[1])))
                continue
            if len(run) == 1:  # A line through one point has no length: mark the point itself.
                run = [(run[0][0] - 2, run[0][1]), (run[0][0] + 2, run[0][1])]
            if run:
                stroke(run, color, 1.8)
            run = []
    legend_width = max(math.ceil(small.getlength(name)) for name in series) + 44
    legend = (right - legend_width, top, right, top + 10 + 20 * len(series))
    draw.rectangle([edge * OVERSAMPLING for edge in legend], fill=PAPER, outline=FAINT, width=OVERSAMPLING)
    for index, color in enumerate(colors):
        middle = legend[1] + 15 + 20 * index
        stroke([(legend[0] + 8, middle), (legend[0] + 30, middle)], color, 2.4)

    # Letters are drawn at their final size: enlarged and reduced they get blurred.
    chart = canvas.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(chart)
    draw.text((left, 14), title, fill=INK, font=large, anchor="la")
    draw.text((left, top - 10), y_label, fill=INK, font=small, anchor="ls")
    draw.text(((left + right) / 2, size[1] - 12), x_label, fill=INK, font=small, anchor="ms")
    for tick in y_ticks:
        draw.text((left - 8, row(tick)), _label(tick), fill=INK, font=small, anchor="rm")
    for tick in x_ticks:
        draw.text((column(tick), bottom + 10), _label(tick), fill=INK, font=small, anchor="ma")
    for index, name in enumerate(series):
        draw.text((legend[0] + 36, legend[1] + 15 + 20 * index), name, fill=INK, font=small, anchor="lm")
    return chart
