"""A line plot of IOPS over fork depth as SVG, by hand: depth on a logarithmic axis with 0 set apart."""

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 800, 440
LEFT, RIGHT, TOP, BOTTOM = 84, 190, 56, 64
COLOURS = {"tidepool": "#0b6e99", "qcow2": "#c2410c"}
SPARE_COLOURS = ["#4d7c0f", "#6d28d9"]
MARKS = ["circle", "square"]
DEPTH_MAX = 1000


def x_of(depth):
    """Depth 0 takes a place of its own, one decade left of depth 1."""
    decades = math.log10(depth) + 1 if depth > 0 else 0.0
    return LEFT + decades / (math.log10(DEPTH_MAX) + 1) * (WIDTH - LEFT - RIGHT)


def nice_top(value):
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `value`."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)


def short(value):
    if value >= 1000:
        return f"{value / 1000:.0f}k" if value >= 10000 else f"{value / 1000:.1f}k"
    return f"{value:.0f}"


def text(x, y, content, size=12, anchor="middle", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {extra}>{escape(content)}</text>'


def line(x1, y1, x2, y2, style):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def mark(kind, x, y, colour):
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'


def axes(top, y_of):
    parts, right, floor = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for step in range(6):
        value = top * step / 5
        parts.append(line(LEFT, y_of(value), right, y_of(value), 'stroke="#d8dee4"'))
        parts.append(text(LEFT - 10, y_of(value) + 4, short(value), anchor="end"))
    for depth in (0, 1, 10, 100, DEPTH_MAX):
        parts.append(line(x_of(depth), floor, x_of(depth), floor + 6, 'stroke="#57606a"'))
        parts.append(text(x_of(depth), floor + 22, str(depth)))
    parts.append(line(LEFT, floor, right, floor, 'stroke="#57606a"'))
    # The break between 0 and the logarithmic part.
    gap = (x_of(0) + x_of(1)) / 2
    for shift in (-3, 3):
        parts.append(line(gap + shift - 3, floor + 6, gap + shift + 3, floor - 6, 'stroke="#57606a" stroke-width="1.5"'))
    parts.append(text((LEFT + right) / 2, HEIGHT - 18, "fork depth (logarithmic)", 13))
    middle = (TOP + floor) / 2
    parts.append(text(22, middle, "4 KiB random read IOPS, QD 32", 13, extra=f'transform="rotate(-90 22 {middle:.1f})"'))
    return parts


def depth_plot(series, absent=()):
    """`series` maps a name to [(depth, {median, min, max})]; bars show least to most. `absent` are
    (name, depth, why) that gave no figure: a cross on the axis with the reason."""
    top = nice_top(max(value["max"] for points in series.values() for _, value in points))
    floor = HEIGHT - BOTTOM

    def y_of(value):
        return floor - value / top * (floor - TOP)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
             'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" fill="#24292f" role="img" '
             'aria-label="IOPS over fork depth">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
             text(LEFT, 30, "Random read IOPS over fork depth", 16, "start", 'font-weight="600"')]
    parts += axes(top, y_of)
    spare = iter(SPARE_COLOURS)
    for index, (name, points) in enumerate(series.items()):
        colour, kind = COLOURS.get(name) or next(spare, "#57606a"), MARKS[index % 2]
        path = " ".join(f"{x_of(d):.1f},{y_of(v['median']):.1f}" for d, v in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        for depth, value in points:
            x, y = x_of(depth), y_of(value["median"])
            parts.append(line(x, y_of(value["min"]), x, y_of(value["max"]), f'stroke="{colour}" stroke-width="1.2"'))
            parts.append(mark(kind, x, y, colour))
            parts.append(text(x + 6, y - 9, short(value["median"]), 11, "start", f'style="fill:{colour}"'))
        y = TOP + 12 + index * 24
        parts.append(line(WIDTH - RIGHT + 56, y, WIDTH - RIGHT + 82, y, f'stroke="{colour}" stroke-width="2.2"'))
        parts.append(mark(kind, WIDTH - RIGHT + 69, y, colour))
        parts.append(text(WIDTH - RIGHT + 90, y + 4, name, 13, "start"))
    for name, depth, why in absent:
        x, colour = x_of(depth), COLOURS.get(name, "#57606a")
        for sign in (-1, 1):
            parts.append(line(x - 5, floor - 5 * sign, x + 5, floor + 5 * sign, f'stroke="{colour}" stroke-width="2.2"'))
        parts.append(text(x + 10, floor - 12, why, 11, extra=f'style="fill:{colour}"'))
    return "\n".join([*parts, "</svg>", ""])
