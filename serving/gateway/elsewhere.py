"""Counts what other servers on the same ledger use: one that hands over to this one, or one that shares its keys."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from serving.cost.ledger import LedgerError, read_usage_of_others
from serving.gateway.limits import Limits
from serving.gateway.spending import Spending

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_COMPLAINT_SECONDS = 60.0


class UsageElsewhere:
    """Brings limits and budgets up to date with a ledger; what this process writes there they know."""

    def __init__(
        self, ledger: Path, uid_prefix: str, after_row: int, limits: Limits, spending: Spending
    ) -> None:
        """``uid_prefix`` is that of this process's rows. What was written until ``after_row`` is counted already."""
        self._ledger = ledger
        self._uid_prefix = uid_prefix
        self._after_row = after_row
        self._limits = limits
        self._spending = spending

    async def follow(self) -> None:
        """Count what others write, within about two seconds, until cancelled."""
        last_complaint = float("-inf")
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.look()
            except LedgerError as error:
                # It is counted when the ledger can be read again.
                if time.monotonic() - last_complaint > _COMPLAINT_SECONDS:
                    last_complaint = time.monotonic()
                    _log.error("what other servers use is not counted: %s", error)

    async def look(self) -> None:
        """Count what others have written by now; raises :class:`LedgerError`."""
        self._after_row, used = await asyncio.to_thread(
            read_usage_of_others, self._ledger, self._after_row, self._uid_prefix
        )
        for each in used:
            if each.of_key.key_id != "-":
                self._limits.add(each.of_key)
            if each.api_usd:
                self._spending.add(each.model, each.of_key.started_at, each.api_usd)
