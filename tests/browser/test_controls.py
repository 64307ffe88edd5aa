"""What each control of the explorer, the strip, the page of edits and the compared pages does."""

import re

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.browser.zoo import ZOO, page_of, patterns
from tests.synthetic import words

pytestmark = pytest.mark.browser
HOVER = "arguments[0].dispatchEvent(new Event('pointerover', {bubbles: true}))"
CLICK = "arguments[0].dispatchEvent(new Event('click', {bubbles: true}))"


@pytest.fixture
def opened(driver, tmp_path):
    def load(name):
        path = tmp_path / f"{name}.html"
        path.write_text(page_of(name), encoding="utf-8")
        driver.get_log("browser")
        driver.get(path.as_uri())
        return lambda what, all=False: driver.execute_script(
            "const root = document.querySelector('[data-report]')?.shadowRoot || document;"
            f"return root.querySelector{'All' if all else ''}(arguments[0])",
            what,
        )

    yield load
    assert driver.get_log("browser") == []


def share(query, key):
    """Of layer 3, head 2 of the plain page's text of 12 tokens."""
    rows = patterns(4, 3, words(12)).set_index(["layer", "head", "query", "key"])["value"]
    return float(rows[3, 2, query, key])


def number(text):
    return float(re.search(r"\(([\d.]+)\)", text)[1])


def test_a_head_picked_on_either_map_is_opened(driver, opened):
    find = opened("plain")
    for figure in ("#map", "#heat"):
        for layer in ("3", "1"):
            driver.execute_script(CLICK, find(f"{figure} [data-row='{layer}'][data-column='2']"))
            assert find("#panels h3").text == f"Layer {layer}, head 2"


@pytest.mark.parametrize("without", [False, True])
def test_a_token_shows_its_row_with_the_sink_and_without(driver, opened, without):
    find = opened("plain")
    driver.execute_script(CLICK, find("#map [data-row='3'][data-column='2']"))
    if without:
        find("#without").click()
    driver.execute_script("arguments[0].focus()", find("#panels [role=option]"))
    ActionChains(driver).send_keys(Keys.END, Keys.ARROW_LEFT).perform()
    said, taken = find("#panels output").text, share(10, 0)
    assert said.startswith(f"Token 10 “{words(12)[10]}” looks most at ")
    looked = 10 if without else 0
    assert f"looks most at {looked} “" in said
    expected = share(10, looked) / (1 - taken) if without else taken
    assert number(said) == pytest.approx(expected, rel=0.06)  # two digits of a share in 8 bits
    assert (f"{100 * taken:.0f}% of its row taken out" in said) == without
    shades = driver.execute_script(
        "return [...arguments[0]].map(s => +s.style.getPropertyValue('--shade'))", find("#panels [role=option]", True)
    )
    assert (shades[0] == 0) == without
    assert shades[11] == 0  # a later token
    assert find("#panels .taken").text.startswith("Without the sink: " if without else "With the sink: ")


def test_colours_are_linear_or_logarithmic(driver, opened):
    find = opened("plain")
    pixels = "return arguments[0].toDataURL()"
    before = driver.execute_script(pixels, find("#panels canvas"))
    find("#log").click()
    assert driver.execute_script(pixels, find("#panels canvas")) != before


def test_two_heads_are_pinned_beside_each_other(driver, opened):
    find = opened("plain")
    driver.execute_script(CLICK, find("#map [data-row='0'][data-column='1']"))
    find("#panels button").click()
    driver.execute_script(CLICK, find("#map [data-row='3'][data-column='2']"))
    assert [h.text for h in find("#panels h3", True)] == ["Layer 3, head 2", "Layer 0, head 1"]
    driver.execute_script(HOVER, find("#panels article:last-child [role=option]:nth-child(5)"))
    assert [out.text.startswith("Token 4 “") for out in find("#panels output", True)] == [True, True]
    find("#panels article:last-child button").click()
    assert len(find("#panels h3", True)) == 1


