"""Which devices a model goes to, and which models must leave for it. Pure: it decides, others act.

A device is a GPU, or the main memory (:data:`HOST`). Memory is in MiB (2**20 bytes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

HOST = "cpu"


@dataclass(frozen=True, slots=True)
class Device:
    """A memory that engines share; ``budget_mib`` is what all of them together may take of it."""

    id: str
    budget_mib: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes: ``gpu_mib`` on one GPU or split over several, ``host_mib`` in main memory.

    ``may_use`` names the GPUs it may go to; without any, all of it is in main memory. With ``gpu_count`` it is
    on exactly so many, in equal shares.
    """

    id: str
    host_mib: int
    gpu_mib: int = 0
    may_use: tuple[str, ...] = ()
    group: str | None = None
    gpu_count: int | None = None


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that is loaded or about to be: ``shares_mib`` by device.

    ``may_leave`` is false while it has requests in flight, and when it is pinned.
    """

    id: str
    shares_mib: Mapping[str, int]
    may_leave: bool = True
    group: str | None = None
    priority: int = 0
    last_used: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model goes, and who leaves before. ``gpus`` is empty for a model in main memory alone."""

    shares_mib: Mapping[str, int]
    leave: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs among its devices."""
        return tuple(device for device in self.shares_mib if device != HOST)


def place(need: Need, devices: Sequence[Device], residents: Sequence[Resident]) -> Plan | None:
    """The best place for a model; None while there is none, because those who would have to leave may not.

    As few models leave as can be, of low priority rather than high, unused for long rather than used just
    now. Among places that cost the same, one GPU is better than several, and the fullest that has the
    room better than others: what is empty stays whole for big models.
    """
    rivals = [each for each in residents if need.group and each.group == need.group]
    if not all(rival.may_leave for rival in rivals):
        return None
    others = [each for each in residents if each not in rivals]
    plans = (
        plan
        for shares_mib in _candidates(need, devices)
        if (plan := _make_room(shares_mib, devices, others)) is not None
    )
    best = min(plans, key=lambda plan: _cost(plan, devices, others), default=None)
    if best is None:
        return None
    return Plan(best.shares_mib, (*(rival.id for rival in rivals), *best.leave))


def can_ever_fit(need: Need, devices: Sequence[Device], pinned: Sequence[Resident] = ()) -> bool:
    """Whether there is a place for a model once all others but the pinned ones have left."""
    return place(need, devices, pinned) is not None


def _candidates(need: Need, devices: Sequence[Device]) -> Iterator[dict[str, int]]:
    """The shares of every set of devices that a model could have: small sets first."""
    host = {HOST: need.host_mib} if need.host_mib else {}
    gpus = [device for device in devices if device.id in need.may_use]
    if not need.gpu_mib or not gpus:
        yield {HOST: need.host_mib + need.gpu_mib}
        return
    if need.gpu_count is not None:
        for chosen in combinations(gpus, need.gpu_count):
            share_mib = -(-need.gpu_mib // need.gpu_count)
            yield host | {device.id: share_mib for device in chosen}
        return
    for count in range(1, len(gpus) + 1):
        for chosen in combinations(gpus, count):
            total_mib = sum(device.budget_mib for device in chosen)
            if total_mib >= need.gpu_mib:
                # As llama.cpp splits a model: in proportion to what each has.
                yield host | {
                    device.id: -(-need.gpu_mib * device.budget_mib // total_mib)
                    for device in chosen
                }


def _make_room(
    shares_mib: Mapping[str, int], devices: Sequence[Device], residents: Sequence[Resident]
) -> Plan | None:
    """The plan that gives a model its shares; None if not even all departures make the room."""
    short_mib = {
        device.id: share - _free_mib(device, residents)
        for device in devices
        if (share := shares_mib.get(device.id, 0))
    }
    if len(short_mib) < len([share for share in shares_mib.values() if share]):
        return None  # a device that is not there
    leave: list[Resident] = []
    for resident in sorted((each for each in residents if each.may_leave), key=_worth):
        if all(missing <= 0 for missing in short_mib.values()):
            break
        if any(short_mib.get(device, 0) > 0 for device in resident.shares_mib):
            leave.append(resident)
            _add(short_mib, resident, -1)
    if any(missing > 0 for missing in short_mib.values()):
        return None
    # A big one that went last may have made the small ones before it go for nothing.
    for resident in sorted(leave, key=_worth, reverse=True):
        _add(short_mib, resident, 1)
        if all(missing <= 0 for missing in short_mib.values()):
            leave.remove(resident)
        else:
            _add(short_mib, resident, -1)
    return Plan(shares_mib, tuple(resident.id for resident in leave))


def _add(short_mib: dict[str, int], resident: Resident, sign: int) -> None:
    for device, share in resident.shares_mib.items():
        if device in short_mib:
            short_mib[device] += sign * share


def _free_mib(device: Device, residents: Iterable[Resident]) -> int:
    return device.budget_mib - sum(each.shares_mib.get(device.id, 0) for each in residents)


def _worth(resident: Resident) -> tuple[int, float]:
    return resident.priority, resident.last_used


def _cost(
    plan: Plan, devices: Sequence[Device], residents: Sequence[Resident]
) -> tuple[object, ...]:
    """How bad a plan is: by the most valued model that leaves, how many leave, the devices, the room left over."""
    leaving = [each for each in residents if each.id in plan.leave]
    dearest = max(map(_worth, leaving), default=(0, 0.0))
    left_over = sum(_free_mib(device, residents) for device in devices if device.id in plan.gpus)
    return bool(leaving), dearest, len(leaving), len(plan.gpus), left_over
