"""The servers under comparison, all before one fake engine: rigserve's own, on its own port.

One process and one worker each, pinned to the first core; clients and engine share the second.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.benchmarks.gateway.load import Target
from loadtest.benchmarks.processes import free_port, running

RIGSERVE, NGINX, LITELLM, DIRECT = "rigserve", "nginx", "LiteLLM", "direct"
LITELLM_VERSION = "1.106.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rigserve"
# As many as models may have, and of them as many as 1,000 streams need.
_SEQUENCES = 256
MODELS = tuple(f"fake-{number}" for number in range(4))
_UNLIMITED = "1000000000"
_PIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execvp(sys.argv[2], sys.argv[2:])"

_NGINX_CONFIG = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  upstream engine {{ server 127.0.0.1:{engine_port}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_buffering off;
      proxy_http_version 1.1; proxy_set_header Connection "";
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where relays run, and where all else does; None where the machine has one core only, or cannot pin."""

    relay: int | None
    rest: int | None

    @staticmethod
    def of_this_machine() -> Cores:
        """The first two that may be used."""
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return Cores(usable[0], usable[1]) if len(usable) > 1 else Cores(None, None)

    def pinned(self, command: list[str]) -> list[str]:
        """The command, on the core of the relays."""
        pin = [] if self.relay is None else [sys.executable, "-c", _PIN, str(self.relay)]
        return [*pin, *command]

    def pin_me(self) -> None:
        """Move this process, the clients, to the other core."""
        if self.rest is not None:
            os.sched_setaffinity(0, {self.rest})


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; ``process_id`` 0 is of one that does not matter."""

    target: Target
    process_id: int

    @property
    def name(self) -> str:
        """As in the tables."""
        return self.target.name

    @property
    def resident_mib(self) -> float:
        """Memory of the process, without its engines."""
        status = Path(f"/proc/{self.process_id}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024


@contextmanager
def rigserve(cores: Cores) -> Iterator[tuple[Server, int]]:
    """rigserve with keys, limits, metering and metrics; also gives its engine's port."""
    port, engine_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "rig.json"  # JSON is YAML, too
        config.write_text(json.dumps(_config(folder, port, engine_port)))
        command = [sys.executable, "-m", "tools.fake_rig"]
        environment = {} if cores.rest is None else {"RIGSERVE_FAKE_ENGINE_CORE": str(cores.rest)}
        url = f"http://127.0.0.1:{port}"
        key = _make_key(command, config)
        serve = cores.pinned([*command, "serve", str(config)])
        with running(serve, f"{url}/ready", environment) as process_id:
            yield Server(Target(RIGSERVE, url, MODELS[0], key), process_id), engine_port


@contextmanager
def nginx(cores: Cores, engine_port: int) -> Iterator[Server]:
    """nginx as a plain relay that buffers nothing."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise RuntimeError("nginx is not on PATH; install it, for example: apt install nginx-light")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(_NGINX_CONFIG.format(folder=folder, port=port, engine_port=engine_port))
        url = f"http://127.0.0.1:{port}"
        command = cores.pinned([program, "-c", str(config), "-p", folder])
        with running(command, f"{url}/health") as process_id:
            yield Server(Target(NGINX, url, MODELS[0]), process_id)


@contextmanager
def litellm(cores: Cores, engine_port: int) -> Iterator[Server]:
    """LiteLLM's proxy with one worker, without a database; installed at the first call, and kept."""
    program = _installed_litellm()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "litellm.yaml"
        params = {"model": f"openai/{MODELS[0]}", "api_key": "none",
                  "api_base": f"http://127.0.0.1:{engine_port}/v1"}  # fmt: skip
        config.write_text(
            json.dumps({"model_list": [{"model_name": MODELS[0], "litellm_params": params}]})
        )
        url = f"http://127.0.0.1:{port}"
        words = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port),
                 "--num_workers", "1", "--telemetry", "False"]  # fmt: skip
        key = f"sk-{secrets.token_hex(32)}"
        environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR",
                       "LITELLM_MASTER_KEY": key}  # fmt: skip
        command = cores.pinned([str(program), *words])
        with running(command, f"{url}/health/liveliness", environment) as process_id:
            yield Server(Target(LITELLM, url, MODELS[0], key), process_id)


def direct(engine_port: int) -> Server:
    """The engine itself: what the clients can take at most."""
    return Server(Target(DIRECT, f"http://127.0.0.1:{engine_port}", MODELS[0]), 0)


def _config(folder: str, port: int, engine_port: int) -> dict[str, Any]:
    models: list[dict[str, Any]] = [
        {"name": name, "source": "package://none/none.gguf", "max_sequences": _SEQUENCES}
        for name in MODELS
    ]
    models[0]["port"] = engine_port
    return {
        "server": {"port": port},
        "models": models,
        "storage": {"cache_dir": folder, "data_dir": f"{folder}/data"},
        "cost": {"compare_to": ["openai/gpt-4o-mini"]},
    }


def _make_key(command: list[str], config: Path) -> str:
    """An API key with every limit there is, all too high to matter."""
    limits = ("requests-per-minute", "tokens-per-minute", "max-concurrent", "budget-tokens",
              "budget-usd")  # fmt: skip
    words = [word for limit in limits for word in (f"--{limit}", _UNLIMITED)]
    made = subprocess.run(
        [*command, "keys", "create", "bench", "--config", str(config), "--json", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise RuntimeError(f"no key could be made: {made.stderr}")
    key: str = json.loads(made.stdout)["secret"]
    return key


def _installed_litellm() -> Path:
    folder = CACHE / "peers" / f"litellm-{LITELLM_VERSION}"
    program = folder / "bin" / "litellm"
    done = folder / "installed"
    if not done.exists():
        print(f"installing litellm[proxy]=={LITELLM_VERSION}, once", file=sys.stderr, flush=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet",
             f"litellm[proxy]=={LITELLM_VERSION}"],
        ):  # fmt: skip
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise RuntimeError(f"LiteLLM could not be installed: {ended.stderr[-2000:]}")
        done.touch()
    return program
