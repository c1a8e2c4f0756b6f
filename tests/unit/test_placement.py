"""Where models go, and who leaves for them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.engines.placement import HOST, Device, Need, Plan, Resident, place

HOST_OF_1000 = Device(HOST, 1000)
CARDS = [HOST_OF_1000, Device("GPU-a", 8000), Device("GPU-b", 16000)]


def on_host(name: str, mib: int, last_used: float = 0.0, **rest: object) -> Resident:
    return Resident(name, {HOST: mib}, last_used=last_used, **rest)  # type: ignore[arg-type]


def on_gpu(name: str, card: str, mib: int, last_used: float = 0.0) -> Resident:
    return Resident(name, {card: mib}, last_used=last_used)


def card_need(mib: int, *cards: str) -> Need:
    return Need("new", host_mib=10, gpu_mib=mib, may_use=cards or ("GPU-a", "GPU-b"))


def test_nobody_leaves_while_there_is_room() -> None:
    plan = place(Need("new", 400), [HOST_OF_1000], [on_host("old", 600)])
    assert plan == Plan({HOST: 400})


def test_the_one_unused_for_longest_leaves() -> None:
    residents = [on_host("fresh", 500, last_used=9), on_host("stale", 500, last_used=1)]
    plan = place(Need("new", 400), [HOST_OF_1000], residents)
    assert plan is not None
    assert plan.leave == ("stale",)


def test_one_of_low_priority_leaves_before_one_unused_for_longer() -> None:
    residents = [
        on_host("dear", 500, last_used=1, priority=1),
        on_host("cheap", 500, last_used=9),
    ]
    plan = place(Need("new", 400), [HOST_OF_1000], residents)
    assert plan is not None
    assert plan.leave == ("cheap",)


def test_nobody_leaves_for_nothing() -> None:
    # The small one is the first to go, but only the big one helps, and it is enough.
    residents = [on_host("small", 100, last_used=1), on_host("big", 900, last_used=2)]
    plan = place(Need("new", 900), [HOST_OF_1000], residents)
    assert plan is not None
    assert plan.leave == ("big",)


def test_who_may_not_leave_stays() -> None:
    busy = on_host("busy", 700, may_leave=False)
    assert place(Need("new", 400), [HOST_OF_1000], [busy]) is None


def test_models_of_a_group_exclude_each_other_though_there_is_room() -> None:
    rival = on_host("rival", 100, group="g")
    plan = place(Need("new", 100, group="g"), [HOST_OF_1000], [rival, on_host("other", 100)])
    assert plan == Plan({HOST: 100}, ("rival",))
    busy = on_host("rival", 100, group="g", may_leave=False)
    assert place(Need("new", 100, group="g"), [HOST_OF_1000], [busy]) is None


def test_the_fullest_card_with_room_is_chosen_so_that_big_ones_find_theirs() -> None:
    small = place(card_need(3000), CARDS, [])
    assert small == Plan({HOST: 10, "GPU-a": 3000})
    big = place(card_need(12000), CARDS, [on_gpu("small", "GPU-a", 3000)])
    assert big == Plan({HOST: 10, "GPU-b": 12000})


def test_a_card_with_room_is_better_than_one_to_be_cleared() -> None:
    plan = place(card_need(8000), CARDS, [on_gpu("old", "GPU-a", 1)])
    assert plan == Plan({HOST: 10, "GPU-b": 8000})


def test_a_model_too_big_for_a_card_is_split() -> None:
    plan = place(card_need(20000), CARDS, [])
    assert plan is not None
    assert plan.gpus == ("GPU-a", "GPU-b")
    assert 20000 <= plan.shares_mib["GPU-a"] + plan.shares_mib["GPU-b"] <= 20001
    assert plan.shares_mib["GPU-b"] > plan.shares_mib["GPU-a"]


def test_one_for_so_many_cards_has_an_equal_share_of_each() -> None:
    pair = Need("new", host_mib=10, gpu_mib=6000, may_use=("GPU-a", "GPU-b"), gpu_count=2)
    plan = place(pair, CARDS, [])
    assert plan == Plan({HOST: 10, "GPU-a": 3000, "GPU-b": 3000})
    # On one card there is no room for it, and the other has too little for half.
    single = Need("new", host_mib=10, gpu_mib=17000, may_use=("GPU-a", "GPU-b"), gpu_count=1)
    assert place(single, CARDS, []) is None
    assert place(Need("new", 10, 17000, ("GPU-a", "GPU-b"), gpu_count=2), CARDS, []) is None


def test_only_the_cards_that_were_named_are_used() -> None:
    assert place(card_need(12000, "GPU-a"), CARDS, []) is None
    assert place(card_need(100, "GPU-b"), CARDS, []) == Plan({HOST: 10, "GPU-b": 100})
    assert place(card_need(100, "GPU-gone"), [HOST_OF_1000], []) == Plan({HOST: 110})


_names = st.sampled_from([HOST, "GPU-a", "GPU-b"])
_residents = st.lists(
    st.builds(
        Resident,
        id=st.uuids().map(str),
        shares_mib=st.dictionaries(_names, st.integers(1, 9000), min_size=1, max_size=2),
        may_leave=st.booleans(),
        group=st.sampled_from([None, "g"]),
        priority=st.integers(-1, 1),
        last_used=st.floats(0, 100),
    ),
    max_size=6,
)
_needs = st.builds(
    Need,
    id=st.just("new"),
    host_mib=st.integers(0, 1200),
    gpu_mib=st.integers(0, 26000),
    may_use=st.sampled_from([(), ("GPU-a",), ("GPU-a", "GPU-b")]),
    group=st.sampled_from([None, "g"]),
)


@given(_needs, _residents)
def test_whatever_is_asked(need: Need, residents: list[Resident]) -> None:
    plan = place(need, CARDS, residents)
    if plan is None:
        # Those who may leave are never the reason: without them there is no place either.
        assert place(need, CARDS, [each for each in residents if not each.may_leave]) is None
        return
    gone = [each for each in residents if each.id in plan.leave]
    stay = [each for each in residents if each.id not in plan.leave]
    assert all(each.may_leave for each in gone)
    assert sum(plan.shares_mib.values()) >= need.host_mib + need.gpu_mib
    if need.group:
        assert not [each for each in stay if each.group == need.group]
    for device in CARDS:
        share = plan.shares_mib.get(device.id, 0)
        used = sum(each.shares_mib.get(device.id, 0) for each in stay)
        assert not share or share + used <= device.budget_mib
    # Everybody who leaves is needed to, or excluded.
    for each in gone:
        left = [*stay, each]
        assert (need.group and each.group == need.group) or any(
            plan.shares_mib.get(device.id, 0)
            + sum(other.shares_mib.get(device.id, 0) for other in left)
            > device.budget_mib
            for device in CARDS
            if plan.shares_mib.get(device.id, 0)
        )
