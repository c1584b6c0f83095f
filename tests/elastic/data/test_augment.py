"""Augmentation against slow oracles that treat one sample at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from elastic.data.augment import AlternatingFlip, Cutout, RandomAffine, RandomCrop, RandomFlip, apply_affine


def images(samples=16, channels=3, height=8, width=8, seed=0):
    """Random x_BCHW in (0, 1]: no pixel is black."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(samples, channels, height, width, generator=generator)


ALL = [RandomCrop(2), RandomFlip(), RandomAffine(10, 1, 0.1, 5), Cutout(3)]


@pytest.mark.parametrize("change", ALL, ids=lambda change: type(change).__name__)
def test_same_seed_same_batch_other_seed_other_batch(change):
    x, before = images(), images()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(change(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(x, before), "the batch itself was changed"


@pytest.mark.parametrize("change", ALL, ids=lambda change: type(change).__name__)
def test_samples_have_draws_of_their_own(change):
    torch.manual_seed(0)
    result = change(images(samples=1).expand(64, -1, -1, -1))
    assert result.shape == (64, 3, 8, 8)
    assert result.dtype == torch.float32
    assert len({sample.numpy().tobytes() for sample in result}) > 1


@pytest.mark.parametrize("change", ALL, ids=lambda change: type(change).__name__)
@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (3, 2, 9, 5)])
def test_shape_stays(change, shape):
    assert change(torch.rand(shape)).shape == shape


def test_crop_without_padding_is_the_identity():
    assert torch.equal(RandomCrop(0)(images()), images())


@given(padding=st.integers(1, 4), height=st.integers(3, 7), width=st.integers(3, 7), seed=st.integers(0, 99))
def test_each_crop_is_a_window_of_its_own_padded_image(padding, height, width, seed):
    x = images(5, 2, height, width, seed)
    torch.manual_seed(seed)
    result = RandomCrop(padding)(x)
    steps = range(2 * padding + 1)
    for sample, crop in zip(F.pad(x, (padding,) * 4), result, strict=True):
        windows = [sample[:, top : top + height, left : left + width] for top in steps for left in steps]
        assert any(torch.equal(crop, window) for window in windows)


def test_crop_reaches_every_window_equally_often():
    torch.manual_seed(0)
    x = torch.zeros(9000, 1, 3, 3)
    x[:, :, 1, 1] = 1  # the bright pixel ends up wherever the window puts it
    counts = RandomCrop(1)(x).sum(dim=(0, 1))
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 5 * 30  # standard deviation √(9000 · 1/9 · 8/9) ≈ 30


def test_alternating_flips_show_both_sides_in_turn():
    """About half of the images begin with each; which, they say themselves, in any batch and order."""
    x, flip = images(samples=400, height=4, width=4), AlternatingFlip()
    sides = []
    for flip.epoch in range(4):
        sides.append(flip(x))
        order = torch.randperm(400)
        assert torch.equal(flip(x[order]), sides[-1][order])
        assert torch.equal(flip(x[:1]), sides[-1][:1])
    assert torch.equal(sides[0], sides[2]) and torch.equal(sides[1], sides[3])
    assert torch.equal(sides[0], sides[1].flip(3))
    kept = (sides[0] == x).flatten(1).all(1)
    assert abs(kept.float().mean() - 0.5) < 4 * 0.025  # its standard deviation is 0.5 / √400
    assert torch.equal(kept, ~(sides[0] == x.flip(3)).flatten(1).all(1))


def test_each_flip_is_the_image_or_its_mirror():
    torch.manual_seed(0)
    x = images(samples=200)
    result = RandomFlip()(x)
    kept = [torch.equal(a, b) for a, b in zip(result, x, strict=True)]
    mirrored = [torch.equal(a, b) for a, b in zip(result, x.flip(3), strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert 60 < sum(kept) < 140


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (5, 12)])
def test_affine_with_zero_ranges_is_the_identity(size):
    x = images(4, 3, *size)
    torch.testing.assert_close(RandomAffine()(x), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 1), (-2, 3)])
def test_affine_by_whole_pixels_is_a_shift(right, down):
    x = images(2, 3, 7, 10)
    same, one = torch.zeros(2), torch.ones(2)
    result = apply_affine(x, same, torch.tensor([[float(right)] * 2, [float(down)] * 2]), one, same)
    padded = F.pad(x, (3, 3, 3, 3))
    expected = padded[:, :, 3 - down : 10 - down, 3 - right : 13 - right]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_affine_is_torchvisions_sample_by_sample():
    x = images(12, 2, 14, 20)
    draw = torch.Generator().manual_seed(3)
    angle, shear = torch.rand(2, 12, generator=draw) * 60 - 30
    shift = torch.randint(-3, 4, (2, 12), generator=draw).float()
    scale = torch.rand(12, generator=draw) * 0.6 + 0.7
    result = apply_affine(x, angle, shift, scale, shear)

    def oracle(image, i):
        lean, shift_px = [shear[i].item(), 0.0], shift[:, i].tolist()
        bilinear = InterpolationMode.BILINEAR
        return V.affine(image, angle[i].item(), shift_px, scale[i].item(), lean, interpolation=bilinear)

    for i, sample in enumerate(x):
        # torchvision treats the rim, where image and black mix, in a way of its own; inside, both are alike.
        covered = oracle(torch.ones_like(sample), i)
        inside = covered > 0.9999
        assert inside.float().mean() > 0.3
        torch.testing.assert_close(result[i][inside], oracle(sample, i)[inside], atol=1e-4, rtol=0)
        assert (result[i][covered == 0] == 0).all()


def test_random_affine_stays_within_its_ranges():
    """A bright spot away from the centre shows how far turning, scaling and shifting took it."""
    torch.manual_seed(0)
    x = torch.zeros(500, 1, 41, 41)
    x[:, :, 20, 30] = 1  # 10 pixels right of the centre
    result = RandomAffine(degrees=20, translate_px=2, scale=0.1)(x)[:, 0]
    mass = result.sum(dim=(1, 2))
    rows = (result.sum(2) * torch.arange(41)).sum(1) / mass - 20
    columns = (result.sum(1) * torch.arange(41)).sum(1) / mass - 20
    # ±3.4 from turning 10 · sin 20°, ±1.1 from scaling with it, ±2 from shifting, ±0.5 from interpolation
    assert rows.abs().max() < 6.3
    assert rows.max() > 3 and rows.min() < -3
    assert columns.max() < 13.5 and columns.min() > 6


def test_cutout_blacks_out_one_square_that_may_stick_out():
    torch.manual_seed(0)
    x = images(samples=300, height=9, width=7)
    result = Cutout(4)(x)
    black = (result == 0).all(dim=1)
    assert torch.equal(result, x * ~black[:, None])
    for sample in black:
        rows, columns = sample.any(1), sample.any(0)
        assert torch.equal(sample, rows[:, None] & columns[None, :]), "not a rectangle"
        for side in (rows, columns):
            (inside,) = side.nonzero(as_tuple=True)
            assert 1 <= len(inside) <= 4
            assert inside[-1] - inside[0] + 1 == len(inside), "a gap"
    assert black.sum(dim=(1, 2)).max() == 16
    assert black.any(0).all(), "some pixel is never covered"


@pytest.mark.gpu
@pytest.mark.parametrize("change", ALL, ids=lambda change: type(change).__name__)
def test_runs_on_the_device_of_the_batch(change):
    x = images().cuda()
    torch.manual_seed(0)
    result = change(x)
    torch.manual_seed(0)
    assert result.device == x.device
    assert torch.equal(result, change(x))
