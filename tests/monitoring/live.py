"""A real Prometheus, with the rules that are deployed, on the rigs of a test."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pynvml
import pytest
import requests
import yaml
from prometheus_client import start_http_server

from serving.engines.launch import free_port
from serving.hardware.telemetry import Telemetry
from serving.keys.store import KeyStore
from serving.metrics import Metrics
from serving.protocol.keys import NewKey
from tests.processes import Program, RigServer, wait_for, write_config
from tests.programs import program
from tests.unit.test_telemetry import Cards

MODEL = "smollm2-135m"
# Goes on like this, so that what it has can be guessed from.
_PROMPT = "one, two, three, four, five, " * 4
DEPLOYED = Path(__file__).parents[2] / "docker" / "prometheus"
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


class Prometheus(Program):
    """Scrapes every second, so that a test need not wait; else as deployed. ``key`` opens the rigs' metrics."""

    def __init__(self, folder: Path, targets: list[str], key: str) -> None:
        config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOYED / name) for name in config["rule_files"]]
        del config["alerting"]
        [rigs] = [each for each in config["scrape_configs"] if each["job_name"] == "rigserve"]
        (folder / "key").write_text(key)
        rigs["authorization"]["credentials_file"] = str(folder / "key")
        rigs["static_configs"] = [{"targets": targets}]
        config["scrape_configs"] = [rigs]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        port = free_port()
        super().__init__(
            [
                *(program("prometheus"), f"--config.file={file}", "--log.level=warn"),
                *(
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ),
            ],
            f"http://127.0.0.1:{port}",
            {},
        )

    def wait_until_ready(self) -> None:
        """Wait until it answers queries."""
        wait_for(lambda: self.answers("/-/ready"), "Prometheus is ready")

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The value now of each series, by its labels; fails if Prometheus does not understand it."""
        answer = self._api("query", query=expression)
        if answer["resultType"] == "scalar":
            return {(): float(answer["result"][1])}
        return {
            tuple(sorted(each["metric"].items())): float(each["value"][1])
            for each in answer["result"]
        }

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[tuple[Mapping[str, str], list[tuple[float, float]]]]:
        """The labels and the values over time of each series."""
        answer = self._api("query_range", query=expression, start=start, end=end, step=step)
        return [
            (each["metric"], [(at, float(value)) for at, value in each["values"]])
            for each in answer["result"]
        ]

    def value(self, expression: str) -> float:
        """The value of the only series."""
        [value] = self.query(expression).values()
        return value

    def names(self) -> set[str]:
        """Of all metrics that it has seen."""
        return set(self._api("label/__name__/values"))

    def failing_rules(self) -> list[Any]:
        """Rules that were not evaluated, or could not be."""
        groups = self._api("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) > 50
        return [rule for rule in rules if rule["health"] != "ok"]

    def _api(self, path: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self.base_url}/api/v1/{path}", params=parameters, timeout=30)
        told = answer.json()
        assert told["status"] == "success", (parameters, told)
        return told["data"]


class LoadedRig(RigServer):
    """A rig that needs keys, also for its metrics: ``keys`` has their secrets, by name."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        path = write_config(
            folder, cache_dir, max_sequences=2, max_queue=2, speculation="prompt_lookup"
        )
        config = yaml.safe_load(path.read_text())
        config["server"]["metrics_access"] = "key"
        path.write_text(yaml.safe_dump(config))
        with closing(KeyStore(Path(config["storage"]["data_dir"]))) as store:
            self.keys = {
                key.name: store.create(key)[1]
                for key in (
                    NewKey(name="prometheus"),
                    NewKey(name="alice"),
                    NewKey(name="bob"),
                    NewKey(name="spent", budget_tokens=300),
                )
            }
        super().__init__(path)

    @property
    def target(self) -> str:
        """Where to scrape it: its name as an instance."""
        return self.base_url.removeprefix("http://")

    def ask(self, tenant: str, max_tokens: int = 16, **fields: Any) -> None:
        """A request, whatever becomes of it."""
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": _PROMPT,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        requests.post(
            f"{self.base_url}/v1/completions", json={**body, **fields}, headers=headers, timeout=60
        )

    def put_under_load(self, seconds: float) -> None:
        """More clients than there is room for; some stream, and some are refused."""
        done = threading.Event()

        def client(number: int) -> None:
            while not done.is_set():
                self.ask("bob" if number == 0 else "alice", stream=bool(number % 2))
                self.ask("spent", max_tokens=30)

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, number) for number in range(8)]
            time.sleep(seconds)
            done.set()
            for each in clients:
                each.result()


@contextmanager
def scraped_cards() -> Iterator[str]:
    """A rig's series of two cards, from NVIDIA's library as it would answer; where to scrape them."""
    answering = Cards()
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answering.answers.items():
            patch.setattr(pynvml, name, answer)
        with closing(Telemetry({}, interval_seconds=0.2)) as telemetry:
            metrics, port = Metrics(), free_port()
            metrics.watch_machine(telemetry)
            metrics.reloaded(ok=True, at_unix=time.time())
            server, thread = start_http_server(port, "127.0.0.1", metrics.registry)
            yield f"127.0.0.1:{port}"
            server.shutdown()
            server.server_close()
            thread.join()


def metrics_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names: those of rigserve, and those that rules record."""
    without_labels = re.sub(r"\{[^}]*\}", "", expression)
    return {name for name in _NAME.findall(without_labels) if "rigserve_" in name}


def as_asked(expression: str) -> str:
    """A dashboard's expression with its variables as Grafana fills them in, for all rigs and the last hour."""
    return expression.replace("$instance", ".*").replace("$model", ".*").replace("$__range", "1h")
