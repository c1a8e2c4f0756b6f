"""What docs/deploy.md says is done word for word in a scratch root, and what comes of it serves.

There are no containers and no systemd here. `docker compose` is the real client as far as it goes without an engine
of containers (it reads and checks the files); what runs in a container runs in the scratch root, by the image's
own entry point and user-visible paths. `systemctl` has systemd check the units, and starts what they say.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from serving.cli import main
from serving.config import load_config
from serving.deployment import systemd
from serving.engines.launch import free_port
from tests.e2e.test_handover import ActivatedServer
from tests.processes import RigServer
from tests.programs import program, run

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deploy.md").read_text()
SECTIONS = dict(re.findall(r"(?ms)^## (.+?)\n(.*?)(?=^## |\Z)", GUIDE))
RIGSERVE = f'#!/bin/sh\nexec {sys.executable} -m serving "$@"\n'
# What somebody else than root is, and what the machine does, is left out; all else is done.
SHIMS = {
    "rigserve": RIGSERVE,
    "useradd": '#!/bin/sh\necho "$@" > $SCRATCH/useradd\n',
    "make": '#!/bin/sh\ntest "$3" = setup\n',
    "sudo": '#!/bin/sh\ntest "$1 $2" = "-u rigserve" && shift 2 && exec "$@"\n',
    "systemctl": '#!/bin/sh\necho "$@" >> $SCRATCH/systemctl\n',
    "docker": """#!/bin/bash
set -e
shift
case " $* " in
    *" run "* | *" exec "*)
        # The words behind the service's name, to the image's entry point.
        while [ "${1#rigserve-}" = "$1" ]; do shift; done
        shift
        [ "$1" != rigserve ] || shift
        set -- "${@//\\/etc\\/rigserve/$SCRATCH/etc/rigserve}"
        exec rigserve "${@//\\/var\\/lib\\/rigserve/$SCRATCH/var/lib/rigserve}" ;;
    *" up "*)
        "$COMPOSE" $(echo "$@" | sed 's/ up .*//') config > $SCRATCH/config.yaml ;;
esac
""",
}


def commands(section: str) -> str:
    """The shell blocks of a section."""
    return "\n".join(re.findall(r"(?ms)^```sh\n(.*?)^```", SECTIONS[section]))


class Scratch:
    """A root folder of its own, with programs that stand in for those that change the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in SHIMS.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def here(self, text: str) -> str:
        """Paths of the machine as paths below the scratch root."""
        return re.sub(r"(?<=[\s=])/(etc|opt|tmp|var)/", rf"{self.folder}/\1/", text)

    def do(self, script: str, folder: Path) -> str:
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "SCRATCH": str(self.folder),
            "COMPOSE": program("docker-compose"),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path)


def small(config: Path, cache_dir: Path, folder: Path, port: int) -> None:
    """The config as it was written, on a free port, with storage in the scratch root, small for a test."""
    settings = yaml.safe_load(os.path.expandvars(config.read_text()))
    settings["server"]["port"] = port
    settings["server"]["host"] = "127.0.0.1"
    settings["storage"] = {
        "cache_dir": str(cache_dir),
        "data_dir": str(folder / "var/lib/rigserve"),
    }
    settings["models"][0] |= {"context_length": 512, "threads": 1, "max_sequences": 2}
    config.write_text(yaml.safe_dump(settings))


def secret_in(output: str) -> str:
    """The key that was made last: a line of its own."""
    return str(re.findall(r"(?m)^(\S{40,})$", output)[-1])


def completes(base_url: str, secret: str) -> int:
    answer = requests.post(
        f"{base_url}/v1/completions",
        json={"model": "smollm2-135m", "prompt": "The sea", "max_tokens": 4},
        headers={"authorization": f"Bearer {secret}"},
        timeout=60,
    )
    return answer.status_code


