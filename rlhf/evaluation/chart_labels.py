"""Placement of the names of points on a chart, so that no name covers another name, a point or a line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
Point = tuple[float, float]

GAP = 4.0  # least distance from a point to the nearest edge of its label
RINGS = 14  # number of distances that are tried
STEP = 5.0  # from one distance to the next


def place(anchors: Sequence[Point], sizes: Sequence[Point], obstacles: Sequence[Box], bounds: Box) -> list[Box]:
    """Return one box for each label: the nearest free position, right of its point (`anchors`) if that is free.

    Labels of `sizes` (width, height) are placed in the given order, within `bounds` and clear of `obstacles`. If no
    position within reach is free, the one that covers least is taken.
    """
    placed: list[Box] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        taken = [*obstacles, *placed]
        within = [box for box in _candidates(anchor, size) if _inside(box, bounds)]
        costs = ((sum(overlap(box, other) for other in taken), i) for i, box in enumerate(within))
        best = min(costs, default=None)
        placed.append(within[best[1]] if best else next(_candidates(anchor, size)))
    return placed


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def nearest(box: Box, point: Point) -> Point:
    """Return the point of a box that is nearest to a given point; a line from that point ends there."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _candidates(anchor: Point, size: Point) -> Iterator[Box]:
    """Yield boxes around a point, near ones first; at each distance right, left, above, below, then between."""
    (x, y), (width, height) = anchor, size
    for ring in range(RINGS):
        distance = GAP + ring * STEP
        for degrees in (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            centre = (x + across * (distance + width / 2), y + up * (distance + height / 2))
            yield (centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2)


def _inside(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
