"""The built-in picture set."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from minimagen_fast.data import MinimagenCollator
from minimagen_fast.shapes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    ShapesDataset,
    all_captions,
    all_combinations,
    caption,
    draw,
    shape_mask,
)


def test_captions():
    assert caption("red", "circle", "black") == "a red circle on black"
    assert len(set(all_captions())) == 48 == len(all_combinations())
    assert set(COLORS) == {"red", "green", "blue", "yellow", "purple", "white"}
    assert SHAPES == ("circle", "square", "triangle", "cross") and set(BACKGROUNDS) == {"black", "gray"}
    with pytest.raises(ValueError, match="'pink', but must be one of red"):
        caption("pink", "circle", "black")


AREAS = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 33, 128])
def test_masks_cover_the_right_area_at_the_right_place(shape, size):
    center, extent = (size * 0.45, size * 0.55), size * 0.6
    mask = shape_mask(shape, size, center, extent)
    assert mask.shape == (size, size) and mask.min() >= 0 and mask.max() <= 1
    assert mask.sum() == pytest.approx(AREAS[shape] * extent**2, rel=0.03)
    columns, rows = np.flatnonzero(mask.max(axis=0) > 0.3), np.flatnonzero(mask.max(axis=1) > 0.05)
    assert columns[0] == pytest.approx(center[0] - extent / 2, abs=1.6)
    assert columns[-1] + 1 == pytest.approx(center[0] + extent / 2, abs=1.6)
    assert rows[0] == pytest.approx(center[1] - extent / 2, abs=1.6)
    assert np.allclose(mask, shape_mask(shape, size, (size - center[0], center[1]), extent)[:, ::-1], atol=1e-3)


@pytest.mark.parametrize("size", [16, 64])
def test_pictures_have_the_right_colours_and_stay_inside(size):
    rng = np.random.default_rng(0)
    for color, shape, background in all_combinations():
        pixels = np.asarray(draw(color, shape, background, size, rng))
        assert pixels.shape == (size, size, 3)
        colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        common = {tuple(int(v) for v in colors[i]) for i in np.argsort(counts)[-2:]}
        assert common == {COLORS[color], BACKGROUNDS[background]}


def test_items_depend_on_seed_and_index_alone():
    first, second = ShapesDataset(1000, side_length=16, seed=4), ShapesDataset(1000, side_length=16, seed=4)
    order = [first[i]["image"] for i in (5, 900, 5)]
    assert torch.equal(order[0], order[2]) and torch.equal(order[1], second[900]["image"])
    assert not torch.equal(ShapesDataset(1000, side_length=16, seed=5)[5]["image"], order[0])
    assert first.raw(-1)[1] == second.raw(999)[1]
    with pytest.raises(IndexError, match="has 1000 items"):
        first[1000]


@pytest.mark.parametrize("side_length", [1, 7, 16])
def test_items_that_are_drawn_together_are_the_same(side_length):
    dataset = ShapesDataset(50, side_length=side_length)
    indices = [3, 49, 3, -1, *range(40)]
    together, alone = dataset.__getitems__(indices), [dataset[index] for index in indices]
    for item, expected in zip(together, alone, strict=True):
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[name], expected[name]) for name in item)
    assert not torch.equal(together[0]["image"], together[5]["image"]) or side_length == 1
    assert dataset.__getitems__([]) == []
    with pytest.raises(IndexError, match="index is 50"):
        dataset.__getitems__([0, 50])


def test_a_loader_gets_the_items_of_a_subclass():
    class Dark(ShapesDataset):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "image": torch.zeros(3, 8, 8)}

    batch = next(iter(DataLoader(Dark(8, side_length=8), batch_size=4, collate_fn=MinimagenCollator("cpu"))))
    assert batch["image"].shape == (4, 3, 8, 8) and not batch["image"].any()


def test_masks_are_float32_whatever_the_numbers_are():
    expected = shape_mask("circle", 16, (8.1, 7.3), 10.7)
    found = shape_mask("circle", 16, tuple(np.array([8.1, 7.3])), np.float64(10.7))
    assert expected.dtype == found.dtype == np.float32 and np.array_equal(expected, found)


def test_it_can_be_trained_on():
    dataset = ShapesDataset(64, side_length=16)
    seen = set()
    for batch in DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=MinimagenCollator("cpu")):
        assert batch["image"].shape == (8, 3, 16, 16) and batch["encoding"].shape[::2] == (8, 64)
        assert batch["image"].min() >= 20 / 255 - 1e-6 and batch["image"].max() <= 240 / 255 + 1e-6
        seen.update(batch["image"].amax(dim=(1, 2, 3)).tolist())
    assert len(seen) > 3


def test_all_kinds_come_up_about_equally():
    dataset = ShapesDataset(2000, side_length=8)
    captions = [dataset.raw(i)[1] for i in range(2000)]
    counts = [captions.count(text) for text in all_captions()]
    assert min(counts) > 20 and max(counts) < 70


@pytest.mark.parametrize("arguments", [dict(length=0), dict(side_length=0), dict(seed=-1), dict(max_length=True)])
def test_numbers_are_checked(arguments):
    with pytest.raises(ValueError, match="must be an integer of at least"):
        ShapesDataset(**{"side_length": 16, **arguments})