def test_with_containers(scratch: Scratch, cache_dir: Path) -> None:
    shutil.copytree(
        ROOT / "docker", scratch.folder / "docker", ignore=lambda *_: ["secrets", ".env"]
    )
    for name in ("LICENSE", "README.md"):
        (scratch.folder / name).touch()
    # The image has the config at /etc/rigserve.
    etc = scratch.folder / "etc/rigserve"
    etc.mkdir(parents=True)
    config = etc / "rig.yaml"
    text = (ROOT / "docker" / "rig.yaml").read_text()
    config.write_text(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text))
    port = free_port()
    small(config, cache_dir, scratch.folder, port)
    output = scratch.do(commands("With containers"), scratch.folder)
    again = scratch.do("docker/start.sh cpu", scratch.folder)
    assert "secret" not in again
    # A folder that is new, and a volume that is not.
    (scratch.folder / "docker/secrets/metrics_key").unlink()
    scratch.do("docker/start.sh cpu", scratch.folder)

    composed = yaml.safe_load((scratch.folder / "config.yaml").read_text())
    services = composed["services"]
    assert services.keys() == {"rigserve-cpu", "prometheus", "alertmanager", "grafana"}
    assert services["rigserve-cpu"]["environment"]["RIGSERVE_MODEL"] == "smollm2-135m"
    for name, secret in composed["secrets"].items():
        # The Hub's token is the operator's to give.
        assert (Path(secret["file"]).stat().st_size > 20) == (name != "hf_token")
    prometheus_key = (scratch.folder / "docker/secrets/metrics_key").read_text()
    with RigServer(config) as server:
        server.wait_until_ready()
        assert completes(server.base_url, secret_in(output)) == 200
        assert completes(server.base_url, "wrong") == 401
        assert server.get("/metrics").status_code == 401
        headers = {"authorization": f"Bearer {prometheus_key}"}
        assert server.get("/metrics", headers=headers).status_code == 200


def test_with_systemd(scratch: Scratch, cache_dir: Path) -> None:
    folder = scratch.folder
    programs = folder / "opt/rigserve/.venv/bin"
    programs.mkdir(parents=True)
    (programs / "rigserve").write_text(RIGSERVE)
    (programs / "rigserve").chmod(0o755)
    (folder / "tmp").mkdir()
    block = scratch.here(commands("With systemd"))
    init, keys = (next(i for i, line in enumerate(block.splitlines()) if word in line)
                  for word in (" init ", " keys "))  # fmt: skip
    lines = block.splitlines()
    scratch.do("\n".join(lines[: init + 1]), folder)
    written = (folder / "tmp/rigserve-init/rigserve.service").read_text()
    # As the guide has it, the program is the one of /opt/rigserve; here it is the tests'.
    assert re.search(r"(?m)^ExecStart=\S+/rigserve serve /etc/rigserve/rig.yaml$", written)
    scratch.do("\n".join(lines[init + 1 : keys]), folder)
    assert (folder / "systemctl").read_text().splitlines() == [
        "daemon-reload",
        "enable --now rigserve.socket rigserve.service",
    ]
    config = folder / "etc/rigserve/rig.yaml"
    settings = yaml.safe_load(config.read_text())
    assert settings["storage"]["data_dir"] == "/var/lib/rigserve"
    port = free_port()
    small(config, cache_dir, folder, port)
    secret = secret_in(scratch.do(lines[keys], folder))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen(16)
        with closing(listener), ActivatedServer(config, listener) as server:
            server.wait_until_listening()
            assert completes(server.base_url, secret) == 200
            assert completes(server.base_url, "wrong") == 401


