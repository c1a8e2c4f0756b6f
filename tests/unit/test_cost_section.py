"""The report's section on cost, in a real browser: it fits, it is complete, and it asks nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from loadtest import cost_section
from loadtest.html import STYLE
from serving.cost.comparison import compare
from serving.cost.prices import PriceBook
from serving.cost.words import (
    computation,
    computation_of_verdict,
    computation_there,
    verdict_sentences,
)
from tests.browser import browser
from tests.unit.test_cost import CONFIG, TRAFFIC, traffic


def page(section: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><style>{STYLE}{cost_section.STYLE}</style><main>{section}</main></html>'
    )


def test_it_fits_a_phone_and_a_desk_and_prints_every_sum(tmp_path: Path) -> None:
    executable = browser()
    report = compare(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to))
    file = tmp_path / "cost.html"
    file.write_text(
        page(cost_section.verdict_card(report) + cost_section.cost_section(report)),
        encoding="utf-8",
    )
    asked: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        for width, scheme in ((390, "dark"), (1200, "light")):
            view = chromium.new_page(
                viewport={"width": width, "height": 900},
                color_scheme="dark" if scheme == "dark" else "light",
            )
            view.on("request", lambda request: asked.append(request.url))
            view.goto(file.as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            # The columns that matter are seen without scrolling.
            table = view.locator("table.costs")
            assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
            assert view.locator("table.costs th:last-child").is_visible()
            assert view.locator(".tornado .swing b").count() > 3
            # Its bars can be told apart, however long the words beside them.
            assert view.locator(".swing").first.evaluate("each => each.clientWidth") >= 120
            # On paper nobody clicks.
            sums = view.locator("details .card")
            assert not sums.is_visible()
            view.emulate_media(media="print")
            assert sums.evaluate("each => each.checkVisibility({contentVisibilityAuto: true})")
            assert view.locator("details").evaluate("each => each.clientHeight") > 500
            if width > 700:  # of A4, within a browser's own margins
                view.set_viewport_size({"width": 700, "height": 900})
                assert table.evaluate(
                    "table => table.scrollWidth <= table.parentElement.clientWidth"
                )
                view.set_viewport_size({"width": width, "height": 900})
            view.emulate_media(media="screen")
            view.locator("summary").click()
            text = view.locator("main").inner_text()
            steps = [*computation(report)]
            for row in report.rows:
                steps += computation_there(row, report)
            assert report.verdict is not None
            steps += computation_of_verdict(report, report.verdict)
            for step in steps:
                assert step.formula in text
                assert step.result in text
            for sentence in verdict_sentences(report):
                assert sentence in text
        chromium.close()
    assert {url for url in asked if not url.startswith("file:")} == set()


def test_a_rig_that_always_works_and_one_that_nobody_compares() -> None:
    busy = CONFIG.model_copy(update={"utilization": 1.0})
    section = cost_section.cost_section(compare(TRAFFIC, busy, PriceBook(CONFIG.compare_to)))
    assert "log-curve" in section
    alone = cost_section.cost_section(compare(TRAFFIC, CONFIG, PriceBook(())))
    assert "tornado" not in alone
    only_prompts = compare(traffic(completion=0), CONFIG, PriceBook(CONFIG.compare_to))
    assert "output, a million tokens" not in cost_section.cost_section(only_prompts)


@pytest.mark.parametrize("price", [1e7, 0.0])
def test_losses_stand_out(price: float) -> None:
    config = CONFIG.model_copy(update={"hardware_price_usd": price})
    section = cost_section.cost_section(compare(TRAFFIC, config, PriceBook(CONFIG.compare_to)))
    assert ('class="loss"' in section) == (price > 0)