def test_the_strip_and_the_text_go_together(driver, opened):
    find = opened("largest")
    driver.execute_script("arguments[0].focus()", find("#strip svg"))
    ActionChains(driver).send_keys(Keys.END, Keys.ARROW_DOWN, Keys.ARROW_LEFT).perform()
    assert find("#strip-readout").text.startswith("Position 8190 “")
    assert ", layer 1: " in find("#strip-readout").text
    assert find("#tokens .here").text.strip() == words(8192)[8190].strip()
    driver.execute_script(HOVER, find("#tokens [role=option]"))
    assert find("#strip-readout").text.startswith("Position 7692 “")  # of the last 500
    ActionChains(driver).send_keys(Keys.HOME).perform()
    assert find("#tokens .here").text == "<|im_start|>"


def test_a_definition_is_shown_and_taken_away(driver, opened):
    find = opened("plain")
    driver.execute_script("arguments[0].focus()", find(".term"))
    assert find("#definition").text.startswith("Mean attention that a query pays to the sink key")
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert not find("#definition").is_displayed()


def test_a_slider_turns_the_number_of_an_edit(driver, opened):
    find, edits = opened("evaluated"), {edit["name"]: edit for edit in ZOO["evaluated"]()["edits"]}
    driver.execute_script("arguments[0].focus()", find("#family-slider"))
    ActionChains(driver).send_keys(Keys.END).perform()
    name = "sink_window(size=64, sinks=1)"
    assert find("#edit-picker").get_property("value") == name
    placebo = next(edit for edit in edits.values() if edit["placebo_of"] == name)
    said = find("#family-readout").text
    for delta in (edits[name]["delta"], placebo["delta"]):
        assert f"{float(f'{delta:.3g}'):+g}" in said
    assert find("#loss-caption").text.endswith(name)


def test_placebos_without_rows_are_drawn_beside_their_edits(driver, opened):
    find = opened("beside")
    assert len(driver.find_elements("css selector", "td.drawn circle.placebo")) == 2
    assert "+0.125 ± 0.020" in find("table.edits").text
    driver.execute_script("arguments[0].focus()", find("#family-slider"))
    ActionChains(driver).send_keys(Keys.HOME).perform()
    assert "placebo +0.125" in find("#family-readout").text
    ActionChains(driver).send_keys(Keys.END).perform()
    assert "placebo" not in find("#family-readout").text


def test_a_token_shows_its_losses(driver, opened):
    find, text = opened("evaluated"), ZOO["evaluated"]()["texts"][0]
    driver.execute_script(HOVER, find("#tokens [role=option]:nth-child(31)"))
    clean, edited = (text["losses"][name][29] for name in ("none", "window(size=8)"))
    said = find("#loss-readout").text
    assert said.startswith(f"Position 30 “{words(400)[30]}”: loss {clean:g} unedited, {edited:g} edited; difference ")
    assert float(said.rpartition(" ")[2]) == pytest.approx(edited - clean, abs=0.006)


def test_compared_maps_are_taken_from_each_other(driver, opened):
    find = opened("compared")
    assert find("#difference-figure").is_displayed()
    picker = find("#other-picker")
    driver.execute_script("arguments[0].value = '3'; arguments[0].onchange()", picker)  # of one layer and head
    assert not find("#difference-figure").is_displayed()
    assert find("#unlike").is_displayed()


def test_maps_of_sweeps_have_colours_of_two_signs(driver, opened):
    """What costs nothing is grey, what costs most is warm; a colour is never missing."""
    find = opened("compared sweeps")
    cells = "[...document.querySelectorAll('#maps [role=gridcell]')].map(cell => cell.getAttribute('fill'))"
    fills = driver.execute_script(f"return {cells}")
    assert len(fills) == 2 * 6 * 8 + 9 * 8
    dearest, free = ([int(fill[at : at + 2], 16) for at in (1, 3, 5)] for fill in fills[:2])
    assert dearest[0] > dearest[2] + 100
    assert max(free) - min(free) < 20
    assert find("#difference-figure").is_displayed()


def test_the_fragment_works_and_is_left_alone(driver, opened):
    find = opened("snippet")
    driver.execute_script(CLICK, find("#map [data-row='3'][data-column='2']"))
    assert find("#panels h3").text == "Layer 3, head 2"
    assert np.allclose(
        driver.execute_script("return [...document.querySelectorAll('[data-report]')].map(h => !!h.shadowRoot)"), [1, 1]
    )
    assert driver.execute_script("return getComputedStyle(arguments[0]).color", find("h1")) != "rgb(128, 0, 128)"
    assert find("#heat svg").is_displayed()
