"""Memory that jax takes over: aligned, apart, and freed with the last array that uses it."""

from __future__ import annotations

import gc
import mmap
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax.adapters.jax_arrays import own
from graftax.execute import memory

SIZES = [0, 1, 63, 64, 65, 4096, 100_000, (1 << 20) + 3, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, (5 << 20) + 17]


def address(array: np.ndarray[Any, Any]) -> int:
    return array.__array_interface__["data"][0]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(SIZES), max_size=12))
def test_arrays_are_aligned_apart_and_each_its_own(sizes: list[int]) -> None:
    made = memory.allocate_all(sizes)
    assert [array.nbytes for array in made] == sizes
    for number, array in enumerate(made):
        assert address(array) % memory.ALIGNMENT == 0 or not array.nbytes
        array[...] = number
        assert own(array, adopt=True) is array  # which asks whether the memory is its own
    for number, array in enumerate(made):
        assert (array == number).all()


@pytest.mark.parametrize("nbytes", SIZES)
def test_one_array(nbytes: int) -> None:
    array = memory.allocate(nbytes)
    array[...] = 7
    assert array.nbytes == nbytes
    assert address(array) % memory.ALIGNMENT == 0 or not nbytes


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The maps that are made, to be seen going."""
    maps: list[weakref.ref[Any]] = []

    class Watched(mmap.mmap):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().__new__(cls, *args, **kwargs)
            maps.append(weakref.ref(made))
            return made

    monkeypatch.setattr(memory.mmap, "mmap", Watched)
    return maps


def test_memory_is_freed_with_the_last_array_in_it(maps: list[weakref.ref[Any]]) -> None:
    large, *small = memory.allocate_all([3 << 20, *[1 << 20] * 4, *[1 << 20] * 4])
    assert len(maps) == 3  # one of its own, two groups
    del large
    gc.collect()
    assert [there() is not None for there in maps] == [False, True, True]
    view = small[3][5:9]
    del small[:4]
    gc.collect()
    assert [there() is not None for there in maps] == [False, True, True], "a view holds its group"
    del view
    gc.collect()
    assert [there() is not None for there in maps] == [False, False, True]
    del small
    gc.collect()
    assert not any(there() for there in maps)


def test_what_jax_took_over_is_freed_with_the_jax_array(maps: list[weakref.ref[Any]]) -> None:
    import jax

    from graftax.adapters.jax_arrays import to_jax

    host = memory.allocate(4 << 20).view(np.float32)
    host[...] = 3
    place = address(host)
    made = to_jax(host, adopt=True)
    jax.block_until_ready(made)
    assert made.unsafe_buffer_pointer() == place, "taken over, not copied"
    assert not host.flags.writeable
    del host
    gc.collect()
    assert maps[0]() is not None
    assert (np.asarray(made) == 3).all()
    del made
    gc.collect()
    assert maps[0]() is None
