"""Tiles: what is found in them comes back to its place in the picture, once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects, label

from lucidetr.categories import Categories
from lucidetr.deployment.detector import Detector
from lucidetr.deployment.tiles import Tiling, View, merge, predict_in_tiles, starts, views
from lucidetr.structures import Detections

CATEGORIES = Categories(ids=(5, 9), names=("red", "green"))
ANY = torch.zeros(2, dtype=torch.float64)


def detections(*rows) -> Detections:
    """Return detections of one picture from (label, x0, y0, x1, y1, score)."""
    flat = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(flat[:, 1:5], flat[:, 5], flat[:, 0].long(), CATEGORIES)


class FindsSquares(Detector):
    """Find red and green patches exactly, whatever their size; the larger what is seen of one, the surer."""

    def __init__(self):
        self.card = SimpleNamespace(categories=CATEGORIES)
        self.seen = []

    def predict_many(self, pictures, threshold=0.0):
        for picture in pictures:
            self.seen.append(tuple(picture.shape[1:]))
            rows = []
            for channel in (0, 1):
                for rows_, columns in find_objects(label(picture[channel].numpy() > 0)[0]):
                    box = (columns.start, rows_.start, columns.stop, rows_.stop)
                    rows.append((channel, *box, min(0.3 + (box[2] - box[0]) * (box[3] - box[1]) / 1e5, 0.99)))
            yield detections(*rows).above(threshold)


def scene(height, width, *squares):
    """Return a black picture with squares of (channel, x0, y0, x1, y1)."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for channel, x0, y0, x1, y1 in squares:
        image[channel, y0:y1, x0:x1] = 200
    return image


def said(found):
    return sorted((name, *map(int, box)) for name, box in zip(found.names, found.boxes_xyxy.tolist(), strict=True))


@pytest.mark.parametrize("length", [1, 99, 100, 101, 181, 1000, 1733])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.9])
def test_tiles_cover_a_side_and_overlap_as_asked(length, overlap):
    begin = starts(length, Tiling(side=100, overlap=overlap))
    assert begin[0] == 0
    assert begin[-1] == max(length - 100, 0)
    steps = np.diff(begin)
    assert (steps >= 1).all()
    assert (steps <= 100 * (1 - overlap) + 1e-9).all()


def test_the_whole_picture_comes_first_and_only_where_there_are_several_tiles():
    assert views(80, 250, Tiling(100, 0.5)) == [View(0, 0, 250, 80)] + [
        View(left, 0, left + 100, 80) for left in (0, 50, 100, 150)
    ]
    assert views(80, 250, Tiling(100, 0.5, whole=False))[0] == View(0, 0, 100, 80)
    assert views(100, 90, Tiling(100)) == [View(0, 0, 90, 100)]


def test_squares_are_found_once_and_in_their_place():
    squares = [
        (0, 5, 5, 25, 25),  # in one tile
        (0, 85, 30, 97, 42),  # where two tiles overlap, whole in both
        (0, 84, 60, 112, 95),  # cut in the first tile, whole in the second
        (1, 78, 82, 99, 98),  # near four tiles
        (1, 200, 0, 230, 40),
    ]
    red, green = [s for s in squares if s[0] == 0], [s for s in squares if s[0] == 1]
    detector = FindsSquares()
    image = scene(180, 260, *red, *green)
    found = predict_in_tiles(detector, image, Tiling(100, 0.2, whole=False), ANY)
    assert said(found) == sorted((CATEGORIES.names[channel], *box) for channel, *box in squares)
    assert set(detector.seen) == {(100, 100)}
    assert (found.scores.diff() <= 0).all()


def test_an_object_larger_than_a_tile_is_found_in_the_whole_picture_and_its_pieces_go():
    image = scene(300, 300, (0, 20, 30, 280, 260))
    assert said(predict_in_tiles(FindsSquares(), image, Tiling(100), ANY)) == [("red", 20, 30, 280, 260)]
    pieces = predict_in_tiles(FindsSquares(), image, Tiling(100, whole=False), ANY)
    assert len(pieces) > 4  # without the whole picture nothing shows that they belong together


def test_close_neighbours_at_a_seam_stay_two():
    neighbours = [(0, 60, 40, 89, 60), (0, 91, 40, 120, 60)]
    found = predict_in_tiles(FindsSquares(), scene(100, 180, *neighbours), Tiling(100, 0.2), ANY)
    assert said(found) == [("red", 60, 40, 89, 60), ("red", 91, 40, 120, 60)]


def test_only_boxes_of_other_views_and_the_same_class_are_merged():
    parts = [View(0, 0, 100, 100), View(80, 0, 180, 100)]
    twice = detections((0, 30, 30, 60, 60, 0.9), (0, 32, 30, 60, 60, 0.8), (1, 30, 30, 60, 60, 0.7))
    assert len(merge([twice, detections()], parts, 100, 180)) == 3
    left = detections((0, 84, 30, 96, 60, 0.6), (1, 84, 30, 96, 60, 0.5))
    right = detections((0, 4, 30, 16, 61, 0.9))
    merged = merge([left, right], parts, 100, 180)
    assert said(merged) == [("green", 84, 30, 96, 60), ("red", 84, 30, 96, 61)]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.5])


def test_a_cut_box_loses_to_a_whole_one_however_sure_it_is():
    parts = [View(0, 0, 100, 100), View(80, 0, 180, 100)]
    merged = merge([detections((0, 82, 30, 100, 60, 0.99))], parts[:1], 100, 180)
    assert len(merged) == 1  # alone it stays
    merged = merge([detections((0, 82, 30, 100, 60, 0.99)), detections((0, 3, 30, 50, 60, 0.3))], parts, 100, 180)
    assert said(merged) == [("red", 83, 30, 130, 60)]
    # a border of the picture itself cuts nothing
    merged = merge([detections((0, 0, 0, 20, 20, 0.4)), detections()], parts, 100, 180)
    assert len(merged) == 1


def test_thresholds_count_before_merging():
    """A box that is too weak for its class does not take another one out."""
    least = torch.tensor([0.5, 0.0], dtype=torch.float64)

    class Said(FindsSquares):
        def predict_many(self, pictures, threshold=0.0):
            assert threshold == 0.0
            answers = [detections((0, 82, 30, 100, 60, 0.99)), detections((0, 3, 30, 50, 60, 0.3))]
            return (answer for answer, _ in zip(answers, pictures, strict=True))

    found = predict_in_tiles(Said(), scene(100, 180), Tiling(100, 0.2, whole=False), least)
    assert said(found) == [("red", 82, 30, 100, 60)]


def test_nothing_found_is_an_empty_answer():
    assert len(predict_in_tiles(FindsSquares(), scene(200, 200), Tiling(64), ANY)) == 0
