"""`rigserve doctor`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from serving.doctor.examine import examine
from serving.doctor.finding import Finding, Status

_LOOKS = {
    Status.OK: ("✓", "green"),
    Status.WARNING: ("!", "yellow"),
    Status.PROBLEM: ("✗", "red"),
    Status.UNCHECKED: ("?", "blue"),
}
_CHECK_WIDTH = 18


def add_doctor_command(commands: Any, *, default_config: Path) -> None:
    """Add ``doctor`` to the ``commands`` of argparse; its status is 1 if there is a problem."""
    command = commands.add_parser(
        "doctor", help="check this machine: what is wrong for a rig, and how to mend it"
    )
    command.add_argument(
        "config",
        metavar="CONFIG",
        type=Path,
        nargs="?",
        default=default_config,
        help="YAML file whose folders, port and models to check (default: the embedded model's)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    console = Console()
    findings = []
    for finding in examine(args.config):
        findings.append(finding)
        if not args.json:
            _show(console, finding)
    counts = Counter(finding.status for finding in findings)
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        console.print(f"\n{_summary(counts, findings)}")
    return 1 if counts[Status.PROBLEM] else 0


def _show(console: Console, finding: Finding) -> None:
    mark, colour = _LOOKS[finding.status]
    line = Text.assemble(
        (f"{mark} ", colour), (f"{finding.check:<{_CHECK_WIDTH}} ", "bold"), finding.says
    )
    console.print(line, soft_wrap=not console.is_terminal, highlight=False)
    if finding.mend:
        mend = Text(f"  → {finding.mend}", colour)
        console.print(mend, soft_wrap=not console.is_terminal, highlight=False)


def _summary(counts: Counter[Status], findings: Sequence[Finding]) -> str:
    told = [
        f"{counts[status]} {word}{'s' if counts[status] != 1 and word != 'not checked' else ''}"
        for status, word in (
            (Status.PROBLEM, "problem"),
            (Status.WARNING, "warning"),
            (Status.UNCHECKED, "not checked"),
        )
        if counts[status]
    ]
    return f"{len(findings)} findings: {', '.join(told)}." if told else "All is well."
