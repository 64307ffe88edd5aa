"""The page as a file: what is in it, what can't be, and how large it gets. How it behaves: tests/browser."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.errors import SinkscopeError
from sinkscope.reports import page
from sinkscope.reports.page.pack import pack, unpack
from sinkscope.testing import tiny_model
from tests.browser.zoo import swept
from tests.synthetic import HOSTILE, causal_attention, mass, profile, report, uniform, words


def render(*given):
    """A measurement's page."""
    return page.render(page.measured(*given))


def named(attention, tokens):
    return attention.assign(key_token=attention["key"].map(lambda key: tokens[key]))


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
    return render(frame, summary, meta, named(causal_attention(5), words(5)))


@pytest.fixture(scope="module")
def parsed(rendered):
    return Page(rendered)


def test_sentences_and_key_numbers(parsed):
    assert "An average query pays 48% of its attention to the first token." in parsed.text
    row = re.search(
        r"sink_mass \(share of attention\)Mean attention[^\n]*1\.(0\.\d{3})(0\.\d{3}) to (0\.\d{3})(0\.\d{3})\n", parsed.text
    )
    value, half = mass(1.5, 1, 1), 4.302653 * 0.02  # t for two degrees of freedom
    null = np.mean([uniform(n)[0] for n in (12, 80, 30)])
    assert [float(x) for x in row.groups()] == pytest.approx([value, value - half, value + half, null], abs=6e-4)


def test_notes_stand_above_the_numbers_and_not_among_the_facts():
    """Written by hand into a report of each kind: escaped, in the page, the fragment, JSON and Markdown."""
    frame, summary, meta = report({"a": words(8)})
    note = "the texts have 5 to 1,265 tokens <b>"
    data = page.measured(frame, summary, meta | {"notes": [note]})
    assert data["notes"] == [note]
    assert note not in [value for _, value in data["facts"]]
    shown = page.render(data)
    assert shown.index("the texts have 5 to 1,265 tokens &lt;b&gt;</li>") < shown.index("All numbers")
    assert "Note: the texts have 5 to 1,265 tokens" in page.markdown(data)
    assert 'class="notes"' not in page.render(page.measured(frame, summary, meta))


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
    layers = unpack(essay["profiles"]["position_profile"]["layers"])
    np.testing.assert_allclose(layers[2], profile(80, mass(2, 1, 1)), rtol=5e-4)
    np.testing.assert_allclose(essay["profiles"]["position_profile"]["null"], uniform(80), rtol=5e-3)
    assert parsed.data["bands"]["sink_mass"]["name"] == "range of 3 texts"


@pytest.mark.parametrize("column", [True, False])
def test_names_of_the_attention_picture(column):
    attention = causal_attention(3)
    if column:
        attention = attention.assign(key_token=attention["key"].map(lambda key: "abc"[key]))
    html = Page(render(*report({"a": words(10)}), attention))
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
        return render(frame, summary, meta, named(causal_attention(5), tokens))

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
    html = render(noisy(frame), summary, meta)
    assert len(Page(html).data["texts"]) == 5
    assert len(html.encode()) < 5e6


@pytest.mark.parametrize(("numbers", "shown"), [(1_000_000, 8), (1000, 4), (1, 1)])
def test_large_models_and_long_texts_leave_room_for_fewer(monkeypatch, numbers, shown):
    # a text here has 4 layers x (3 heads x 3 metrics + 50 tokens)
    monkeypatch.setattr("sinkscope.reports.page.data.MOST_NUMBERS", numbers)
    html = render(*report({f"text {i}": words(50) for i in range(12)}))
    data = Page(html).data
    assert len(data["texts"]) == shown
    assert set(data["cells"]["sink_mass"]) == {"all", *(f"text {i}" for i in range(shown))}
    assert f"the first {shown} of 12" in html


def test_long_texts_are_cut_with_a_note():
    html = Page(render(*report({"long": words(8300)}, layers=2, heads=2, metrics=["sink_mass"])))
    text = html.data["texts"][0]
    assert (text["count"], len(text["tokens"])) == (8300, 8192)
    assert text["profiles"]["position_profile"]["layers"]["shape"] == [2, 8192]


