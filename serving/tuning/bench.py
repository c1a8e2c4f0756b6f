"""Measures one way to serve a model: the whole server is started with it, loaded, and ended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.client import Client, ServerError
from loadtest.waves import Observed, Waves, run_waves
from serving.config import Config, ModelConfig
from serving.cost.model import CostModel
from serving.engines import guard
from serving.engines.launch import free_port
from serving.hardware.busy import Others
from serving.tuning.goal import Failed, Measured, Result

_POLL_SECONDS = 0.1
_LAST_LINES = 3
_MOST_REASON_CHARACTERS = 300
# A measurement beside other programs that take more than so much of the processors is repeated; after so many that
# were no better, no more: the machine is always busy.
MOST_OF_OTHERS, _MOST_VAIN_REPEATS = 0.1, 2


@dataclass(frozen=True, slots=True)
class Work:
    """What the users ask for."""

    users: int
    prompt_tokens: int
    output_tokens: int


class _NotStarted(Exception):
    """The server ended, or was not ready in time; the message is what it said last."""


class Bench:
    """Measures models with the cost, memory and cache of a config; nothing of it stays but requantized files."""

    def __init__(self, config: Config, work: Work, again: Callable[[], None]) -> None:
        """``again`` is told before something is measured once more."""
        self._config, self._work, self._again = config, work, again
        self._repeats_left = _MOST_VAIN_REPEATS

    def measure(self, model: ModelConfig, rounds: int) -> tuple[Result, float]:
        """What users saw, each of whom asked so many times, and how many seconds that took in all.

        When other programs took much of the processors meanwhile it is measured again, unless that was in vain before.
        """
        began = time.monotonic()
        result = self._once(model, rounds)
        while _is_disturbed(result) and self._repeats_left:
            self._again()
            result = self._once(model, rounds)
            self._repeats_left -= _is_disturbed(result)
        return result, time.monotonic() - began

    def _once(self, model: ModelConfig, rounds: int) -> Result:
        try:
            with (
                tempfile.TemporaryDirectory(prefix="rigserve-tune-") as folder,
                self._serving(model, Path(folder)) as (url, pid),
            ):
                work, others = self._work, Others(pid)
                waves = Waves(work.users, rounds, work.prompt_tokens, work.output_tokens)
                observed = run_waves(url, model.name, waves, self._config.cost)
                share = others.share()
            return self._measured(observed, share)
        except (_NotStarted, ServerError) as error:
            return Failed(str(error)[:_MOST_REASON_CHARACTERS])

    def _measured(self, observed: Observed, others_share: float | None) -> Result:
        summary, traffic = observed.summary, observed.traffic
        if summary.totals.errors:
            return Failed(
                f"{summary.totals.errors} of {summary.totals.requests} requests failed: {summary.first_error}"
            )
        ttft, tpot = summary.ttft_seconds, summary.tpot_seconds
        latency, rate = summary.normalized_seconds, summary.completion_tokens_per_second
        if traffic is None or ttft is None or tpot is None or latency is None or not rate:
            return Failed("its answers have no tokens, or it does not say how many")
        cost = CostModel(self._config.cost).parts(traffic.busy_seconds, traffic.energy_joules)
        return Measured(
            tokens_per_second=rate,
            ttft_p50_seconds=ttft.p50,
            ttft_p95_seconds=ttft.p95,
            tpot_p50_seconds=tpot.p50,
            tpot_p95_seconds=tpot.p95,
            latency_p95_seconds=latency.p95,
            usd_per_million=1e6 * cost.total_usd / traffic.completion_tokens,
            energy_source=traffic.energy_source,
            requests=summary.totals.requests,
            others_share=others_share,
        )

    @contextmanager
    def _serving(self, model: ModelConfig, folder: Path) -> Iterator[tuple[str, int]]:
        """A server with this model alone: its base URL once it takes requests, its process. Raises :class:`_NotStarted`."""
        port = free_port()
        file = folder / "rig.json"  # JSON is YAML, too
        file.write_text(json.dumps(self._document(model, port, folder)), encoding="utf-8")
        log = folder / "log"
        command = (sys.executable, "-m", "serving", "serve", str(file))
        with log.open("wb") as out:
            # The guard ends it when this process is gone, however it went.
            process = subprocess.Popen(
                (sys.executable, "-I", "-S", guard.__file__, *command),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait(process, f"http://127.0.0.1:{port}/v1", model.start_timeout_seconds, log)
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _document(self, model: ModelConfig, port: int, folder: Path) -> dict[str, Any]:
        config, data_dir = self._config, folder / "data"
        installed = Path(config.storage.data_dir) / "engines"
        if model.engine == "vllm" and installed.is_dir():
            # Its environments are found below the data folder.
            data_dir.mkdir()
            (data_dir / "engines").symlink_to(installed.absolute())
        return {
            "server": {"port": port, "drain_timeout_seconds": 0, "watch_config": False},
            "models": [model.model_dump(mode="json", exclude_unset=True)],
            "storage": {"cache_dir": config.storage.cache_dir, "data_dir": str(data_dir)},
            "memory": config.memory.model_dump(mode="json", exclude_unset=True),
            "cost": config.cost.model_dump(mode="json", exclude_unset=True),
        }


def _is_disturbed(result: Result) -> bool:
    return isinstance(result, Measured) and (result.others_share or 0.0) > MOST_OF_OTHERS


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float, log: Path) -> None:
    """Return when the server is ready."""
    client = Client(url, None)
    # It has its own limit for its engine; this one is for all of it.
    deadline = time.monotonic() + seconds + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.get("/ready", below_base=False)
        except ServerError:
            time.sleep(_POLL_SECONDS)
        else:
            client.close()
            return
    ended = "the server ended" if process.poll() is not None else "the server was not ready in time"
    raise _NotStarted(f"{ended}: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = [line for line in lines if "error" in line.casefold()] or lines
    return "; ".join(line.strip() for line in told[-_LAST_LINES:])
