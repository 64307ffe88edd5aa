"""The page in a real browser: what hovering and the keyboard show, and that hostile text stays text."""

import re

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from sinkscope.reports import page
from tests.browser.zoo import PATCHES, page_of
from tests.synthetic import HOSTILE, causal_attention, mass, profile, report, uniform, words

pytestmark = pytest.mark.browser
LABEL = "</script><script>alert(3)</script><b>"
TEXTS = {"essay": words(80), LABEL: [*HOSTILE, *words(6)]}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    frame, summary, meta = report(TEXTS, model="<i>toy</i>")
    path = tmp_path_factory.mktemp("page") / "report.html"
    attention = causal_attention(5)
    attention["key_token"] = attention["key"].map(lambda key: HOSTILE[key])
    path.write_text(page.render(page.measured(frame, summary, meta, attention)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def browser(driver, address):
    driver.get_log("browser")
    driver.get(address)
    yield driver
    assert driver.get_log("browser") == []  # no error, and nothing that the content security policy had to stop


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def cell(browser, layer, head, figure="heat"):
    return find(browser, f"#{figure} [data-row='{layer}'][data-column='{head}']")


def text_of(browser, identifier):
    return browser.find_element(By.ID, identifier).text


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def pick(browser, identifier, choice):
    Select(browser.find_element(By.ID, identifier)).select_by_visible_text(choice)


def value_of(layer, head):
    """What the cell of all texts says: the mean of two texts that differ by 0.01, and their null."""
    null = np.mean([uniform(len(tokens))[0] for tokens in TEXTS.values()])
    return f"Layer {layer}, head {head}: {mass(layer, head, 0.5):.3g} ± 0.005", f"null {null:.3g}"


def test_every_figure_is_drawn(browser):
    assert len(browser.find_elements(By.CSS_SELECTOR, "#heat [role=gridcell]")) == 4 * 3
    for figure in ("heat", "progress", "profile", "pairs"):
        assert find(browser, f"#{figure} svg").size["height"] > 100
    assert find(browser, "#progress .band")
    assert find(browser, "#profile circle.first")


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (2, 1), (3, 2)])
def test_hovering_shows_the_cell(browser, layer, head):
    ActionChains(browser).move_to_element(cell(browser, layer, head)).perform()
    for part in value_of(layer, head):
        assert part in text_of(browser, "heat-readout")


def test_the_keyboard_shows_the_same(browser):
    browser.execute_script("document.querySelector('#text-picker').focus()")
    press(browser, Keys.TAB)
    assert value_of(0, 0)[0] in text_of(browser, "heat-readout")
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert value_of(2, 1)[0] in text_of(browser, "heat-readout")
    assert browser.switch_to.active_element.get_attribute("aria-label") == "layer 2, head 1"
    press(browser, Keys.TAB)  # one stop for the whole grid
    assert browser.switch_to.active_element.get_attribute("role") == "slider"


@pytest.mark.parametrize("act", [lambda browser, item: item.click(), lambda browser, item: press(browser, Keys.ENTER)])
def test_picking_a_layer_shows_its_profile(browser, act):
    pick(browser, "profile-picker", "share of all attention")
    browser.execute_script("arguments[0].focus()", cell(browser, 3, 1))
    act(browser, cell(browser, 3, 1))
    assert "in layer 3, text: essay" in text_of(browser, "profile-caption")
    assert "layer 3, mean of heads" in text_of(browser, "profile")
    browser.execute_script("document.querySelector('#profile svg').focus()")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    expected = profile(80, mass(3, 1, 0))[2]
    assert text_of(browser, "profile-readout").startswith(f"Position 2 “ sink”: {expected:.3g}")
    assert find(browser, "#profile svg").get_attribute("aria-valuetext") == text_of(browser, "profile-readout")


def test_metric_and_text_can_be_chosen(browser):
    pick(browser, "metric-picker", "row_entropy (nats)")
    pick(browser, "text-picker", "essay")
    ActionChains(browser).move_to_element(cell(browser, 1, 2)).perform()
    assert text_of(browser, "heat-readout").startswith(f"Layer 1, head 2: {4 * mass(1, 2, 0):.3g}; null")
    assert text_of(browser, "heat-caption") == "row_entropy (nats), by layer and head"


def test_progression_reads_out_layers(browser):
    browser.execute_script("document.querySelector('#progress svg').focus()")
    press(browser, Keys.END)
    assert text_of(browser, "progress-readout").startswith(f"Layer 3: {mass(3, 1, 0.5):.3g}; null")


def test_tokens_are_shaded_by_attention_and_read_out(browser):
    pick(browser, "profile-picker", "share of all attention")
    spans = "[...document.querySelectorAll('#tokens span')]"
    shades = browser.execute_script(f"return {spans}.map(span => +span.style.getPropertyValue('--shade'))")
    assert len(shades) == 80
    assert shades[0] == max(shades) > 0.7
    browser.execute_script("document.querySelector('#tokens span').focus()")
    press(browser, Keys.ARROW_RIGHT)
    assert text_of(browser, "strip-readout").startswith("Position 1 “ the”, layer ")


