"""Restarts without a refused connection: the listening socket belongs to who started the server.

That is systemd (socket activation), or anybody who does the same: the socket is file descriptor 3, and the
environment has ``LISTEN_FDS=1`` and ``LISTEN_PID``. While no server runs, connections wait in the socket; two
servers may share it, so that a new one takes over before the old one goes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIRST_DESCRIPTOR = 3


class HandoverError(Exception):
    """The sockets that were handed over are not one to listen on."""


def inherited_listener(environment: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """The listening socket that was handed to this process; None if there is none.

    Its variables are taken out of the environment: engines are not meant. Raises :class:`HandoverError`.
    """
    count, pid = environment.pop("LISTEN_FDS", None), environment.pop("LISTEN_PID", None)
    environment.pop("LISTEN_FDNAMES", None)
    if count is None or pid != str(os.getpid()):
        return None
    if count != "1":
        raise HandoverError(f"one socket can be listened on; LISTEN_FDS says {count}")
    try:
        listener = socket.socket(fileno=_FIRST_DESCRIPTOR)
        is_listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not is_listening or listener.family not in (socket.AF_INET, socket.AF_INET6):
            raise HandoverError("the socket that was handed over does not listen for TCP")
    except OSError as error:
        raise HandoverError(
            f"file descriptor {_FIRST_DESCRIPTOR} is no socket: {error.strerror}"
        ) from error
    listener.set_inheritable(False)
    return listener


class LastAnswers:
    """Once ``closing`` is set, every answer ends its connection: the client's next goes to the new server."""

    def __init__(self, app: ASGIApp) -> None:
        self.closing = False
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def send_and_close(message: Message) -> None:
            if self.closing and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_and_close)
