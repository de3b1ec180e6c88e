"""The judge sees what is drawn, in spite of blur and noise, and is not fooled by what is not."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minimagen_fast.judge import Verdict, judge, score
from minimagen_fast.shapes import all_combinations, draw


def _drawn(size, seed=0):
    rng = np.random.default_rng(seed)
    return [draw(*names, size, rng) for names in all_combinations()]


@pytest.mark.parametrize("size", [16, 32])
def test_drawn_pictures_are_all_right(size):
    scores = score(_drawn(size), all_combinations())
    assert (scores.color, scores.shape, scores.background, scores.pictures) == (1.0, 1.0, 1.0, 48)


def test_blur_and_some_noise_are_forgiven():
    rng = np.random.default_rng(1)
    for image, (color, shape, background) in zip(_drawn(32)[::5], all_combinations()[::5], strict=True):
        soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=float)
        noisy = Image.fromarray(np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8))
        assert judge(noisy) == Verdict(color, shape, background)


def test_wrong_captions_are_wrong():
    wanted = all_combinations()
    others = wanted[-1:] + wanted[:-1]  # the background is another in every pair, colour and shape in some
    scores = score(_drawn(32), others)
    assert scores.background == 0.0
    assert scores.shape == pytest.approx(np.mean([a[1] == b[1] for a, b in zip(wanted, others, strict=True)]))
    assert scores.color == pytest.approx(np.mean([a[0] == b[0] for a, b in zip(wanted, others, strict=True)]))


def test_an_empty_picture_shows_nothing():
    assert judge(Image.new("RGB", (32, 32), (20, 20, 20))) == Verdict(None, None, "black")


def test_noise_shows_no_shape_and_no_color():
    rng = np.random.default_rng(2)
    for _ in range(4):
        verdict = judge(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
        assert verdict.shape is None and verdict.color is None


def test_unknown_colors_and_backgrounds():
    image = Image.new("RGB", (32, 32), (250, 120, 120))
    image.paste((20, 250, 250), (8, 8, 24, 24))
    verdict = judge(image)
    assert verdict == Verdict(None, "square", None)


@pytest.mark.parametrize("size", [(32, 16), (4, 4)])
def test_pictures_that_cannot_be_judged(size):
    with pytest.raises(ValueError, match="image must be square and at least 8x8 pixels"):
        judge(Image.new("RGB", size))


def test_scores_need_pictures():
    with pytest.raises(ValueError, match="at least 1; got 0 and 0"):
        score([], [])
