"""Every page of the zoo, at three widths, dark and light, by keyboard alone, and by axe; and how fast the largest is."""

import statistics
import time
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.browser.zoo import ZOO, page_of

pytestmark = pytest.mark.browser
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
#: Pages with maps of three thousand heads, and the cells of all rows but the first.
GRIDS, ROWS = ("largest", "swept heads"), "[data-row]:not([data-row='0'])"
ACTIVE = (
    "let e = document.activeElement; while (e && e.shadowRoot && e.shadowRoot.activeElement) e = e.shadowRoot.activeElement; "
)


@pytest.fixture(scope="module", params=[*ZOO, "snippet"])
def animal(request, driver, tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / f"{request.param.replace(' ', '_')}.html"
    path.write_text(page_of(request.param), encoding="utf-8")
    driver.get_log("browser")
    driver.get(path.as_uri())
    yield driver, request.param
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def scheme(browser, name):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]})


def test_nothing_overflows_at_any_width(animal):
    browser, name = animal
    for width in (360, 768, 1440):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(0.25)  # what is drawn in pixels is drawn anew
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
    assert browser.get_log("browser") == []


def test_axe_finds_nothing(animal):
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: make script, with npm")
    browser, name = animal
    if name in GRIDS:  # of thousands of cells, those of one row stand for the others, in which axe would take a minute
        browser.execute_script(
            "for (const cell of document.querySelectorAll(arguments[0])) cell.remove();"
            "for (const row of document.querySelectorAll('[role=row]:empty')) row.remove()",
            ROWS,
        )
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    for colours in ("light", "dark"):
        scheme(browser, colours)
        assert violations(browser, {} if colours == "light" else {"runOnly": ["color-contrast"]}) == [], (name, colours)
    if name in GRIDS:
        browser.refresh()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_axe_finds_nothing_in_any_cell(driver, tmp_path, name):
    """All of the largest pages, which takes axe minutes."""
    path = tmp_path / "large.html"
    path.write_text(page_of(name), encoding="utf-8")
    driver.get(path.as_uri())
    driver.set_script_timeout(1200)
    driver.command_executor.client_config.timeout = 1200
    driver.execute_script(AXE.read_text(encoding="utf-8"))
    assert violations(driver, {}) == []


def violations(browser, options):
    """What axe finds, everything unfolded."""
    return browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "for (const d of document.querySelectorAll('details')) d.open = true;"
        "axe.run(document, {resultTypes: ['violations'], ...arguments[0]}).then(r => done(r.violations.map(v =>"
        "  [v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 160) + n.failureSummary)])), e => done([String(e)]))",
        options,
    )


def test_the_keyboard_reaches_everything_and_leaves_it(animal):
    """Tab goes from stop to stop, none twice, until it leaves the page; each is seen; arrows and Enter do no harm."""
    browser, _ = animal
    browser.execute_script(
        "for (const d of document.querySelectorAll('details')) d.open = false; document.activeElement.blur()"
    )
    stops = []
    for _ in range(80):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        stop = browser.execute_script(
            ACTIVE + "if (!e || e === document.body) return null;"
            "e.dataset.stop = e.dataset.stop || Math.random();"
            "return [e.dataset.stop, e.tagName, e.getAttribute('role') || e.type, getComputedStyle(e).outlineStyle]"
        )
        if stop is None:
            break
        stops.append(stop)
        if stop[2] in ("gridcell", "slider", "option", "range", "checkbox"):
            ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.END, Keys.HOME).perform()
    identities = [stop[0] for stop in stops]
    assert stops
    assert len(set(identities)) == len(identities)
    assert all(style != "none" for _, _, role, style in stops if role != "gridcell")  # its ring is drawn in the picture
    assert browser.get_log("browser") == []


POINT = ".dispatchEvent(new Event('pointerover', {bubbles: true}))"
CLICK = ".dispatchEvent(new Event('click', {bubbles: true}))"
INTERACTIONS = {
    "a token of the explorer": "find(`#panels [role=option]:nth-child(${3 + i})`)" + POINT,
    "a head": "find(`#map [data-row='${i}'][data-column='3']`)" + CLICK,
    "without the sink": "find('#without').click()",
    "a place in the strip": "const s = find('#strip svg'), b = s.getBoundingClientRect(); s.dispatchEvent("
    "new PointerEvent('pointermove', {clientX: b.left + 200 + 99 * i, clientY: b.top + 40}))",
    "another profile": "const p = find('#profile-picker'); p.selectedIndex = 1 - p.selectedIndex; p.onchange()",
    "a cell of the map of heads": "find(`#heat [data-row='${i}'][data-column='5']`)" + POINT,
}


def test_the_largest_is_fast(driver, tmp_path):
    """The first paint below a second, an answer to the hand below 100 ms, layout included: medians of five, printed.

    What else runs on the machine lengthens them: a series of five that is too slow is taken again, twice at most.
    """
    path = tmp_path / "largest.html"
    path.write_text(page_of("largest"), encoding="utf-8")

    def painted():
        driver.get(path.as_uri())
        time.sleep(0.1)
        return driver.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")

    def answered(act):
        return driver.execute_script(
            "const find = what => document.querySelector(what), found = [];"
            "for (let i = 0; i < 5; i++) { const t = performance.now(); " + act + ";"
            "document.body.getBoundingClientRect(); found.push(performance.now() - t); } return found"
        )

    took = {"first paint": median_of_five(lambda: [painted() for _ in range(5)], 1000)}
    took |= {name: median_of_five(lambda act=act: answered(act), 100) for name, act in INTERACTIONS.items()}
    print({name: round(median) for name, median in took.items()})
    assert took.pop("first paint") < 1000
    assert {name: median for name, median in took.items() if median >= 100} == {}


def median_of_five(series, limit):
    """The median in milliseconds, of the first series of five that is below the limit, or of the third."""
    for _ in range(3):
        found = statistics.median(series())
        if found < limit:
            break
    return found
