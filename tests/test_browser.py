"""Looks at the page in a real browser: no error, nothing fetched, nothing wider than the window, links that open folds.

Skipped where no Chromium is installed; `.ci/run` installs one where it may.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from refusalscope.core.types import Finding
from refusalscope.report import page
from tests.chromium import BINARY, Chromium, chromium
from tests.sample_run import add_close_up, add_new_rows, benchmark_rows, health_rows, make_run

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium is installed")
WIDTHS = (1280, 390)
OVERFLOWING = """(() => {
  document.querySelectorAll('details').forEach(fold => fold.open = true);
  const width = document.documentElement.clientWidth, scrolls = ['auto', 'scroll'];
  const scrolled = item => { for (let up = item.parentElement; up; up = up.parentElement)
    if (scrolls.includes(getComputedStyle(up).overflowX)) return true; return false; };
  const wide = [...document.body.querySelectorAll('*')].filter(item => { const box = item.getBoundingClientRect();
    return box.width > 0 && (box.right > width + 1 || box.left < -1) && !scrolled(item); });
  const said = wide.map(item => item.outerHTML.slice(0, 120));
  return document.documentElement.scrollWidth > width + 1 ? ['the page scrolls sideways', ...said] : said;
})()"""
HIDDEN = """[...document.querySelectorAll('details:not([open])')].length"""
TURNED = r"""[...document.querySelectorAll('.tokens, code.token')]
  .filter(item => /[\u202a-\u202e]/.test(item.textContent)).length"""
FOLLOWED = """(async () => {
  document.querySelectorAll('details').forEach(fold => fold.open = false);
  const link = document.querySelector('%s'), target = document.getElementById(link.hash.slice(1));
  for (let up = link; up; up = up.parentElement) if (up.tagName == 'DETAILS') up.open = true;
  link.click();
  await new Promise(resolve => setTimeout(resolve, 200));
  const box = target.getBoundingClientRect();
  return box.height > 0 && box.top >= 0 && box.top < innerHeight;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert BINARY is not None
    with chromium(BINARY, tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    benchmark = add_new_rows(Finding("benchmark", "Does it & why?", benchmark_rows(), (), {"model": "tiny"}))
    health = Finding("health", "Are they faithful?", health_rows(), (), {"model": "tiny"})
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "report.html"
    file.write_text(page.write(add_close_up(make_run(folder / "run", benchmark, health))), "utf-8")
    return file


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_without_an_error_and_fetches_nothing(browser: Chromium, report: Path, width: int) -> None:
    browser.open(report, width)
    assert browser.evaluate("document.querySelectorAll('.feature').length") == 44
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(HIDDEN) == 0
    assert browser.said("Runtime.exceptionThrown") == []
    assert browser.said("Runtime.consoleAPICalled") == []
    assert [event["entry"]["text"] for event in browser.said("Log.entryAdded")] == []
    assert {event["request"]["url"] for event in browser.said("Network.requestWillBeSent")} == {report.as_uri()}


def test_nothing_is_cut_off_on_paper(browser: Chromium, report: Path) -> None:
    browser.open(report, 718)  # A4 less its margins
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(OVERFLOWING) == []
    browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("start", ["#features ~ .scroll a", '.why a[href^="#feature"]', '.feature a[href^="#why"]'])
def test_a_link_opens_what_it_leads_to(browser: Chromium, report: Path, start: str) -> None:
    browser.open(report, 390)
    assert browser.evaluate(FOLLOWED % start.replace("'", "\\'")) is True


def test_text_turned_around_or_scripted_does_nothing(browser: Chromium, report: Path) -> None:
    browser.open(report, 1280)
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate(TURNED) == 0


def test_the_checks_notice_what_they_are_for(browser: Chromium, tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.html"
    faulty.write_text(
        "<!doctype html><img src=missing.png><p style='width: 2000px'>wide</p><script>nowhere()</script>", "utf-8"
    )
    browser.open(faulty, 1280)
    assert len(browser.evaluate(OVERFLOWING)) >= 2
    assert browser.said("Runtime.exceptionThrown")
    assert len(browser.said("Network.requestWillBeSent")) == 2
