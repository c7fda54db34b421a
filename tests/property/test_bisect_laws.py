"""The search over any pattern of broken and whole steps, mended ones too."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.search.bisect import bisect


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_what_is_found_is_broken_and_its_predecessor_is_not(broken: list[bool]) -> None:
    """On every pattern: a broken step that was checked, behind the beginning or a whole step that was checked."""
    found = bisect(len(broken), broken.__getitem__)
    assert all(broken[step] is verdict for step, verdict in found.checked.items())
    assert len(found.checked) <= math.ceil(math.log2(len(broken))) + 1
    assert (found.first is None) is (not broken[-1])
    if found.first is not None:
        assert found.checked[found.first] is True
        assert found.first == 0 or found.checked[found.first - 1] is False
        earlier = {step for step in range(found.first) if broken[step]}
        assert earlier <= set(found.unseen)
