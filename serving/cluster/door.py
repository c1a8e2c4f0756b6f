"""The way to an engine on another machine: a tunnel from the gateway's loopback to the node's, in TLS.

The door is open on the node's address to who has its secret, which Ray has handed over together with its certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import ssl
import tempfile
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_SECRET_BYTES = 32
_CHUNK_BYTES = 2**16
_HANDSHAKE_SECONDS = 10.0
# It is made anew for each replica.
_VALID = datetime.timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Door:
    """Where a replica's door is, and the certificate (PEM) by which it is known."""

    host: str
    port: int
    certificate: str


def new_secret() -> bytes:
    """What opens a door."""
    return secrets.token_bytes(_SECRET_BYTES)


async def open_door(host: str, secret: bytes, engine_port: int) -> tuple[asyncio.Server, Door]:
    """Lead who shows the ``secret`` from a free port of ``host`` to the engine at a loopback port."""
    certificate, context = _certificate()

    async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                shown = await reader.readexactly(_SECRET_BYTES)
            if secrets.compare_digest(shown, secret):
                await _join(reader, writer, await asyncio.open_connection("127.0.0.1", engine_port))
        writer.close()

    server = await asyncio.start_server(
        enter, host, 0, ssl=context, ssl_handshake_timeout=_HANDSHAKE_SECONDS
    )
    return server, Door(host, server.sockets[0].getsockname()[1], certificate)


async def open_tunnel(port: int, door: Door, secret: bytes) -> asyncio.Server:
    """Lead from a loopback port to a door."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # It is known by its certificate, whatever its address.
    context.check_hostname = False
    context.load_verify_locations(cadata=door.certificate)

    async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                far = await asyncio.open_connection(door.host, door.port, ssl=context)
            far[1].write(secret)
            await _join(reader, writer, far)
        writer.close()

    return await asyncio.start_server(enter, "127.0.0.1", port)


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    other: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Pass on bytes both ways until either side ends."""
    ways = [
        asyncio.create_task(_pass_on(reader, other[1])),
        asyncio.create_task(_pass_on(other[0], writer)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        # What was written is sent before.
        other[1].close()
        writer.close()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()


def _certificate() -> tuple[str, ssl.SSLContext]:
    """A certificate that signs itself, and what serves with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rigserve replica")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of machines differ.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(
            pem
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.flush()
        context.load_cert_chain(file.name)
    return pem.decode(), context
