"""Shapes of one tensor are paired run by run, wherever the products of their sizes agree."""

from itertools import pairwise
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from elastic.widths.operations.reshaping import pair_runs


@given(factors=st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=5), data=st.data())
def test_runs_follow_each_other_and_hold_as_many_entries(factors: list[int], data: st.DataObject) -> None:
    before, after = (_join(factors, data) for _ in range(2))
    runs = pair_runs(before, after)
    for side, sizes in (("before", before), ("after", after)):
        ranges = [getattr(run, side) for run in runs]
        assert ranges[0].start == 0 and ranges[-1].stop == len(sizes)
        assert all(one.stop == other.start for one, other in pairwise(ranges))
    for run in runs:
        assert prod(before[i] for i in run.before) == prod(after[i] for i in run.after)
    # The shortest ones: nowhere within a run do the products agree, but for sizes of 1.
    for run in runs:
        products = [
            {prod(sizes[i] for i in part[: n + 1]) for n in range(len(part) - 1)} - {1}
            for sizes, part in ((before, run.before), (after, run.after))
        ]
        whole = prod(before[i] for i in run.before)
        assert not (products[0] & products[1]) - {whole}


def _join(factors: list[int], data: st.DataObject) -> list[int]:
    """Multiply neighbours at random, and put sizes of 1 anywhere."""
    sizes = [1] * data.draw(st.integers(0, 1))
    for factor in factors:
        if sizes and data.draw(st.booleans()):
            sizes[-1] *= factor
        else:
            sizes.append(factor)
        sizes += [1] * data.draw(st.sampled_from([0, 0, 1]))
    return sizes
