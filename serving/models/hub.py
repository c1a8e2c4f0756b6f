"""The Hugging Face Hub: how sources name what is there, and its refusals in words that help."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_HUB = "hf://"
_CONNECT_SECONDS = 5
_OUT_OF_REACH = (
    *("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"),
    *("OfflineModeIsEnabled", "ConnectionError"),
)


class ModelError(Exception):
    """A model cannot be had or prepared; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hub, or a file of one. ``revision`` None is its main branch."""

    repo_id: str
    file: str | None = None
    revision: str | None = None

    @staticmethod
    def is_one(source: str) -> bool:
        """Whether a source is on the Hub."""
        return source.startswith(_HUB)

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """From ``hf://ORG/REPO``, ``hf://ORG/REPO@REVISION/FILE`` and so on; raises :class:`ModelError`."""
        organisation, _, rest = source.removeprefix(_HUB).partition("/")
        repository, _, file = rest.partition("/")
        repository, _, revision = repository.partition("@")
        if not (organisation and repository):
            raise ModelError(f"{source!r} is not of the form hf://ORG/REPO/FILE.gguf")
        return cls(f"{organisation}/{repository}", file or None, revision or None)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        file = f"/{self.file}" if self.file else ""
        return f"{_HUB}{self.repo_id}{revision}{file}"


def check_reachable(source: str) -> None:
    """Raises :class:`ModelError` at once where nobody answers at the Hub's address.

    Its library would try a search for half a minute.
    """
    address = urlsplit(constants.ENDPOINT)
    if getproxies().get(address.scheme):
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ModelError(
            f"{source}: the Hub cannot be reached at {constants.ENDPOINT} "
            f"({error.strerror or error}); connect to the network"
        ) from error


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turns all that the Hub's library raises into :class:`ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{source}: the repository is gated; accept its terms on its page, "
            "then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        hub = HubSource.parse(source)
        raise ModelError(f"{source}: {hub.repo_id} has no revision {hub.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{source}: there is no repository {HubSource.parse(source).repo_id}, or it is private "
            "(then run 'hf auth login' or set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{source}: the file is not in the local cache and the Hub cannot be reached; "
            "connect to the network, or download the file elsewhere and give its path as the source"
        ) from error
    except EntryNotFoundError as error:
        hub = HubSource.parse(source)
        raise ModelError(f"{source}: {hub.repo_id} holds no file {hub.file}") from error
    except Exception as error:
        # Its HTTP library, and so its errors, differ between versions.
        if type(error).__name__ in _OUT_OF_REACH:
            raise ModelError(
                f"{source}: the Hub cannot be reached ({error}); connect to the network"
            ) from error
        raise ModelError(f"{source}: cannot download it: {error}") from error