@pytest.mark.parametrize(
    ("kept", "sections"),
    [
        (["sink_mass"], {"summary", "numbers", "inside", "how"}),
        (["position_profile"], {"summary", "where", "how"}),
        (["received_profile", "sink_positions"], {"summary", "where", "sinks", "how"}),
        ([], {"summary", "how"}),
    ],
)
def test_metrics_that_were_not_measured_are_left_out(kept, sections):
    frame, summary, meta = report({"a": words(10)})
    html = Page(render(frame[frame["metric"].isin(kept)], summary[summary["metric"].isin(kept)], meta))
    shown = {attributes["id"] for attributes in html.all("h2")}
    assert shown == sections


def test_with_next_to_nothing_known():
    frame, summary, _ = report({"a": words(10)})
    assert "Attention sinks in a model" in render(frame.iloc[:0], summary.iloc[:0], {})


def test_the_same_report_gives_the_same_page(rendered):
    frame, summary, meta = report({"one-liner": words(12), "essay": words(80), "code": words(30)})
    assert render(frame, summary, meta, named(causal_attention(5), words(5))) == rendered


# --- numbers as bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (16, 2e-4)])
def test_packed_shares_come_back(bits, error):
    shares = np.concatenate([np.logspace(-3.9, 0, 500), [0.0, 1.0, np.nan]]).reshape(1, -1)
    back = unpack(pack(shares, bits))
    np.testing.assert_allclose(back, shares, rtol=error)
    assert back.shape == shares.shape


def patterns_of(layers, heads, length, sink=0.6):
    """Every head pays a share of its own to key 0, and the rest evenly."""
    parts = []
    for layer in range(layers):
        for head in range(heads):
            rows = causal_attention(length, sink * (1 + layer) * (1 + head) / (layers * heads))
            parts.append(rows.assign(layer=layer, head=head, query_token=[f"t{q}" for q in rows["query"]]))
    return pd.concat(parts, ignore_index=True)


def test_patterns_are_packed_head_by_head():
    frame, summary, meta = report({"a": words(10)}, layers=2, heads=2)
    shown = page.measured(frame, summary, meta, None, patterns_of(2, 2, 6).sample(frac=1, random_state=0))["patterns"]
    assert shown["tokens"] == [f"t{i}" for i in range(6)]
    assert (shown["layers"], shown["heads"], shown["causal"], shown["sinks"]) == ([0, 1], [0, 1], True, [0, 1])
    values = unpack(shown["value"])
    assert values.shape == (4, 21)
    np.testing.assert_allclose(values[3, 15:], [0.6, *[0.4 / 5] * 5], rtol=0.02)  # layer 1, head 1, the last query
    np.testing.assert_allclose(values[0, 1:3], [0.15, 0.85], rtol=0.02)


def test_patterns_of_270_heads_at_64_tokens_add_at_most_1_5_megabytes():
    frame, summary, meta = report({"a": words(10)})
    given = patterns_of(1, 1, 64)
    pairs = len(given)
    whole = pd.concat([given] * 270, ignore_index=True)
    whole["layer"], whole["head"] = np.divmod(np.repeat(np.arange(270), pairs), 9)
    whole["value"] = np.random.default_rng(0).uniform(size=len(whole))
    without, added = render(frame, summary, meta), render(frame, summary, meta, None, whole)
    assert len(added.encode()) - len(without.encode()) < 1.5e6


# --- the other exits, and the pages of other reports ------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    frame, summary, meta = report({"one": words(12), "two": words(20)}, model="a|b*<i>")
    return page.measured(frame, summary, meta, None, patterns_of(4, 3, 5))


def test_json_is_the_dictionary(measured):
    assert json.loads(page.as_json(measured)) == json.loads(json.dumps(measured))
    assert measured["schema_version"] == page.SCHEMA_VERSION


