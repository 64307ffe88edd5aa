"""The page as a file: what is in it, what can't be, and how large it gets. How it behaves: tests/browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sinkscope.reports import page
from tests.synthetic import HOSTILE, causal_attention, mass, profile, report, uniform, words


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts, tables and headings."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def rendered():
    frame, summary, meta = report({"one-liner": words(12), "essay": words(80), "code": words(30)})
    return page.render(frame, summary, meta, causal_attention(5), words(5))


@pytest.fixture(scope="module")
def parsed(rendered):
    return Page(rendered)


def test_sentences_and_key_numbers(parsed):
    assert "An average query pays 48% of its attention to the first token." in parsed.text
    row = re.search(r"sink_mass \(share of attention\)(0\.\d{3})(0\.\d{3}) to (0\.\d{3})(0\.\d{3})\n", parsed.text)
    value, half = mass(1.5, 1, 1), 4.302653 * 0.02  # t for two degrees of freedom
    null = np.mean([uniform(n)[0] for n in (12, 80, 30)])
    assert [float(x) for x in row.groups()] == pytest.approx([value, value - half, value + half, null], abs=6e-4)


def test_how_it_was_measured(parsed):
    for fact in ("the only one there is", "float32", "BOS was put first, as the model's tokenizer does.", "0.1.0"):
        assert fact in parsed.text
    assert "causal attentionyes" in parsed.text
    assert "argument: key0, 1\nargument: max_tokensnone" in parsed.text


def test_cells_hold_value_null_and_error(parsed):
    cells = parsed.data["cells"]["sink_mass"]
    expected = mass(np.arange(4)[:, None], np.arange(3)[None, :], 0)
    np.testing.assert_allclose(cells["one-liner"]["value"], expected, rtol=5e-3)
    assert cells["one-liner"]["null"] == pytest.approx(uniform(12)[0], rel=5e-3)  # one number for all cells
    assert cells["one-liner"]["std_error"] is None
    assert cells["all"]["std_error"] == pytest.approx(0.01 / 3**0.5, rel=5e-3)


def test_profiles_and_bands(parsed):
    essay = parsed.data["texts"][1]
    assert essay["label"] == "essay"
    np.testing.assert_allclose(essay["profiles"]["position_profile"]["layers"][2], profile(80, mass(2, 1, 1)), rtol=5e-3)
    np.testing.assert_allclose(essay["profiles"]["position_profile"]["null"], uniform(80), rtol=5e-3)
    assert parsed.data["bands"]["sink_mass"]["name"] == "range of 3 texts"


@pytest.mark.parametrize("column", [True, False])
def test_names_of_the_attention_picture(column):
    attention = causal_attention(3)
    if column:
        attention = attention.assign(key_token=attention["key"].map(lambda key: "abc"[key]))
    html = Page(page.render(*report({"a": words(10)}), attention))
    assert html.data["attention"]["tokens"] == (["a", "b", "c"] if column else ["0", "1", "2"])
    assert html.data["attention"]["value"] == [[1.0, None, None], [0.6, 0.4, None], [0.6, 0.2, 0.2]]


def test_sinks_are_listed_with_their_token(parsed):
    assert "one-liner0<|im_start|>0.75" in parsed.text.replace("\n", "")


def test_accessible_structure(parsed):
    assert parsed.all("html")[0]["lang"] == "en"
    headings = [tag for tag, _ in parsed.elements if tag in ("h1", "h2")]
    assert headings.count("h1") == 1
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in parsed.all("th"))
    assert all(attributes["aria-live"] == "polite" for attributes in parsed.all("output"))
    identifiers = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    pointed_at = [value for _, attributes in parsed.elements if (value := attributes.get("aria-labelledby"))]
    assert pointed_at
    assert set(pointed_at) <= set(identifiers)


def test_nothing_is_loaded(rendered, parsed):
    for _, attributes in parsed.elements:
        assert not {"src", "srcset", "action", "formaction", "poster"} & set(attributes)
        assert (attributes.get("href") or "data:").startswith("data:")
    assert not re.search(r"@import|url\(|\bimport\s*\(|fetch\(|XMLHttpRequest|WebSocket", rendered)
    assert set(re.findall(r"https?://[^\s\"'<]*", rendered)) <= {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert re.search(r"script-src 'sha256-[\w+/=]+'$", policy)


def test_the_script_writes_text_only(parsed):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", parsed.scripts[1])


class TestHostile:
    """Whatever is in a token, a label, a model's name or a sentence stays text."""

    @pytest.fixture(scope="class")
    def html(self):
        label = "</script><script>alert(3)</script><b>"
        frame, summary, meta = report({label: [*HOSTILE, *words(6)], "\x00&\u202e": words(5)}, model="<i>$m</i>\u2028")
        meta["sentences"]["evil"] = "<img src=x onerror=alert(4)>"
        meta["arguments"]["evil"] = {"</table>": "<svg onload=alert(5)>"}
        tokens = HOSTILE[:5]
        return page.render(frame, summary, meta, causal_attention(5), tokens)

    def test_no_element_comes_of_it(self, html):
        parsed = Page(html)
        assert len(parsed.scripts) == 2
        assert not parsed.all("img") + parsed.all("b") + parsed.all("i") + parsed.all("svg")
        assert not any(key.startswith("on") for _, attributes in parsed.elements for key in attributes)
        assert "<img src=x onerror=alert(4)>" in parsed.text
        assert "Attention sinks in <i>$m</i>⟨U+2028⟩" in parsed.text

    def test_json_is_inert_inside_html(self, html):
        island = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
        assert not re.search("[<>&\u2028\u2029]", island)
        text = json.loads(island)["texts"][0]
        assert text["tokens"][0] == HOSTILE[0]
        assert text["tokens"][3:8] == ["a⟨U+2028⟩b", "⟨U+202E⟩evil", "⟨U+0000⟩", "↵\n", "⟨U+D800⟩"]

    def test_it_can_be_written_as_utf8_and_hides_nothing(self, html):
        assert html.encode()
        assert not [character for character in html if not character.isprintable() and character != "\n"]

    def test_templates_in_tokens_are_not_run(self, html):
        assert "{{ 7*7 }}" in json.loads(Page(html).scripts[0])["texts"][0]["tokens"]


