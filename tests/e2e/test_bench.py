"""A real `rigserve bench` against a real server: all books agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serving.cost.ledger import read_traffic
from tests.processes import RigServer, wait_for


def test_report_ledger_and_metrics_agree_exactly(rig: RigServer, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "serving", "bench", "--users", "4", "--duration", "5s"),
            *("--output-tokens", "24", "--url", f"{rig.base_url}/v1", "--out", str(out)),
            *("--config", str(rig.config_path)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((out / "report.json").read_text())
    totals = report["totals_with_warmup"]
    assert totals["errors"] == 0
    assert totals["requests"] > 4

    prompt, completion = totals["prompt_tokens"], totals["completion_tokens"]
    assert rig.total("rigserve_prompt_tokens_total") == prompt
    assert rig.total("rigserve_completion_tokens_total") == completion
    # Its questions to /tokenize are requests, too.
    chats = [n for labels, n in rig.series("rigserve_requests_total").items() if "chat" in labels]
    assert sum(chats) == totals["requests"]
    assert report["notes"] == []

    wait_for(lambda: read_traffic(rig.ledger_path).requests == totals["requests"], "the ledger")
    traffic = read_traffic(rig.ledger_path)
    assert (traffic.prompt_tokens, traffic.completion_tokens) == (prompt, completion)
    assert traffic.cached_tokens == totals["cached_tokens"]
    assert traffic.prefill_busy_seconds > 0
    assert traffic.decode_busy_seconds > 0

    assert len((out / "report.csv").read_text().splitlines()) == totals["requests"] + 1
    assert "</html>" in (out / "report.html").read_text()


def test_the_cost_command_prices_the_ledger(rig: RigServer) -> None:
    rig.client.completions.create(model="smollm2-135m", prompt="The sea", max_tokens=4)
    wait_for(lambda: rig.ledger_path.exists() and read_traffic(rig.ledger_path).requests, "a row")
    result = subprocess.run(
        [sys.executable, "-m", "serving", "cost", str(rig.config_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "openai/gpt-4o-mini" in result.stdout
    assert "estimated" in result.stdout
