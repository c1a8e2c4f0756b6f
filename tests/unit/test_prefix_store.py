"""The store of prefixes takes no more memory than it may, not even while one comes and another goes."""

from __future__ import annotations

import numpy as np

from serving.llamacpp.prefixes import PrefixStore, Saved

_CELLS_BYTES = 1000


def saved(*tokens: int) -> Saved:
    return Saved(None, list(tokens), np.zeros(_CELLS_BYTES, np.uint8))


def keep(store: PrefixStore, entry: Saved) -> bool:
    """As slots do; whether it was kept."""
    there = store.make_room(entry.tokens, entry.adapter, entry.size_bytes)
    assert store.used_bytes + there * entry.size_bytes <= store.capacity_bytes
    if there:
        store.put(entry)
    return there


def test_room_is_made_before_something_comes() -> None:
    store = PrefixStore(2 * saved(1, 2).size_bytes)
    first, second, third = saved(1, 2), saved(3, 4), saved(5, 6)
    assert keep(store, first)
    assert keep(store, second)
    assert store.longest([1, 2], None) is first  # used just now
    assert keep(store, third)
    assert store.longest([3, 4], None) is None
    assert store.longest([1, 2], None) is first


def test_what_is_too_much_pushes_nothing_out() -> None:
    store = PrefixStore(saved(1, 2).size_bytes)
    assert keep(store, saved(1, 2))
    assert not keep(store, saved(3, 4, 5))
    assert store.longest([1, 2], None) is not None


def test_what_is_about_to_be_restored_stays() -> None:
    store = PrefixStore(2 * saved(1, 2).size_bytes)
    held, other = saved(1, 2), saved(3, 4)
    assert keep(store, held)
    assert keep(store, other)
    store.held = held
    assert keep(store, saved(5, 6))
    assert not keep(store, saved(*range(20)))
    assert store.longest([1, 2], None) is held
    assert store.longest([3, 4], None) is None


def test_a_longer_prefix_takes_the_place_of_what_it_begins_with() -> None:
    store = PrefixStore(10 * _CELLS_BYTES)
    assert keep(store, saved(1, 2))
    assert keep(store, saved(1, 2, 3))
    assert store.used_bytes == saved(1, 2, 3).size_bytes
