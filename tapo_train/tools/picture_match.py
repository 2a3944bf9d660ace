"""Whether a picture is a region of another one: the region is moved until both agree best.

A vector of low frequencies proposes pictures; no threshold on it is safe for crops, because much
looks alike from afar. Here the fine structure decides: brightness differences between neighbours
of GRID x GRID cells, after the region was aligned (Gauss-Newton on its four edges). It is near 1
for the same picture and small for others, whatever they have in common from afar.
"""

from __future__ import annotations

import numpy as np

from tapo_train.tools.picture_vectors import SIDE, Floats, Pixels, covered

__all__ = ["agreement"]

GRID = 24
COARSE = 12
"""[cells of a side] of the first alignment."""
ROUNDS = 3
"""Steps of each alignment."""
ALIGNED = 4
"""Pictures that are aligned finely."""
_PROBE = 0.01
"""[share of a side] by which an edge is moved to see what that changes."""
_INWARDS = np.array([1, 1, -1, -1], dtype=np.float32)
_MOST = 0.1
"""[share of a side] an edge moves in a step."""
_LEAST_SIDE = 0.2
"""[share of a side] a region has at least."""
_DAMPING = 1e-3
"""[share of the curvature] keeps a step small where an edge changes nothing."""
_BRIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def agreement(asked: Pixels, pictures: Pixels, boxes: Floats) -> Floats:
    """How well a picture agrees with regions near `boxes` of others.

    Args:
        asked: [SIDE, SIDE, 3] squashed.
        pictures: [N, SIDE, SIDE] brightness of squashed pictures.
        boxes: [N, 4] left, top, right, bottom, shares.

    Returns:
        [N] correlation of the fine structure, -1 to 1; -1 beyond the ALIGNED most alike.
    """
    whole = np.array([[0, 0, 1, 1]], dtype=np.float32)
    brightness = brightness_of(asked).astype(np.float32)[None]
    wanted = {cells: _unit(_seen(brightness, whole, cells)) for cells in {COARSE, GRID}}
    found = pictures.astype(np.float32)
    for _ in range(ROUNDS):
        boxes = _moved(wanted[COARSE], found, boxes, COARSE)
    alike = (_unit(_seen(found, boxes, COARSE)) * wanted[COARSE]).sum(axis=1)
    best = np.argsort(-alike, kind="stable")[:ALIGNED]
    found, boxes = found[best], boxes[best]
    for _ in range(ROUNDS):
        boxes = _moved(wanted[GRID], found, boxes, GRID)
    fine = _structure(_seen(found, boxes, GRID)) * _structure(_seen(brightness, whole, GRID))
    agrees = np.full(len(pictures), -1, dtype=np.float32)
    agrees[best] = fine.sum(axis=1)
    return agrees


def brightness_of(pixels: Pixels) -> Pixels:
    """[..., SIDE, SIDE] of RGB."""
    brightness: Pixels = np.rint(pixels.astype(np.float32) @ _BRIGHTNESS).astype(np.uint8)
    return brightness


def _seen(pictures: Floats, boxes: Floats, cells: int) -> Floats:
    """[N, cells, cells] means over the cells of each box."""
    left, top, right, bottom = boxes.T
    rows, columns = covered(top, bottom, cells), covered(left, right, cells)
    means = rows @ pictures @ columns.transpose(0, 2, 1)
    return means.astype(np.float32, copy=False)


def _unit(cells: Floats) -> Floats:
    """[N, cells * cells] without the mean, of length 1."""
    flat = cells.reshape(len(cells), -1)
    return _of_length_one(flat - flat.mean(axis=1, keepdims=True))


def _of_length_one(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = (rows / np.maximum(norms, 1e-3)).astype(np.float32)
    return unit


def _structure(cells: Floats) -> Floats:
    """Differences between neighbours, of length 1."""
    across = np.diff(cells, axis=2).reshape(len(cells), -1)
    down = np.diff(cells, axis=1).reshape(len(cells), -1)
    return _of_length_one(np.concatenate([across, down], axis=1))


def _moved(wanted: Floats, pictures: Floats, boxes: Floats, cells: int) -> Floats:
    """The boxes after one step towards the best agreement."""
    seen, *probed = (_unit(one) for one in _probed(pictures, boxes, cells))
    # [N, cells * cells, 4]; the last two edges were moved back.
    jacobian = np.stack([one - seen for one in probed], axis=2) / _PROBE * _INWARDS
    turned = jacobian.transpose(0, 2, 1)
    normal = turned @ jacobian
    damping = _DAMPING * (1 + np.trace(normal, axis1=1, axis2=2))
    normal += damping[:, None, None] * np.eye(4, dtype=np.float32)
    step = np.linalg.solve(normal, turned @ (wanted - seen)[:, :, None])[:, :, 0]
    moved: Floats = np.clip(boxes + np.clip(step, -_MOST, _MOST), 0, 1)
    moved[:, 2:] = np.maximum(moved[:, 2:], np.minimum(moved[:, :2] + _LEAST_SIDE, 1))
    moved[:, :2] = np.minimum(moved[:, :2], moved[:, 2:] - _LEAST_SIDE)
    return moved


def _probed(pictures: Floats, boxes: Floats, cells: int) -> tuple[Floats, ...]:
    """What the boxes show, and what they show with the left, top, right or bottom edge moved."""
    left, top, right, bottom = boxes.T
    columns = _probing(left, right, cells).transpose(0, 1, 3, 2)
    rows = _probing(top, bottom, cells)
    across, down = pictures @ columns[0], rows[0] @ pictures
    return (
        rows[0] @ across,
        down @ columns[1],
        rows[1] @ across,
        down @ columns[2],
        rows[2] @ across,
    )


def _probing(start: Floats, end: Floats, cells: int) -> Floats:
    """[3, N, cells, SIDE] weights as they are, with the start moved, with the end moved."""
    starts = np.concatenate([start, start + _PROBE, start])
    ends = np.concatenate([end, end, end - _PROBE])
    return covered(starts, ends, cells).reshape(3, len(start), cells, SIDE)
