"""Data read in parts by several accumulators, which are pickled and merged."""

import pickle
from itertools import pairwise

from hypothesis import strategies as st


@st.composite
def partings(draw, count):
    """Batches (slices) of ``count`` samples in any order, shared out to up to five readers."""
    cuts = sorted(draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=12)))
    edges = [0, *(cut for cut in cuts if cut < count), count]
    batches = [slice(a, b) for a, b in pairwise(edges)]
    readers = [[] for _ in range(draw(st.integers(1, 5)))]
    for batch in draw(st.permutations(batches)):
        readers[draw(st.integers(0, len(readers) - 1))].append(batch)
    return readers, draw(st.booleans())


def read_in_parts(make, feed, parting):
    """One accumulator for all, each reader's own having come from another process as it were.

    Args:
        make: Makes an empty accumulator.
        feed: Called with an accumulator and a slice of the samples.
        parting: As `partings` draws it: merged one after another or as a tree.
    """
    readers, as_tree = parting
    accumulators = []
    for batches in readers:
        accumulator = make()
        for batch in batches:
            feed(accumulator, batch)
        accumulators.append(pickle.loads(pickle.dumps(accumulator)))
    while len(accumulators) > 1:
        target, part, *others = accumulators
        untouched = repr(part.result())
        target.merge(part)
        assert repr(part.result()) == untouched
        accumulators = [*others, target] if as_tree else [target, *others]
    return accumulators[0]


def rank_bounds(quantiles, rank):
    """Between which true ranks the value given for ``rank`` lies, merged or not.

    The sketch's own statement: less and plus three standard deviations, so that 99.7% of all
    answers are within; both are ``rank`` where the sketch still has every value.
    """
    sketch = quantiles.sketch
    if sketch.is_empty():
        return rank, rank
    return sketch.get_rank_lower_bound(rank, 3), sketch.get_rank_upper_bound(rank, 3)
