"""The best settings as a config that serves them, with what was measured in comments."""

from __future__ import annotations

from datetime import date

import yaml

from serving.tuning.bench import Work
from serving.tuning.outcome import Outcome, quality_of


def config_text(outcome: Outcome, work: Work, machine: str) -> str:
    """The YAML of a config with the best model alone; there must be one."""
    assert outcome.best is not None
    model, figures = outcome.best.model, outcome.figures_of(outcome.best)
    assert figures is not None
    lines = [
        f"Written by `rigserve tune` on {date.today()}, for {machine}.",
        outcome.reason,
        f"Measured with {work.users} users, {work.prompt_tokens} prompt tokens, {work.output_tokens} generated: "
        f"{figures.tokens_per_second:,.0f} tok/s,",
        f"TTFT p95 {figures.ttft_p95_seconds * 1e3:,.0f} ms, TPOT p95 {figures.tpot_p95_seconds * 1e3:,.1f} ms, "
        f"${figures.usd_per_million:.3f} per million generated tokens (energy: {figures.energy_source}).",
        f"Quality: {quality_of(model)}.",
    ]
    comments = "".join(f"# {line}\n" for line in lines)
    told = model.model_dump(mode="json", exclude_defaults=True)
    told = {"name": model.name, "engine": model.engine, **told}
    document = {"models": [told]}
    return f"{comments}\n{yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}"
