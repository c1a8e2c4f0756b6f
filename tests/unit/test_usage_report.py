"""`rigserve cost report` as a person meets it: the terminal, a spreadsheet, a page."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from serving.cli import main
from serving.cost.ledger import Ledger
from serving.keys.store import KeyStore
from serving.protocol.keys import NewKey
from tests.unit.test_ledger import RECORD

Run = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "rig.yaml"
    remote = {
        "name": "far", "engine": "remote", "base_url": "http://localhost/v1",
        "usd_per_million": {"input": 1, "output": 2}, "budget_usd": 3,
    }  # fmt: skip
    path.write_text(
        yaml.safe_dump(
            {
                "models": [remote],
                "storage": {"data_dir": str(tmp_path)},
                "cost": {"compare_to": ["openai/gpt-4o", "openai/gpt-4o-mini"], "carbon_grams_per_kwh": 380},
            }
        )
    )  # fmt: skip
    with closing(KeyStore(tmp_path)) as store:
        alice, _ = store.create(NewKey(name="alice", tenant="research", budget_tokens=20))
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        now = time.time()
        ledger.append(replace(RECORD, started_at=now - 60, key_id=alice.id, tenant="research"))
        ledger.append(
            replace(RECORD, started_at=now - 50, key_id=alice.id, tenant="research", status=499)
        )
        ledger.append(
            replace(
                RECORD,
                started_at=now - 40,
                model="<b>lora</b>",
                base_model="m",
                energy_source="estimated",
            )
        )
        ledger.append(
            replace(
                RECORD,
                started_at=now - 30,
                model="far",
                engine="remote",
                api_usd=0.5,
                energy_joules=0.0,
            )
        )
        ledger.append(replace(RECORD, started_at=now - 40 * 86_400))
    return path


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> str:
        action, *rest = arguments
        assert main(["cost", action, str(config), *rest]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_the_terminal_fits_and_tells_all(run: Run) -> None:
    text = run("report", "--since", "30d", "--by", "key")
    assert max(map(len, text.splitlines())) <= 80
    for told in ("Usage by key", "alice", "(none)", "Wh", "CO2e", "380 g/kWh",
                 "The same requests elsewhere", "openai/gpt-4o", "Budgets", "key alice", "model far",
                 "150%", "17%", "* rests on estimates"):  # fmt: skip
        assert told in text, told
    # What other servers were paid is cost, too.
    assert "$0.50" in text


def test_names_with_brackets_are_told_word_for_word(run: Run, config: Path) -> None:
    with closing(Ledger(config.parent / "ledger.sqlite")) as ledger:
        ledger.append(replace(RECORD, model="[/b]", base_model="m"))
    assert "[/b]" in run("report", "--by", "adapter")


def test_a_spreadsheet_has_all_digits(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(run("report", "--format", "csv", "--by", "adapter"))))
    by_name = {row["adapter"]: row for row in rows}
    assert by_name.keys() == {"-", "<b>lora</b>"}
    assert int(by_name["-"]["requests"]) == 4
    assert int(by_name["-"]["errors"]) == 1
    assert float(by_name["<b>lora</b>"]["usd"]) == pytest.approx(1.11e-5)
    assert by_name["<b>lora</b>"]["estimated"] == "True"
    assert float(by_name["<b>lora</b>"]["usd at openai/gpt-4o"]) == pytest.approx(
        (6 * 2.5 + 4 * 1.25 + 5 * 10) / 1e6
    )
    models = csv.DictReader(io.StringIO(run("report", "--format", "csv", "--by", "model")))
    assert {row["model"]: int(row["requests"]) for row in models} == {"m": 4, "far": 1}


def test_a_page_is_self_contained_and_escaped(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "usage.html"
    assert str(out) in run("report", "--out", str(out), "--by", "adapter")
    page = out.read_text()

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "img", "iframe")
            assert not {"src", "href"} & {name for name, _ in attrs}

    Checker().feed(page)
    assert "&lt;b&gt;lora&lt;/b&gt;" in page
    assert "<b>lora" not in page
    assert "Budgets" in page


def test_the_verdict_is_what_cost_alone_says(
    run: Run, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run("verdict", "--steps")
    assert main(["cost", str(config)]) == 0
    alone = capsys.readouterr().out
    assert "Verdict: a million tokens" in alone
    assert text.startswith(alone.rstrip()[:200])
    assert "1e6" in text


def test_peers_are_those_of_the_rigs_own_models(run: Run, config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    values["cost"]["compare_to"] = []
    config.write_text(yaml.safe_dump(values))
    with closing(Ledger(config.parent / "ledger.sqlite")) as ledger:
        ledger.append(replace(RECORD, model="far-70b", engine="remote", prompt_tokens=1_000_000))
    assert "Peer: suggested: m does not tell its size" in " ".join(run("verdict").split())


def test_prices_are_found_by_name(run: Run) -> None:
    text = run("prices", "--find", "claude-haiku-4-5")
    assert "anthropic/claude-haiku-4-5: input $1.00, cached $0.10, output $5.00" in text
    assert "genai-prices" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prices", "--find", "no such model"], "no model with prices"),
        (["report", "--out", "usage.txt"], "--format csv or html"),
        (["report", "--out", "/nonexistent/usage.csv"], "No such file"),
        (["verdict", "--model", "nobody"], "no such requests"),
    ],
)
def test_what_cannot_be_done_is_said_so(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    action, *rest = arguments
    assert main(["cost", action, str(config), *rest]) == 2
    assert message in capsys.readouterr().err
