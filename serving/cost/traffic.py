"""The traffic that is priced: sums over requests, and who measured them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where prices change: at a day's beginning (days since 1970), a second of each day (UTC), beyond a prompt's length.

    Requests on the same side of all cuts, of one service tier, have one price a token. So sums of their
    tokens are priced exactly as they themselves would be, one by one.
    """

    days: tuple[int, ...] = ()
    seconds: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Requests on the same side of all cuts: since ``begin_unix`` and after, with prompts longer than ``longer_than`` tokens.

    ``prompt_tokens`` include ``cached_tokens``. ``service_tier``: ``default``, ``flex`` or ``batch``.
    """

    begin_unix: float
    longer_than: int
    service_tier: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """A measured mix of requests; their tokens are in ``groups`` of one price each.

    ``prompt_tokens`` include ``cached_tokens``, which were found in the KV cache and not computed. The busy
    seconds are the rig's time spent on prompts and on generated tokens. Of the energy, ``idle_joules``
    would have been drawn without work, too. Sources: ``engine``, ``nvml``, ``rapl``, ``shelly``,
    ``tasmota``, ``prometheus``, ``estimated``, or ``mixed``. From the first request's arrival to the last
    one's it was ``elapsed_seconds``.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_busy_seconds: float
    decode_busy_seconds: float
    energy_joules: float
    idle_joules: float
    energy_source: str
    timing_source: str
    elapsed_seconds: float = 0.0
    tokens_source: str = "engine"
    groups: tuple[TokenGroup, ...] = ()

    @property
    def busy_seconds(self) -> float:
        """The rig's time in all."""
        return self.prefill_busy_seconds + self.decode_busy_seconds

    @property
    def measured_idle_watts(self) -> float | None:
        """The idle draw that the meter saw, in the mean; None if none did."""
        if self.energy_source in ("estimated", "mixed") or not self.busy_seconds:
            return None
        return self.idle_joules / self.busy_seconds

    @property
    def tokens(self) -> int:
        """Of prompts and of completions."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def estimated(self) -> bool:
        """Whether any of it rests on an estimate."""
        sources = {self.energy_source, self.timing_source, self.tokens_source}
        return bool({"estimated", "mixed"} & sources)


def of_request(
    at_unix: float,
    service_tier: str,
    prompt_tokens: int,
    cached_tokens: int,
    completion_tokens: int,
) -> TokenGroup:
    """A group of one request."""
    counts = (prompt_tokens, cached_tokens, completion_tokens)
    return TokenGroup(at_unix, prompt_tokens - 1, service_tier, 1, *counts)


def merged(groups: Iterable[TokenGroup], cuts: Cuts) -> tuple[TokenGroup, ...]:
    """As few groups as the cuts keep apart; those given lie on one side of each cut."""
    sums: dict[tuple[int, int, int, str], list[TokenGroup]] = {}
    for each in groups:
        day, second = divmod(int(each.begin_unix), SECONDS_PER_DAY)
        key = (
            sum(day >= cut for cut in cuts.days),
            sum(second >= cut for cut in cuts.seconds),
            max((cut for cut in cuts.prompt_tokens if each.longer_than >= cut), default=0),
            each.service_tier,
        )
        sums.setdefault(key, []).append(each)
    return tuple(
        TokenGroup(
            begin_unix=min(each.begin_unix for each in same),
            longer_than=longer_than,
            service_tier=tier,
            requests=sum(each.requests for each in same),
            prompt_tokens=sum(each.prompt_tokens for each in same),
            cached_tokens=sum(each.cached_tokens for each in same),
            completion_tokens=sum(each.completion_tokens for each in same),
        )
        for (_, _, longer_than, tier), same in sorted(sums.items())
    )
