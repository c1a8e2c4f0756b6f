"""`rigserve serve`: puts the parts together, runs them, and takes them apart in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp
import uvloop

from serving.adapter_admin import AdapterAdmin, usable
from serving.adapters.added import with_added
from serving.adapters.store import AdapterStore
from serving.config import (
    Config,
    PowerConfig,
    ServerConfig,
    StorageConfig,
    TracingConfig,
    with_replicas,
)
from serving.cost.ledger import (
    Ledger,
    last_row,
    read_requests_of_keys,
    read_spending,
    read_usage_of_keys,
)
from serving.cost.model import CostModel
from serving.cost.price_data import price_data
from serving.cost.prices import PriceBook
from serving.database import DatabaseError
from serving.engines.remote import Remote, watch
from serving.engines.supervisor import EngineStartError, Supervisor
from serving.gateway.access import Access, is_loopback
from serving.gateway.admission import Admission
from serving.gateway.app import create_app
from serving.gateway.background import BackgroundResponses
from serving.gateway.balancing import Balancer
from serving.gateway.batch_runner import BatchRunner
from serving.gateway.batch_store import BatchStore
from serving.gateway.body_room import BodyRoom
from serving.gateway.cors import let_sites_in
from serving.gateway.dispatch import Dispatcher
from serving.gateway.elsewhere import UsageElsewhere
from serving.gateway.file_store import FileStore
from serving.gateway.http_server import HttpServer
from serving.gateway.intake import Gateway
from serving.gateway.limits import WINDOW_SECONDS, Limits, period_start
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.gateway.response_store import ResponseStore
from serving.gateway.routes import admin_adapters, admin_models, admin_reload
from serving.gateway.routing import Router
from serving.gateway.scaling import Scaler
from serving.gateway.spending import Spending, prices_of
from serving.gateway.swapping import Swapper
from serving.gateway.tls import Certificate, TlsError
from serving.gateway.tracing import Tracing, TracingError
from serving.handover import HandoverError, LastAnswers, inherited_listener
from serving.hardware.energy import EnergyMeter
from serving.hardware.telemetry import Telemetry
from serving.hardware.wall import MeterError
from serving.keys.ring import KeyRing
from serving.keys.store import KeyStore
from serving.metrics import Metrics
from serving.models.sources import ModelError
from serving.reload import Reloader
from serving.site import Site, ThisMachine

_log = logging.getLogger(__name__)

_Store = TypeVar("_Store")

# How long clients of a shared socket may go on to use connections that they have.
_LAST_REQUESTS_SECONDS = 1.0
# After the drain: how long requests may take to notice that their engines are gone.
_LAST_WORDS_SECONDS = 6.0


class ServeError(Exception):
    """The server could not start or go on; the message is for the operator."""


def ledger_path(config: Config) -> Path:
    """Where a config's usage ledger is."""
    return _data_dir(config) / "ledger.sqlite"


def log_folder(config: Config) -> Path:
    """Where a config's log files are."""
    return _data_dir(config) / "logs"


