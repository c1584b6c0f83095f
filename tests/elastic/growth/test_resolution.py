"""Sides of images against what is said of them; resizing against torchvision's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F_images

from elastic.errors import OptionError
from elastic.growth.resolution import Resolution, resize

PARTS = st.floats(0.01, 1.0)


@given(start=PARTS, until=PARTS, multiple=st.integers(1, 16), full=st.integers(1, 300))
def test_sides_grow_from_their_start_to_full_size_in_multiples(
    start: float, until: float, multiple: int, full: int
) -> None:
    resolution = Resolution(start, until, multiple)
    sides = [resolution.compute_sides([full], step / 50)[0] for step in range(51)]
    assert sides == sorted(sides)
    assert min(full, start * full) <= sides[0] + 1e-6 and sides[0] < start * full + multiple
    assert all(side == full or side % multiple == 0 for side in sides)
    assert all(side == full for step, side in enumerate(sides) if step / 50 >= until)


def test_half_way_an_image_has_the_sides_between() -> None:
    resolution = Resolution(start=0.5, until=0.8, multiple=1)
    assert resolution.compute_sides([32, 64], 0.4) == [24, 48]


def test_a_side_is_not_rounded_up_for_the_sake_of_a_last_digit() -> None:
    assert Resolution(0.55, 0.5, 1).compute_sides([100], 0.0) == [55]  # 0.55 × 100 = 55.00000000000001


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.1}, {"until": 2.0}, {"multiple": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        Resolution(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sides", [(5, 7), (12, 9), (17, 20)])
def test_images_are_resized_as_torchvision_does(sides: tuple[int, int]) -> None:
    x_BCHW = torch.randn(2, 3, 12, 14)
    expected = F_images.resize(x_BCHW, list(sides), antialias=True)
    torch.testing.assert_close(resize(x_BCHW, sides), expected)


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    x_BCHW = torch.randn(2, 3, 12, 14)
    assert resize(x_BCHW, (12, 14)) is x_BCHW
