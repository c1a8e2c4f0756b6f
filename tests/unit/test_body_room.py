"""Room for requests' bodies: first come, first served, and nobody keeps what they do not need."""

from __future__ import annotations

import asyncio

import pytest

from serving.gateway.body_room import BodyRoom, Room, Share
from serving.protocol.errors import ApiError
from serving.protocol.requests import read_object

_MIB = 2**20


def test_whoever_finds_no_room_waits_for_its_turn() -> None:
    async def scene() -> list[str]:
        room, order = Room(100), list[str]()

        async def take(name: str, size: int) -> None:
            await room.take(size)
            order.append(name)

        await take("first", 60)
        waiting = [asyncio.create_task(take(*each)) for each in (("large", 80), ("small", 10))]
        await asyncio.sleep(0)
        assert order == ["first"]  # the small one would fit, and does not overtake
        room.give_back(60)
        await asyncio.gather(*waiting)
        return order

    assert asyncio.run(scene()) == ["first", "large", "small"]


def test_who_gives_up_makes_way() -> None:
    async def scene() -> None:
        room = Room(100)
        await room.take(60)
        large, small = asyncio.create_task(room.take(80)), asyncio.create_task(room.take(10))
        await asyncio.sleep(0)
        large.cancel()
        assert await small == 10
        # Given room and cancelled before it could know: it goes back.
        room.give_back(10)
        late = asyncio.create_task(room.take(50))
        await asyncio.sleep(0)
        room.give_back(60)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert await room.take(100) == 100

    asyncio.run(scene())


def test_more_than_there_is_goes_alone() -> None:
    async def scene() -> None:
        room = Room(100)
        assert await room.take(1000) == 100
        room.give_back(100)
        assert await room.take(100) == 100

    asyncio.run(scene())


def test_what_is_kept_is_given_back_with_the_answer_and_numbers_count_more_than_text() -> None:
    async def scene() -> None:
        room = BodyRoom(0, wait_seconds=0.05)  # 48 MiB for those that came
        numbers, text = b"1," * (_MIB // 4), b"x" * _MIB
        first, second = Share(), Share()
        await room.keep(numbers, first)
        for _ in range(10):
            await room.keep(text, second)
        with pytest.raises(ApiError) as refused:
            await room.keep(numbers, second)
        assert (refused.value.status, refused.value.code) == (503, "too_many_large_requests")
        first.give_back()
        await room.keep(numbers, second)
        second.give_back()
        await room.keep(b"1," * (4 * _MIB), first)

    asyncio.run(scene())


def test_small_bodies_wait_for_nobody() -> None:
    async def scene() -> None:
        room = BodyRoom(0, wait_seconds=0.05)
        async with room.incoming(16 * _MIB):
            async with room.incoming(1000):
                pass
            with pytest.raises(ApiError):
                async with room.incoming(_MIB):
                    pass

    asyncio.run(scene())


def test_lists_are_counted_before_they_are_made() -> None:
    with pytest.raises(ApiError, match="too many parts"):
        read_object(b'{"messages":[' + b"[]," * 70_000 + b"[]]}")
    # In a text they are letters.
    assert read_object(b'{"prompt":"' + b'[\\"' * 70_000 + b'"}')["prompt"].count("[") == 70_000
