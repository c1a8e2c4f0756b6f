"""The files of a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from loadtest.html import render_html
from loadtest.markdown import render_markdown
from loadtest.records import write_records
from loadtest.report import CSV_COLUMNS, Report


def write_report(report: Report, out: Path) -> None:
    """Write all of them into ``out``; report.html last."""
    write_records(report.records, out / "records.jsonl")
    (out / "report.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for record in report.records:
            writer.writerow(getattr(record, column) for column in CSV_COLUMNS)
    (out / "report.md").write_text(render_markdown(report), encoding="utf-8")
    (out / "report.html").write_text(render_html(report), encoding="utf-8")
