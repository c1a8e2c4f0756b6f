"""A rig, and a bench of it for which another machine works, too: ``python -m tests.two_machines CONFIG OUT ADDRESS:PORT``.

The last is where the other machine's worker comes. Runs on the first of :mod:`tests.network`'s machines.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serving.cost.ledger import read_traffic
from tests.processes import RigServer, wait_for


def main(config_path: Path, out: Path, bind: str) -> int:
    """Returns the bench's exit status, once the ledger has all of its requests."""
    address, _, _ = bind.partition(":")
    with RigServer(config_path) as rig:
        rig.wait_until_ready()
        url = f"http://{address}:{rig.config['server']['port']}/v1"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "serving", "bench", "--users", "6", "--duration", "4s"),
                *("--prompt-tokens", "20", "--output-tokens", "8", "--url", url, "--out", str(out)),
                *("--workers", "1", "--remote-workers", "1", "--bind", bind),
                *("--config", str(config_path)),
            ],
            timeout=120,
            check=False,
        )
        if done.returncode == 0:
            records = len((out / "records.jsonl").read_text().splitlines())
            wait_for(lambda: read_traffic(rig.ledger_path).requests == records, "the ledger", 60)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