def test_every_key_is_documented(measured):
    schema = (Path(__file__).parents[2] / "docs" / "report_schema.md").read_text(encoding="utf-8")
    effects = evaluated()

    def keys(of, found):
        for key, value in of.items() if isinstance(of, dict) else []:
            found.add(key)
            inner = value if isinstance(value, list) else [value]
            for one in inner[:2] if key not in FREE else []:
                keys(one, found)
        return found

    for data in (measured, effects, page.compared({"a": effects, "b": effects})):
        missing = {key for key in keys(data, set()) if f"`{key}`" not in schema}
        assert not missing


#: Keys whose own keys are names of metrics, texts or edits.
FREE = {"names", "definitions", "cells", "bands", "profiled", "profiles", "losses", "stretches"}


def test_markdown_has_the_numbers_and_no_markup_of_others(measured):
    lines = page.markdown(measured).splitlines()
    assert lines[0] == r"## Attention sinks in a\|b\*\<i\>"
    (row,) = [line for line in lines if line.startswith(r"| sink\_mass (")]
    assert row.count(" | ") == 3
    assert all(line.count("|") - line.count(r"\|") == 5 for line in lines if line.startswith("| "))


def test_the_snippet_is_a_shadow_root_of_its_own(measured):
    parsed = Page(page.snippet(measured))
    assert [tag for tag, _ in parsed.elements[:2]] == ["div", "template"]
    assert "attachShadow" in parsed.scripts[1]
    assert not {"html", "head", "body", "link"} & {tag for tag, _ in parsed.elements}


def edits_table(delta=0.5):
    """Losses of three edits and one placebo, on one text of 40 tokens."""
    names = [
        "none",
        "sink_window(size=8, sinks=1)",
        "sink_window(size=16, sinks=1)",
        str(ss.SinkWindow(8, sinks=1).placebo()),
    ]
    summary = pd.DataFrame({"intervention": names, "tokens": 39, "loss": 3.0, "perplexity": 20.0, "kl": 0.1})
    summary = summary.assign(delta_loss=[0, delta, delta / 2, 0.1], low=-0.1, high=1.0, top1_agreement=0.5)
    summary = summary.assign(sink_mass=[0.6, 0.5, np.nan, 0.1], sink_position=pd.array([0, 0, None, 3], dtype="Int64"))
    summary["sink_token"] = ["<s>", "<s>", "", "<script>"]
    curves = [
        pd.DataFrame({"text": "a", "intervention": n, "position": range(1, 40), "loss": 3 + i * np.linspace(0, 1, 39)})
        for i, n in enumerate(names)
    ]
    about = {"model": "toy", "texts": [{"label": "a", "n_tokens": 40, "tokens": words(40)}], "interval": "95%, Student's t"}
    about["placebos"] = {names[3]: names[1]}
    return summary, pd.concat(curves, ignore_index=True), about


def evaluated(delta=0.5):
    return page.evaluated(*edits_table(delta))


def test_the_data_of_edits():
    data = evaluated()
    names = [edit["name"] for edit in data["edits"]]
    assert names.index(str(ss.SinkWindow(8, sinks=1).placebo())) == names.index("sink_window(size=8, sinks=1)") + 1
    by = {edit["name"]: edit for edit in data["edits"]}
    placebo = str(ss.SinkWindow(8, sinks=1).placebo())
    assert by[placebo]["placebo_of"] == "sink_window(size=8, sinks=1)"
    assert by["sink_window(size=16, sinks=1)"]["sink_mass"] is None
    (family,) = data["families"]
    assert (family["over"], family["values"], family["placebos"]) == ("size", [8.0, 16.0], [placebo, None])
    text = data["texts"][0]
    assert (text["first"], len(text["losses"]["none"]), text["tokens"][0]) == (1, 39, "<|im_start|>")
    stretch = text["stretches"]["sink_window(size=8, sinks=1)"]
    assert stretch["edges"][0] == [1, 10]
    assert stretch["low"][0] < stretch["mean"][0] < stretch["high"][0]
    assert (
        "raises the loss by 0.500 nats per token (95% interval -0.100 to +1.000); its placebo changes it by +0.100"
        in data["sentences"][0]
    )