def test_hostile_text_stays_text(browser):
    pick(browser, "text-picker", LABEL)
    shown = [span.get_property("textContent") for span in browser.find_elements(By.CSS_SELECTOR, "#tokens span")]
    assert shown[:3] == HOSTILE[:3]
    assert shown[3:8] == ["a⟨U+2028⟩b", "⟨U+202E⟩evil", "⟨U+0000⟩", "↵\n", "⟨U+D800⟩"]
    for position in (0, 1):
        browser.execute_script("document.querySelectorAll('#tokens span')[arguments[0]].focus()", position)
        assert HOSTILE[position] in text_of(browser, "strip-readout")
    ActionChains(browser).move_to_element(cell(browser, 1, 0, "pairs")).perform()
    assert f"Query 1 “{HOSTILE[1]}” → key 0 “{HOSTILE[0]}”: 0.6" in text_of(browser, "pairs-readout")
    assert LABEL in text_of(browser, "profile-caption")
    assert len(browser.find_elements(By.CSS_SELECTOR, "script")) == 2
    assert not browser.find_elements(By.CSS_SELECTOR, "img, b, i")
    with pytest.raises(Exception, match="no such alert"):
        _ = browser.switch_to.alert


def test_injected_script_would_not_run(driver, address):
    driver.get(address)
    driver.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.injected = 1';"
        "document.body.append(script);"
    )
    assert driver.execute_script("return window.injected") is None
    assert "Content Security Policy" in str(driver.get_log("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(browser, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    body = find(browser, "body")
    ink, paper = (
        np.mean([int(part) for part in body.value_of_css_property(name).strip("rgba()").split(",")[:3]])
        for name in ("color", "background-color")
    )
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 180


def test_nothing_overflows_on_a_phone(browser):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_report_with_little_in_it(driver, tmp_path):
    frame, summary, meta = report({"a": words(10)}, layers=1, heads=1)
    for kept in (["position_profile"], ["sink_mass"], []):
        path = tmp_path / "little.html"
        few = summary[summary["metric"].isin(kept)]
        path.write_text(page.render(page.measured(frame[frame["metric"].isin(kept)], few, meta)), encoding="utf-8")
        driver.get(path.as_uri())
        assert driver.get_log("browser") == []


def test_the_page_of_many_texts(driver, tmp_path):
    """There is no single text: the mean profile is drawn, nothing is shaded, and nothing fails."""
    import sinkscope as ss
    from sinkscope.testing import tiny_model

    report = ss.measure(tiny_model("llama"), ["so it goes" + " on" * (i % 7) for i in range(12)], per_text=False)
    (tmp_path / "report.html").write_text(report.page(), encoding="utf-8")
    driver.get_log("browser")
    driver.get((tmp_path / "report.html").as_uri())
    assert "text: all" in text_of(driver, "profile-caption")
    assert not driver.find_elements(By.ID, "tokens")
    assert [o.text for o in Select(driver.find_element(By.ID, "text-picker")).options] == ["all texts (mean)"]
    ActionChains(driver).move_to_element(find(driver, "#profile svg")).perform()
    assert text_of(driver, "profile-readout").startswith("Position")
    assert "“" not in text_of(driver, "profile-readout")
    assert driver.get_log("browser") == []


def test_the_grid_of_patches(driver, tmp_path):
    """Every cell is the patch's own number, mean of layers; pointing at one says it here and in the strip."""
    path = tmp_path / "images.html"
    path.write_text(page_of("images"), encoding="utf-8")
    driver.get_log("browser")
    driver.get(path.as_uri())
    sinks = [float(mass(layer, 1, 0)) for layer in range(4)]
    received = np.mean([1.2 * profile(len(PATCHES), sink) for sink in sinks], 0)
    caption = text_of(driver, "patches-caption")
    assert f"uniform attention gives {uniform(len(PATCHES))[0]:.3g}" in caption
    low, high = map(float, re.search(r"from ([0-9.e-]+) \(dark\) to ([0-9.e-]+);", caption).groups())
    assert (low, high) == pytest.approx((received.min(), received.max()), rel=0.01)
    pixels = driver.execute_script(
        "const c = document.querySelector('#patches canvas');"
        "return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    assert pixels[:2] == [16, 12]
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in page_data(driver)["colours"]])
    shown = np.array(pixels[2]).reshape(12 * 16, 4)[:, :3]
    at = np.round(np.log(received[2:] / received.min()) / np.log(received.max() / received.min()) * 63).astype(int)
    nearest = np.abs(colours[None] - shown[:, None]).sum(-1).argmin(1)
    assert np.abs(nearest - at).max() <= 1  # kept in three digits
    ActionChains(driver).move_to_element(find(driver, "#patches svg")).perform()
    place = re.match(r"(patch [0-9]+,[0-9]+): ([0-9.e-]+); uniform attention", text_of(driver, "patches-readout"))
    index = PATCHES.index(place[1])
    assert float(place[2]) == pytest.approx(received[index], rel=0.01)
    assert f"Position {index} “{place[1]}”" in text_of(driver, "strip-readout")
    assert "2 images, 388 positions." in find(driver, "header").text
    assert driver.get_log("browser") == []


def page_data(browser):
    return browser.execute_script("return JSON.parse(document.getElementById('data').textContent)")
