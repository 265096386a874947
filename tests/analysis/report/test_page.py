"""The report's page in a real browser: headless Chromium.

Needs chromium and chromedriver (Debian: `apt-get install chromium chromium-driver`).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from analysis.report.write import write_report
from tests.support import FIXTURES
from tests.support.hostile import EVIL, make_hostile_study

STUDY = FIXTURES / "study"
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(DRIVER is None, reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page moved away from its folder: it must be self-contained."""
    folder = tmp_path_factory.mktemp("page")
    report = write_report(Path(shutil.copytree(STUDY, folder / "study")))
    return Path(shutil.move(report.path, folder / "index.html"))


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--window-size=1000,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    assert DRIVER
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def test_the_page_requests_nothing_else(browser: webdriver.Chrome, page: Path) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert requested == {page.as_uri()}
    assert browser.get_log("browser") == []


def test_the_verdict_is_at_the_top(browser: webdriver.Chrome) -> None:
    verdict = browser.find_element(By.ID, "verdict")
    assert verdict.text.startswith("No difference shown: the estimated effect of dropout is")
    assert verdict.location["y"] < 150


def test_every_figure_is_drawn_with_a_caption(browser: webdriver.Chrome) -> None:
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert len(figures) > 10
    for figure in figures:
        drawing = figure.find_element(By.TAG_NAME, "svg")
        assert drawing.size["width"] > 800, figure.get_attribute("id")
        assert drawing.size["height"] > 100
        assert len(drawing.find_elements(By.TAG_NAME, "path")) > 5
        assert figure.find_element(By.TAG_NAME, "figcaption").text.endswith(".")
        assert figure.find_element(By.TAG_NAME, "h3").text


def test_clicking_a_heading_sorts(browser: webdriver.Chrome) -> None:
    table = browser.find_element(By.CSS_SELECTOR, "#effects table")
    heading = table.find_elements(By.TAG_NAME, "button")[-1]
    unsorted = column(table, -1)
    heading.click()
    rising = column(table, -1)
    assert rising == sorted(unsorted, key=float)
    assert rising != unsorted
    heading.click()
    assert column(table, -1) == rising[::-1]


def test_numbers_sort_with_their_sign(browser: webdriver.Chrome) -> None:
    table = browser.find_element(By.CSS_SELECTOR, "#effects table")
    table.find_elements(By.TAG_NAME, "button")[2].click()
    changes = [float(text.split()[0].replace("\N{MINUS SIGN}", "-")) for text in column(table, 2)]
    assert min(changes) < 0 < max(changes)
    assert changes == sorted(changes)


def test_durations_sort_by_their_length(browser: webdriver.Chrome) -> None:
    table = browser.find_element(By.CSS_SELECTOR, "#time table")
    browser.execute_script(
        "const body = arguments[0].tBodies[0], row = body.rows[0];"
        "body.replaceChildren(...arguments[1].map(text => {"
        "  const copy = row.cloneNode(true); copy.cells[1].textContent = text; return copy }));",
        table,
        ["2 h 07 min", "3 min 05 s", "50 s", "1 min 00 s"],
    )
    table.find_elements(By.TAG_NAME, "button")[1].click()
    assert column(table, 1) == ["50 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]


def test_no_horizontal_scrolling_on_a_phone(browser: webdriver.Chrome) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert browser.find_element(By.ID, "verdict").size["width"] <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_is_dark_and_readable(browser: webdriver.Chrome) -> None:
    def colours() -> list[str]:
        found: list[str] = browser.execute_script(
            "const of = (what, which) => getComputedStyle(document.querySelector(what))[which];"
            "return [of('body', 'backgroundColor'), of('body', 'color'),"
            " of('#accuracy svg text', 'fill')]"
        )
        return found

    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    light = colours()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    dark = colours()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert brightness(light[0]) > 200 > 60 > brightness(light[1])
    assert brightness(dark[0]) < 60 < 200 < brightness(dark[1])
    # Text in the figures follows the colour of the page.
    assert (light[2], dark[2]) == (light[1], dark[1])


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_hostile_names_do_nothing(browser: webdriver.Chrome, page: Path, tmp_path: Path) -> None:
    """If any were run or loaded, the browser would log an error: evil() and x do not exist."""
    browser.get_log("browser")
    try:
        browser.get(write_report(make_hostile_study(tmp_path).path).path.as_uri())
        assert EVIL in browser.find_element(By.ID, "verdict").text
        assert browser.get_log("browser") == []
    finally:
        browser.get(page.as_uri())


def column(table: WebElement, index: int) -> list[str]:
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [row.find_elements(By.TAG_NAME, "td")[index].text for row in rows]


def brightness(colour: str) -> float:
    """Return the mean of red, green and blue of "rgb(1, 2, 3)", 0 to 255."""
    parts = colour[colour.index("(") + 1 : -1].split(",")[:3]
    return sum(map(float, parts)) / 3