def test_units_are_units_and_as_hard_as_the_guide_says(scratch: Scratch) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    scores = {}
    for has_gpu in (False, True):
        unit = scratch.folder / "rigserve.service"
        unit.write_text(systemd.service(Path("/bin/true"), Path("/etc/rig.yaml"), has_gpu=has_gpu))
        listening = scratch.folder / "rigserve.socket"
        listening.write_text(systemd.socket("127.0.0.1:8000"))
        verified = subprocess.run(
            ["systemd-analyze", "verify", str(unit), str(listening)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        # It warns of documentation pages that are not installed, and of no more.
        assert verified.returncode == 0, verified.stderr
        told = subprocess.run(
            ["systemd-analyze", "security", "--offline=yes", str(unit)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        scores[has_gpu] = float(re.findall(r"rigserve\.service: ([\d.]+)", told.stdout)[0])
    said = re.search(r"gives it ([\d.]+) without a card .*?card\s+([\d.]+)\)", GUIDE, re.DOTALL)
    assert said is not None
    assert scores == {False: float(said[1]), True: float(said[2])}


def test_backup_and_upgrade(scratch: Scratch, cache_dir: Path) -> None:
    config = scratch.folder / "rig.yaml"
    config.write_text(
        yaml.safe_dump({"server": {}, "models": [{"name": "m", "source": "hf://o/r/f.gguf"}]})
    )
    small(config, cache_dir, scratch.folder, 8000)
    # The image has the config at /etc/rigserve.
    (etc := scratch.folder / "etc/rigserve").mkdir(parents=True)
    shutil.copy(config, etc)
    scratch.do(f"rigserve keys create alice --config {config}", scratch.folder)
    told = scratch.do(commands("Backup and upgrade"), scratch.folder)
    assert "keys.sqlite: format" in told
    assert (scratch.folder / "restored-data/keys.sqlite").exists()
    assert (scratch.folder / "restored.yaml").read_text() == config.read_text()
    # Also in the container, whose data folder is a volume.
    data = scratch.folder / "var/lib/rigserve"
    assert (data / "keys.sqlite").exists()
    [aside] = data.glob("before-restore-*")
    assert (aside / "keys.sqlite").exists()


def published(services: dict[str, Any]) -> dict[str, list[str]]:
    """The addresses of this machine at which services can be reached."""
    return {
        service: [each["host_ip"] for each in settings["ports"]]
        for service, settings in services.items()
        if settings.get("ports")
    }


@pytest.mark.parametrize("name", ["cpu", "cuda", "vllm"])
def test_images_and_profiles(name: str) -> None:
    run("hadolint", "--failure-threshold", "info", ROOT / "docker" / f"{name}.Dockerfile")
    folder = ROOT / "docker"
    words: list[str | Path] = [
        "--project-directory",
        folder,
        "--profile",
        name,
        "--profile",
        "monitoring",
        "config",
    ]
    services = yaml.safe_load(run("docker-compose", *words))["services"]
    # All are inside, and there alone but for the gateway, which others reach, and who tells of alerts.
    gateway = f"rigserve-{name}"
    assert published(services) == {gateway: ["127.0.0.1"]}
    outside = {gateway: {"front"}, "alertmanager": {"out"}}
    for service, settings in services.items():
        assert settings["networks"].keys() == {"inside"} | outside.get(service, set()), service
        assert settings["read_only"], service
        assert settings["cap_drop"] == ["ALL"], service
    words[:0] = ["-f", folder / "compose.yaml", "-f", folder / "grafana.yaml"]
    with_grafana = yaml.safe_load(run("docker-compose", *words))["services"]
    assert published(with_grafana) == {gateway: ["127.0.0.1"], "grafana": ["127.0.0.1"]}
    has_gpu = "deploy" in services[f"rigserve-{name}"]
    assert has_gpu == (name != "cpu")


@pytest.mark.parametrize("script", ["start.sh", "verify-cuda.sh"])
def test_scripts_are_scripts(script: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / "docker" / script)], check=True)


@pytest.mark.parametrize("kind", ["config", "compose"])
def test_init_takes_flags_and_overwrites_nothing(scratch: Scratch, kind: str) -> None:
    words = (
        f"rigserve init {kind} --source hf://org/repo/file.gguf --name big --listen 0.0.0.0:9000"
    )
    assert "wrote" in scratch.do(words, scratch.folder)
    if kind == "config":
        settings = yaml.safe_load((scratch.folder / "rig.yaml").read_text())
        # Strangers reach it: they need a key.
        assert settings["server"] == {"host": "0.0.0.0", "port": 9000, "require_keys": True}  # noqa: S104
        assert settings["models"] == [{"name": "big", "source": "hf://org/repo/file.gguf"}]
    else:
        assert "RIGSERVE_LISTEN=0.0.0.0:9000" in (scratch.folder / ".env").read_text()
    failing = scratch.do(f"{words} 2>&1 && exit 1 || true", scratch.folder)
    assert "is there already" in failing


@pytest.mark.parametrize("listen", ["9000", "rig.example:9000", "127.0.0.1:70000"])
def test_init_wants_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listen: str
) -> None:
    words = ["--source", "hf://o/r/f.gguf", "--name", "m", "--out", str(tmp_path / "new")]
    assert main(["init", "compose", *words, "--listen", listen]) == 2
    assert "not ADDRESS:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "source", "name", "told"),
    [
        ("config", "gone.gguf", "m", "there is no file"),
        ("config", "hf://o/r/f.gguf", "'a b'", "name"),
        ("compose", "here.gguf", "m", "containers do not see it"),
        ("systemd", "/root/here.gguf", "m", "the service sees no homes"),
    ],
)
def test_init_writes_nothing_that_would_not_be_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    source: str,
    name: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.gguf").touch()
    words = ["--source", source, "--name", name, "--listen", "localhost:9000", "--out", "new"]
    assert main(["init", kind, *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_init_has_the_units_name_what_they_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.gguf").touch()
    words = ["--source", "here.gguf", "--name", "m", "--listen", "localhost:9000", "--out", "new"]
    assert main(["init", "systemd", *words]) == 0
    # systemd takes no names of hosts, and the config will be in another folder.
    assert "ListenStream=127.0.0.1:9000\n" in (tmp_path / "new/rigserve.socket").read_text()
    [model] = load_config(tmp_path / "new/rig.yaml").local_models
    assert model.source == str(tmp_path / "here.gguf")