METRICS = ["sink_mass", "sink_mass_excess", "visible_sink_mass", "received", "last_row_share", "row_entropy"]
METRICS += ["normalized_row_entropy", "effective_keys", "row_deficit", "sink_rate@0.3", "sink_rate@0.8"]
METRICS += ["visible_sink_rate@0.3", "visible_sink_rate@0.8"]


def noisy(frame):
    return frame.assign(value=frame["value"] * np.random.default_rng(0).uniform(0.5, 1.5, len(frame)))


def test_thirty_layers_nine_heads_five_texts_stay_below_5_megabytes():
    frame, summary, meta = report({f"text {i}": words(1000) for i in range(5)}, 30, 9, METRICS)
    html = page.render(noisy(frame), summary, meta)
    assert len(Page(html).data["texts"]) == 5
    assert len(html.encode()) < 5e6


@pytest.mark.parametrize(("numbers", "shown"), [(1_000_000, 8), (1000, 4), (1, 1)])
def test_large_models_and_long_texts_leave_room_for_fewer(monkeypatch, numbers, shown):
    monkeypatch.setattr("sinkscope.reports.page.report.MOST_NUMBERS", numbers)  # a text here has 4 layers x (3 heads x 3 metrics + 50 tokens)
    html = page.render(*report({f"text {i}": words(50) for i in range(12)}))
    data = Page(html).data
    assert len(data["texts"]) == shown
    assert set(data["cells"]["sink_mass"]) == {"all", *(f"text {i}" for i in range(shown))}
    assert f"the first {shown} of 12" in html


def test_long_texts_are_cut_with_a_note():
    html = Page(page.render(*report({"long": words(1500)}, layers=2, heads=2)))
    text = html.data["texts"][0]
    assert (text["count"], len(text["tokens"]), len(text["profiles"]["position_profile"]["mean"])) == (1500, 1200, 1200)


@pytest.mark.parametrize(
    ("kept", "sections"),
    [
        (["sink_mass"], {"summary", "numbers", "inside", "how"}),
        (["position_profile"], {"summary", "numbers", "inside", "where", "how"}),
        (["received_profile", "sink_positions"], {"summary", "numbers", "inside", "where", "sinks", "how"}),
        ([], {"summary", "numbers", "inside", "how"}),
    ],
)
def test_metrics_that_were_not_measured_are_left_out(kept, sections):
    frame, summary, meta = report({"a": words(10)})
    html = Page(page.render(frame[frame["metric"].isin(kept)], summary[summary["metric"].isin(kept)], meta))
    shown = {attributes["id"] for attributes in html.all("h2")}
    assert shown == sections
    hidden = [attributes for attributes in html.all("section") if "hidden" in attributes]
    assert len(hidden) == (not kept)


def test_with_next_to_nothing_known():
    frame, summary, _ = report({"a": words(10)})
    assert "Attention sinks in a model" in page.render(frame.iloc[:0], summary.iloc[:0], {})


def test_the_same_report_gives_the_same_page(rendered):
    frame, summary, meta = report({"one-liner": words(12), "essay": words(80), "code": words(30)})
    assert page.render(frame, summary, meta, causal_attention(5), words(5)) == rendered
