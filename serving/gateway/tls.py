"""The certificate of an HTTPS server, which may be renewed while it runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from serving.metrics import Metrics

_log = logging.getLogger(__name__)

_WATCH_INTERVAL_SECONDS = 1.0

_Stamp = tuple[tuple[int, int, int], ...]


class TlsError(Exception):
    """A certificate cannot be used; the message names the file, and says what to do."""


class Certificate:
    """A certificate and its key, in files that others renew; ``context`` is what connections are made with."""

    def __init__(self, certificate: Path, key: Path, metrics: Metrics) -> None:
        """Raises :class:`TlsError` if they cannot be used."""
        self._certificate = certificate
        self._key = key
        self._metrics = metrics
        self.context = _context()
        self._seen = self._stamp()
        self.load()

    def load(self) -> None:
        """Use the files as they are for connections from now on.

        Raises :class:`TlsError` if they cannot be used; then the certificate in use stays.
        """
        _load(_context(), self._certificate, self._key)
        expires_unix = _expiry_unix(self._certificate)
        _load(self.context, self._certificate, self._key)
        self._metrics.certificate_expiry.labels(self._certificate.name).set(expires_unix)

    async def watch(self) -> None:
        """Take up the files when they change, until cancelled."""
        before = self._seen
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_SECONDS)
            stamp = self._stamp()
            # Files that are still being written are read when they have come to rest.
            if stamp == before and stamp != self._seen:
                self._seen = stamp
                self.reload()
            before = stamp

    def reload(self) -> None:
        """As :meth:`load`; what is wrong is logged."""
        try:
            self.load()
            _log.info("the certificate %s was taken up", self._certificate)
        except TlsError as error:
            _log.error("the certificate in use stays: %s", error)

    def _stamp(self) -> _Stamp | None:
        try:
            stats = [path.stat() for path in (self._certificate, self._key)]
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    for path, setting in ((certificate, "tls_certificate"), (key, "tls_key")):
        try:
            path.read_bytes()
        except OSError as error:
            raise TlsError(f"server.{setting}: cannot read {path}: {error.strerror}") from error

    def no_password() -> str:
        raise TlsError(f"server.tls_key: {key} is encrypted; rigserve needs one without a password")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(
                f"server.tls_key: {key} is not the key of {certificate} (server.tls_certificate)"
            ) from error
        raise TlsError(
            f"server.tls_certificate, server.tls_key: {certificate} and {key} are not a certificate "
            f"and a key in PEM form: {error.reason or error}"
        ) from error


def _expiry_unix(certificate: Path) -> float:
    """Until when the first certificate of a file is valid; raises :class:`TlsError`."""
    try:
        # Private, but all that the standard library has to decode a server's own certificate.
        decoded = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"server.tls_certificate: {certificate} is no certificate in PEM form, or cannot be read"
        ) from error
    return float(ssl.cert_time_to_seconds(decoded["notAfter"]))
