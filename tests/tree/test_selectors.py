"""Globs with braces and classes, and the index that ends a selector, against NumPy."""

from __future__ import annotations

import fnmatch
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graftax.errors import PlanError, UsageError
from graftax.tree import match_paths
from graftax.tree.leaf_index import LeafIndex, cover, overlap, split_index
from graftax.tree.selectors import expand_braces, glob_pattern

PATHS = [
    *(f"params/layer_{i}/{name}/kernel" for i in range(3) for name in ("query", "key")),
    "params/head/kernel",
    "params/head/{x}",
    "params/head/{a,b}",
    "batch_stats/norm/mean",
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("params/layer_{0,1}/**", 4),
        ("layer_{0,2}/key/kernel", 2),
        ("**/{query,head}/kernel", 4),
        ("{params/layer_0/**,batch_stats/**}", 3),
        ("params/{layer_{0,1}/key,head}/kernel", 3),
        ("params/layer_0{,/*}/{query,key}/kernel", 2),
        ("params/head/{x}", 1),
        ("params/head/{[xy]}", 1),
        ("params/head/{a,b}", 1),
        ("params/head/[{]*", 2),
        ("params/head/{x,y}", 0),
    ],
)
def test_braces(pattern: str, count: int) -> None:
    assert len(match_paths(PATHS, pattern, "flax")) == count


def test_an_exact_path_with_braces_wins() -> None:
    assert match_paths([*PATHS, "params/head/a"], "params/head/{a,b}", "flax") == ["params/head/{a,b}"]


@st.composite
def braced(draw: st.DrawFn, depth: int = 2) -> tuple[str, list[str]]:
    """(a pattern, what it stands for)."""
    text, meant = "", [""]
    for _ in range(draw(st.integers(1, 2))):
        if depth == 0 or draw(st.booleans()):
            piece = draw(
                st.sampled_from(["a", "b/c", "*", "?", "[ab]", "}", "x,y", ""] if depth == 2 else ["a", "*", ""])
            )
            text, meant = text + piece, [head + piece for head in meant]
        else:
            inner = [draw(braced(depth - 1)) for _ in range(2)]
            text += "{" + ",".join(written for written, _ in inner) + "}"
            meant = [head + each for head in meant for _, every in inner for each in every]
    return text, meant


@settings(max_examples=50, deadline=None)
@given(braced())
def test_braces_stand_for_every_alternative(pattern: tuple[str, list[str]]) -> None:
    text, meant = pattern
    assume(len(meant) < 200)
    assert expand_braces(text) == meant


@pytest.mark.parametrize("pattern", ["{a,b", "a/{b,{c}", "{a,b}" * 12, "{" * 500 + "}" * 500, "{a,[}]"])
def test_a_brace_that_is_not_closed_or_too_much_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"not closed|too many"):
        match_paths(PATHS, pattern, "flax")


@pytest.mark.parametrize(
    "pattern", ["a[0-2]", "a[!0-2]", "a[2-0]", "a[!2-0]", "a[-x]", "a[x-]", "a[^x]", "a[]x]", "a[a-cx-z]"]
)
def test_a_class_is_that_of_fnmatch_inside_one_part(pattern: str) -> None:
    for name in ("a", *(f"a{char}" for char in "0129abcxyz-^!]")):
        assert bool(glob_pattern(pattern, "/").fullmatch(name)) == fnmatch.fnmatchcase(name, pattern)
    assert not glob_pattern("a[!x]b", "/").fullmatch("a/b")
    assert not glob_pattern("a[+-9]b", "/").fullmatch("a/b")


# ---------------------------------------------------------------- an index


NUMBERS = st.integers(-5, 5)
ITEMS = st.one_of(
    NUMBERS, st.just(...), st.builds(slice, *[st.none() | NUMBERS] * 2, st.none() | NUMBERS.filter(lambda n: n != 0))
)


def written(item: Any) -> str:
    if not isinstance(item, slice):
        return "..." if item is ... else str(item)
    pieces = ["" if n is None else str(n) for n in (item.start, item.stop, item.step)]
    return ":".join(pieces if item.step is not None else pieces[:2])


INDICES = st.lists(ITEMS, min_size=1, max_size=4).filter(lambda items: items.count(...) < 2).map(tuple)


@settings(max_examples=150, deadline=None)
@given(INDICES, st.lists(st.integers(0, 4), max_size=4).map(tuple))
def test_an_index_is_that_of_numpy(key: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    found = split_index(f"a/kernel[{', '.join(map(written, key))}]")
    assert found is not None
    base, index = found
    assert (base, index.key) == ("a/kernel", key)
    assert split_index(f"x{index.text}") == ("x", index)
    array = np.arange(int(np.prod(shape))).reshape(shape)
    try:
        part = array[key]
    except IndexError:
        part = np.empty(0)
    if part.size == 0:
        with pytest.raises(PlanError, match=r"axis|axes"):
            index.ranges(shape)
        return
    assert index.part_shape(shape) == part.shape
    reached = array[np.ix_(*index.ranges(shape))]
    np.testing.assert_array_equal(reached.reshape(part.shape), part)


@settings(max_examples=50, deadline=None)
@given(INDICES, INDICES)
def test_parts_overlap_where_they_share_an_element(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    array = np.arange(4 * 5 * 3 * 4).reshape(4, 5, 3, 4)
    found: list[Any] = []
    for key in (first, second):
        _, index = split_index(f"x[{', '.join(map(written, key))}]") or ("", LeafIndex(()))
        try:
            found.append((index.ranges(array.shape), set(np.asarray(array[key]).reshape(-1).tolist())))
        except PlanError:
            return
    (a, elements), (b, others) = found
    assert overlap(a, b) == bool(elements & others)
    assert cover(a, b) == (others <= elements)


@pytest.mark.parametrize(
    "text", ["a", "a[]", "a[,]", "[2]", "a[0-3]", "a[!0]", "a[1.5]", "a[None]", "a[x]", "a[::0]", "a[2]b"]
)
def test_what_is_no_index(text: str) -> None:
    assert split_index(text) is None
