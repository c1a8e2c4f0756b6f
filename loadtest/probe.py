"""First requests: is there a server, what is its model called, how does it count?"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from loadtest.client import Client, Reply, ServerError
from loadtest.records import RequestRecord
from loadtest.scenario import Traffic
from loadtest.station import Setup, Station
from loadtest.texts import Gauge, excerpt
from loadtest.workload import Request, gauge_key, path_of

_FEW_WORDS, _MANY_WORDS = 10, 60
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Findings:
    """What the first requests have shown. ``records`` are theirs."""

    model: str
    gauges: dict[str, Gauge]
    ignore_eos: bool
    notes: tuple[str, ...]
    records: tuple[RequestRecord, ...]


class Probe:
    """Asks a server, once for each kind of traffic; raises :class:`ServerError` where it cannot be used."""

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key: str | None,
        traffic: Sequence[Traffic],
        epoch: float,
    ) -> None:
        self._client = Client(url, api_key)
        self._model = model or next(iter(self._client.models()), "")
        if not self._model:
            raise ServerError("the server lists no models; name one with --model")
        self._traffic = {gauge_key(one): one for one in traffic}
        self._url, self._epoch = url, epoch
        self._ignore_eos = any(one.ignore_eos for one in traffic)
        self._notes: list[str] = []
        # Negative numbers are no one else's.
        setup = Setup(url, self._model, (), {}, False, 0, epoch, 1)
        self._station = Station(setup, 0, api_key, lambda _: None)
        self._records: list[RequestRecord] = []

    def findings(self) -> Findings:
        """Warm the server up and learn."""
        gauges = {key: self._gauge(one) for key, one in self._traffic.items()}
        self._client.close()
        if not _is_loopback(self._url):
            self._notes.append(
                "The server runs on another machine: the cost figures must be those of that machine."
            )
        return Findings(
            self._model, gauges, self._ignore_eos, tuple(self._notes), tuple(self._records)
        )

    def _gauge(self, traffic: Traffic) -> Gauge:
        gauge = Gauge.of(traffic.text)
        gauge.measure(self._client, self._model)
        few = self._warm_up(traffic, _FEW_WORDS)
        if few.error in ("http_400", "http_422") and self._ignore_eos:
            # Perhaps because of ignore_eos, which is no part of OpenAI's API. The next answer will tell.
            self._ignore_eos = False
            self._notes.append(
                "The server does not take ignore_eos: answers may be shorter than wanted."
            )
            few = self._warm_up(traffic, _FEW_WORDS)
        many = self._warm_up(traffic, _MANY_WORDS)
        for record in (few, many):
            if record.error:
                raise ServerError(
                    f"a first request failed ({record.error}): {record.error_message}"
                )
        if few.prompt_tokens is None or many.prompt_tokens is None:
            self._note_once("The server sends no usage: tokens are unknown, and nothing is priced.")
        else:
            gauge.calibrate((_FEW_WORDS, few.prompt_tokens), (_MANY_WORDS, many.prompt_tokens))
        if not gauge.counted:
            self._note_once(
                "The server has no /tokenize: prompt lengths are estimates, corrected by its usage."
            )
        return gauge

    def _note_once(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _warm_up(self, traffic: Traffic, words: int) -> RequestRecord:
        text = f"{len(self._records)}: {excerpt(traffic.text, 0, words).rstrip()}"
        body = {"model": self._model, "max_tokens": _WARM_UP_TOKENS, **traffic.fields}
        if traffic.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if self._ignore_eos:
            body["ignore_eos"] = True
        request = Request(path_of(traffic), body, 1, 0, words)
        record: RequestRecord
        reply: Reply
        record, reply = self._station.send(self._client, traffic, request, user=-1, warmup=True)
        del reply
        record.number = -1 - len(self._records)
        self._records.append(record)
        return record


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