def test_the_page_of_edits():
    parsed = Page(page.render(evaluated()))
    assert "<script>" in parsed.text
    assert len(parsed.scripts) == 2


def test_reports_of_one_kind_are_compared(measured):
    data = page.compared({"a": evaluated(0.5), "b": evaluated(0.7)})
    assert [cell["delta"] for cell in data["rows"][1]["in"]] == [0.5, 0.7]
    html = Page(page.render(page.compared({"a": measured, "<b>": measured})))
    assert not html.all("b")
    assert "patterns" not in html.data["reports"][0]
    for wrong in ({"a": measured}, {"a": measured, "b": evaluated()}):
        with pytest.raises(SinkscopeError):
            page.compared(wrong)


def test_sweeps_are_compared():
    one, other = swept(), swept(layers=7)
    data = page.compared({"a": one, "b": other})
    assert data["reports"][0]["cells"]["delta"]["all"] == {
        "value": one["cells"]["all"]["delta"],
        "null": one["cells"]["all"]["placebo_delta"],
    }
    first = data["rows"][0]
    assert first["of"] in ("layer 5, head 7", "layer 6, head 7", "layer 0, head 0")
    assert len(data["rows"]) == 24
    row = next(row for row in data["rows"] if row["of"] == "layer 6, head 7")
    assert row["in"][0] is None
    assert row["in"][1]["delta"] == other["cells"]["all"]["delta"][6][7]
    assert "The places that cost most in one of the reports." in page.render(data)


# --- patterns: from a model, in a saved report ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_patterns_average_to_the_attention_map(family):
    model = tiny_model(family)
    found = ss.attention_patterns(model, "so it goes on and on")
    expected = ss.attention_map(model, "so it goes on and on").set_index(["query", "key"])["value"]
    mean = found.groupby(["query", "key"])["value"].mean()
    np.testing.assert_allclose(mean, expected[mean.index], atol=1e-6)
    assert (expected[~expected.index.isin(mean.index)] == 0).all()  # what a causal query can't see
    np.testing.assert_allclose(found.groupby(["layer", "head", "query"])["value"].sum(), 1, atol=1e-5)
    assert found["query_token"][0] == ss.attention_map(model, "so it goes on and on")["query_token"][0]


def test_many_heads_leave_room_for_fewer_tokens(monkeypatch):
    model = tiny_model("llama")
    heads = len(ss.attention_patterns(model, "so it goes").groupby(["layer", "head"]))
    monkeypatch.setattr("sinkscope.attention.MOST_NUMBERS", heads * 6)
    assert ss.attention_patterns(model, "so it goes on and on")["query"].max() == 2  # three tokens have six pairs
    with pytest.raises(SinkscopeError, match="one text at a time; got 2"):
        ss.attention_patterns(model, ["so", "it goes"])


def test_patterns_are_saved_and_read_back(tmp_path):
    model = tiny_model("llama")
    report = replace(ss.measure(model, "so it goes", ["sink_mass"]), patterns=ss.attention_patterns(model, "so it goes"))
    report.save(tmp_path)
    back = ss.load_report(tmp_path)
    pd.testing.assert_frame_equal(back.patterns, report.patterns)
    assert not (tmp_path / "patterns.csv").exists()
    assert back.json() == report.json()
    assert back.page() == (tmp_path / "report.html").read_text(encoding="utf-8")
    replace(report, patterns=None).save(tmp_path)
    assert ss.load_report(tmp_path).patterns is None


@pytest.mark.parametrize("kind", ["measure", "evaluate"])
def test_reports_of_0_1_0_still_give_a_page(kind):
    report = ss.load_report(Path(__file__).parents[1] / "data" / "saved" / "0.1.0" / kind)
    assert Page(report.page()).data["kind"] == kind
    assert len(report.markdown().splitlines()) > 5