def serve(config: Config, file: Path, site: Site | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; take up ``file``, where the config came from, when it changes.

    Engines are at ``site``, or on this machine.

    Raises :class:`ServeError`, ``ConfigError``, ``LedgerError``, ``ModelError``, ``PriceDataError``, ``UnknownModel``.
    """
    site = site or ThisMachine()
    config = site.filled(config)
    prices = price_book(config)
    spending = Spending(prices_of(config.remote_models, price_data(_data_dir(config))))
    with (
        closing(_store(KeyRing, _data_dir(config))) as ring,
        closing(_store(KeyStore, _data_dir(config))) as keys,
        closing(_listener(config.server, ring)) as listener,
        closing(Ledger(ledger_path(config))) as ledger,
        closing(_store(ResponseStore, _data_dir(config) / "responses.sqlite")) as responses,
        closing(_store(FileStore, _data_dir(config))) as files,
        closing(_store(BatchStore, _data_dir(config))) as batches,
        closing(_store(AdapterStore, _data_dir(config))) as adapters,
        closing(_meter(site, config.cost.power)) as power,
        closing(_telemetry(config.storage)) as telemetry,
        _tracing(config.tracing) as tracing,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        metrics = Metrics()
        metrics.ledger_waiting.set_function(lambda: ledger.waiting)
        metrics.watch_machine(telemetry)
        certificate = _certificate(config.server, metrics)
        meter = Meter(
            *(ledger, metrics, CostModel(config.cost), prices, power, tracing),
            is_one_rig=site.is_one_rig,
        )
        path = ledger_path(config)
        known_row = last_row(path)
        for period in ("day", "month"):
            since = period_start(period, time.time())
            spending.restore(period, read_spending(path, since, known_row))
        limits = _limits_of(path, known_row)
        elsewhere = UsageElsewhere(path, ledger.uid_prefix, known_row, limits, spending)
        access = Access(
            *(ring, limits, metrics),
            require_keys=config.server.require_keys,
            metrics_access=config.server.metrics_access,
            sites=config.server.cors_origins,
        )
        runner.run(
            _serve(
                *(site, config, file, listener, meter, metrics, access, keys),
                *(responses, files, batches, certificate, tracing, spending, adapters, elsewhere),
            )
        )


def price_book(config: Config) -> PriceBook:
    """What the models to compare with charge; raises ``UnknownModel``, ``PriceDataError``."""
    data = price_data(_data_dir(config))
    return PriceBook(config.cost.compare_to, overrides=config.cost.prices, data=data)


def _meter(site: Site, power: PowerConfig) -> EnergyMeter:
    try:
        return site.meter(power)
    except MeterError as error:
        raise ServeError(f"cost.power.meter: {error}") from error


def _telemetry(storage: StorageConfig) -> Telemetry:
    return Telemetry({"data": Path(storage.data_dir), "cache": Path(storage.cache_dir)})


def _certificate(server: ServerConfig, metrics: Metrics) -> Certificate | None:
    if server.tls_certificate is None or server.tls_key is None:
        return None
    try:
        return Certificate(Path(server.tls_certificate), Path(server.tls_key), metrics)
    except TlsError as error:
        raise ServeError(str(error)) from error


@contextlib.contextmanager
def _tracing(config: TracingConfig) -> Iterator[Tracing | None]:
    if not config.enabled:
        yield None
        return
    try:
        tracing = Tracing(config)
    except TracingError as error:
        raise ServeError(str(error)) from error
    with closing(tracing):
        yield tracing


def _data_dir(config: Config) -> Path:
    return Path(config.storage.data_dir)


def _store(kind: Callable[[Path], _Store], path: Path) -> _Store:
    try:
        return kind(path)
    except DatabaseError as error:
        raise ServeError(str(error)) from error


def _host_for(server: ServerConfig, ring: KeyRing) -> str:
    """The address to listen on; raises :class:`ServeError` if that would let strangers in by mistake."""
    if is_loopback(server.host) or ring.in_use or server.require_keys:
        return server.host
    if not server.allow_remote:
        raise ServeError(
            f"server.host {server.host!r} is not loopback, and there are no API keys: make one with "
            "`rigserve keys create NAME`, or set server.allow_remote: true to let everybody in"
        )
    _log.warning(
        "there are no API keys: whoever reaches %s:%d may use the models (server.allow_remote)",
        *(server.host, server.port),
    )
    return server.host


@dataclass(frozen=True, slots=True)
class _Listener:
    """Where connections come in; ``is_shared`` if the socket stays open when this process closes it."""

    socket: socket.socket
    is_shared: bool

    def close(self) -> None:
        self.socket.close()

    def __str__(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"{f'[{host}]' if ':' in host else host}:{port}/v1"


def _listener(server: ServerConfig, ring: KeyRing) -> _Listener:
    try:
        inherited = inherited_listener()
    except HandoverError as error:
        raise ServeError(str(error)) from error
    if inherited is None:
        return _Listener(_listen(_host_for(server, ring), server.port), is_shared=False)
    host, port = inherited.getsockname()[:2]
    _host_for(server.model_copy(update={"host": host, "port": port}), ring)
    _log.info("the socket was handed over; server.host and server.port do not count")
    return _Listener(inherited, is_shared=True)


def _limits_of(ledger: Path, until_row: int) -> Limits:
    """The limits of keys, less what the ledger says was used of them up to a row."""
    limits, now_unix = Limits(), time.time()
    limits.restore(
        read_usage_of_keys(ledger, period_start("day", now_unix), until_row),
        read_usage_of_keys(ledger, period_start("month", now_unix), until_row),
        read_requests_of_keys(ledger, now_unix - WINDOW_SECONDS, until_row),
    )
    return limits


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}; "
            "stop what uses that port, or change server.port"
        ) from error
    return listener


def open_session() -> aiohttp.ClientSession:
    """The connections to engines and remotes. A remote's cookies are not kept: they would tie its requests together."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def _serve(
    site: Site,
    config: Config,
    file: Path,
    listener: _Listener,
    meter: Meter,
    metrics: Metrics,
    access: Access,
    keys: KeyStore,
    response_store: ResponseStore,
    files: FileStore,
    batches: BatchStore,
    certificate: Certificate | None,
    tracing: Tracing | None,
    spending: Spending,
    adapters: AdapterStore,
    elsewhere: UsageElsewhere,
) -> None:
    of_file, cache_dir = config, Path(config.storage.cache_dir)
    added, unusable = usable(adapters.all(), cache_dir)
    config, left_out = with_added(of_file, added)
    config = with_replicas(config)
    for name, reason in left_out.items():
        _log.error("the adapter '%s' is not served: %s", name, reason)
    launchers = site.launchers(config)
    async with open_session() as session:
        supervisor = Supervisor(config.local_models, launchers, session, config.memory)
        admission = Admission(metrics)
        relay = Relay(session, meter, access.limits, admission, spending)
        dispatcher = Dispatcher(relay, meter, Balancer(admission))
        responses = BackgroundResponses(response_store, dispatcher)
        gateway = Gateway(
            access=access,
            keys=keys,
            router=Router(
                supervisor.engines, [Remote(model) for model in config.remote_models], config.routes
            ),
            relay=relay,
            dispatcher=dispatcher,
            meter=meter,
            metrics=metrics,
            session=session,
            max_body_bytes=config.server.max_body_bytes,
            body_timeout_seconds=config.server.body_timeout_seconds,
            body_room=BodyRoom(
                config.memory.reserve_mib * 2**20 // 2, config.server.body_timeout_seconds
            ),
            lenient=config.server.lenient,
            responses=responses,
            files=files,
            batches=batches,
        )
        batch_runner = BatchRunner(gateway)
        swapper = Swapper(supervisor, admission, lambda: supervisor.memory.max_wait_seconds)
        scaler = Scaler(
            supervisor, admission, lambda: gateway.router.engines, lambda: reloader.config.scaling
        )
        reloader = Reloader(file, of_file, added, supervisor, gateway, admission, site.filled)
        adapter_admin = AdapterAdmin(adapters, unusable, reloader, gateway, admission, cache_dir)
        app = create_app(gateway, tracing)
        app.include_router(admin_models.routes(gateway, supervisor, admission))
        app.include_router(admin_reload.routes(reloader))
        app.include_router(admin_adapters.routes(gateway, adapter_admin))
        let_sites_in(app, config.server.cors_origins)
        signals = asyncio.Queue[int]()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, reloader.ask)
        renewing = asyncio.create_task(certificate.watch()) if certificate else None
        last_answers = LastAnswers(app)
        server = HttpServer(
            last_answers,
            config.server,
            lambda number: loop.call_soon_threadsafe(signals.put_nowait, number),
            certificate.context if certificate else None,
        )
        engines = asyncio.create_task(supervisor.run())
        reloading = asyncio.create_task(reloader.run())
        swapping = asyncio.create_task(swapper.run())
        scaling = asyncio.create_task(scaler.run())
        following = asyncio.create_task(elsewhere.follow())
        watching = asyncio.create_task(watch(lambda: gateway.router.remotes, session))
        stopping = asyncio.create_task(signals.get())
        sockets = [listener.socket]
        if listener.is_shared and not await _preloaded(supervisor, engines, stopping, signals):
            sockets = []
        serving = asyncio.create_task(server.serve(sockets))
        _log.info("listening on %s://%s", "https" if certificate else "http", listener)
        await asyncio.wait((serving, engines, stopping), return_when=asyncio.FIRST_COMPLETED)
        if listener.is_shared and stopping.done():
            _log.info("leaving the socket to others")
            last_answers.closing = True
            for each in server.servers:
                each.close()
            # Clients with open connections have their next requests answered, and these closed.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(engines), _LAST_REQUESTS_SECONDS)
        gateway.draining = True
        batch_runner.stop()
        if stopping.done():
            limit_seconds = reloader.config.server.drain_timeout_seconds
            await _drain(relay, engines, signals, limit_seconds)
        stopping.cancel()
        reloading.cancel()
        if renewing:
            renewing.cancel()
        swapping.cancel()
        scaling.cancel()
        watching.cancel()
        following.cancel()
        engines.cancel()
        ended = (await asyncio.gather(engines, return_exceptions=True))[0]
        await _settle(relay)
        server.should_exit = True
        await serving
        # uvicorn has cut off the clients that would not read; what they used is metered too.
        await _settle(relay)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(responses.settled(), _LAST_WORDS_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(batch_runner.stopped(), _LAST_WORDS_SECONDS)
    if isinstance(ended, BaseExceptionGroup):
        raise _readable(ended) from ended


async def _preloaded(
    supervisor: Supervisor,
    engines: asyncio.Task[None],
    stopping: asyncio.Task[int],
    signals: asyncio.Queue[int],
) -> bool:
    """Wait until all engines that are preloaded are ready; false if the server is to end before.

    Until then the server before goes on, or connections wait: better than being turned away.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    changed = asyncio.Event()
    supervisor.subscribe(lambda _: changed.set())
    while not all(engine.endpoint for engine in supervisor.engines if engine.is_expected):
        changing = asyncio.create_task(changed.wait())
        await asyncio.wait((changing, engines, stopping), return_when=asyncio.FIRST_COMPLETED)
        changing.cancel()
        changed.clear()
        if engines.done() or stopping.done():
            return False
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
    return True


async def _settle(relay: Relay) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(relay.settled(), _LAST_WORDS_SECONDS)


async def _drain(
    relay: Relay, engines: asyncio.Task[None], signals: asyncio.Queue[int], limit_seconds: float
) -> None:
    """Let requests in flight finish, until the limit, a second signal, or the end of the engines."""
    _log.info(
        "draining: %d requests in flight may go on for %g s; signal again to stop now",
        *(relay.open_requests, limit_seconds),
    )
    settled = asyncio.create_task(relay.settled())
    impatient = asyncio.create_task(signals.get())
    await asyncio.wait(
        (settled, impatient, engines),
        timeout=limit_seconds,
        return_when=asyncio.FIRST_COMPLETED,
    )
    settled.cancel()
    impatient.cancel()


def _readable(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first cause in a task group's failure, as a :class:`ServeError` if it is one we know."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return ServeError(str(cause)) if isinstance(cause, EngineStartError | ModelError) else cause
