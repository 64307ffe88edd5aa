"""Sink masks: every rule against a loop over tokens, streams and interrupted runs, files and the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope import SinkscopeError
from sinkscope.cli import app
from sinkscope.masks import RULES
from tests.conftest import attempt
from tests.model.test_mechanism import median, norm, seen_by_hugging_face

IDS = {"a": [1, 5, 9, 9, 40, 33, 2, 17], "b": [1, 50, 3, 4, 60, 61, 7, 8, 9, 10, 11, 12]}
#: Thresholds at which some tokens of tiny random models are flagged and some are not.
EPS = {"attention": 0.35, "norm": 1.15, "massive": 4.0, "bos_cosine": 0.45, "first": 3}


def oracle(layers, eps):
    """Flagged positions by rule, and the first layer in which each shows: loops over layers, heads and tokens."""
    t, found = len(layers[0]["h"]), {name: {} for name in eps}
    norms = [[norm(h) for h in layer["h"]] for layer in layers]
    rises = [norms[i + 1][0] - norms[i][0] for i in range(len(layers) - 1)]
    rise = rises.index(max(rises)) + 1
    later = rises[rise:]
    fall = rise + 1 + later.index(min(later)) if later and min(later) < 0 else len(layers)
    for k in range(t):
        shares = [[np.mean([layer["A"][h, i, k] for i in range(k, t)]) for h in range(4)] for layer in layers]
        above = [[share > eps["attention"] for share in heads] for heads in shares]
        if np.mean(above) >= 0.1:
            found["attention"][k] = [any(heads) for heads in above].index(True)
        for place, layer in enumerate(layers):
            h, size = layer["h"][k], np.abs(layer["h"])
            if norms[place][k] > eps["norm"] * median(norms[place]):
                found["norm"].setdefault(k, place)
            if size[k].max() > 0.5 and size[k].max() >= eps["massive"] * median(size.flatten()):
                found["massive"].setdefault(k, place)
            cosine = float(h @ layer["h"][0]) / norm(h) / norm(layer["h"][0])
            if rise <= place < fall and abs(cosine) > eps["bos_cosine"]:
                found["bos_cosine"].setdefault(k, place)
        if k < eps["first"]:
            found["first"][k] = -1
    return found


@pytest.fixture(scope="module")
def masked(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinkscope.masks.MAGNITUDE", 0.5)
        return ss.sink_mask(tiny("llama"), IDS, list(RULES), eps=EPS)


def test_every_rule_flags_what_a_loop_flags(masked):
    some = dict.fromkeys(RULES, 0)
    for label, ids in IDS.items():
        expected = oracle(seen_by_hugging_face("llama", ids), EPS)
        for rule in RULES:
            rows = masked.only(rule).table()
            rows = rows[rows["text"] == label]
            assert rows["position"].tolist() == sorted(expected[rule]), rule
            assert masked.only(rule).by_text[label].nonzero().flatten().tolist() == sorted(expected[rule])
            some[rule] += len(rows)
        rows = masked.table()[masked.table()["text"] == label].set_index("position")
        for k, row in rows.iterrows():
            births = [expected[rule][k] for rule in RULES if k in expected[rule] and rule != "first"]
            assert row["layer"] == (min(births) if births else -1)
            assert row["rules"] == "+".join(rule for rule in RULES if k in expected[rule])
    assert all(0 < n < 20 for n in some.values()), some


def test_padded_masks_and_agreement(masked):
    for side, first in (("right", 0), ("left", 4)):
        mask, real = masked.padded(side)
        assert real.sum(1).tolist() == [8, 12]
        assert torch.equal(mask[0, first : first + 8], masked.by_text["a"])
        assert not bool(mask[~real].any())
    table = masked.agreement().set_index("rule")
    a, n = {rule: {(t, p) for t, p in masked.only(rule).table()[["text", "position"]].values.tolist()} for rule in RULES}, 20
    for rule in RULES:
        assert table.loc[rule, "tokens"] == len(a[rule])
        assert table.loc[rule, "share"] == pytest.approx(len(a[rule]) / n)
        for other in RULES:
            assert table.loc[rule, f"also_{other}"] == pytest.approx(len(a[rule] & a[other]) / len(a[rule]))
    assert table.loc["first 16 positions", "tokens"] == n


def test_the_attention_rule_lists_sink_positions(tiny):
    mask = ss.sink_mask(tiny("llama"), IDS)
    listed = ss.measure(tiny("llama"), IDS, ["sink_positions"]).sink_positions()
    assert {(t, p) for t, p in listed[["text", "key"]].values.tolist()} == {
        (t, p) for t, p in mask.table()[["text", "position"]].values.tolist()
    }


def test_layers_can_be_chosen(tiny):
    layers = seen_by_hugging_face("llama", IDS["a"])
    mask = ss.sink_mask(tiny("llama"), IDS["a"], "norm", layers=[2], eps=1.15)
    norms = [norm(h) for h in layers[2]["h"]]
    assert mask.table()["position"].tolist() == [k for k, n in enumerate(norms) if n > 1.15 * median(norms)]
    assert set(mask.table()["layer"]) == {2}


def test_a_stream_that_was_interrupted_goes_on(tiny, tmp_path, monkeypatch):
    from sinkscope.observing import Observing

    def stream(stop=None):
        for n in range(40):
            if n == stop:
                raise KeyboardInterrupt
            yield {"text": f"it is said {n} times, and {'on ' * (n % 5)}it goes"}

    monkeypatch.setattr("sinkscope.observing.PORTION", 1)
    monkeypatch.setattr("sinkscope.observing.PER_TEXT", 4)
    rules = {"by": ["attention", "norm"], "eps": {"norm": 1.2}, "batch_size": 4}
    whole = ss.sink_mask(tiny("llama"), stream(), **rules)
    with pytest.raises(KeyboardInterrupt):
        ss.sink_mask(tiny("llama"), stream(24), resume=tmp_path, **rules)
    ran, run = [], Observing._observer

    def counted(self, batch, *how):
        ran.append(len(batch.sequences))
        return run(self, batch, *how)

    monkeypatch.setattr(Observing, "_observer", counted)
    resumed = ss.sink_mask(tiny("llama"), stream(), resume=tmp_path, **rules)
    assert 0 < sum(ran) < 40
    assert resumed.flagged.equals(whole.flagged)
    assert resumed.lengths == whole.lengths
    resumed.save(tmp_path)
    again = ss.SinkMask.load(tmp_path)
    pd.testing.assert_frame_equal(again.flagged, whole.flagged)
    assert again.lengths == whole.lengths
    assert not (tmp_path / "unfinished").exists()


def test_a_mask_for_a_jsonl_file_in_four_lines(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("so it goes", "and on it goes, on")))
    from pathlib import Path

    model = tiny("llama")
    mask, real = ss.sink_mask(model, Path("corpus.jsonl"), by="norm", eps=1.2).padded()
    keep = real & ~mask
    assert 0 < int(keep.sum()) < int(real.sum())


def test_the_command_writes_a_row_per_flagged_token(saved_model, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("so it goes", "and on it goes, on")))
    command = ["mask", str(saved_model), "--file", str(tmp_path / "corpus.jsonl"), "--by", "attention", "--by", "norm=1.2"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "also by attention" in done.output
    written = pd.read_parquet(tmp_path / "out" / "mask.parquet")
    assert list(written.columns) == ["text", "position", "token", "layer", "rules", "attention", "norm"]
    assert len(written) > 0
    wrong = CliRunner().invoke(app, [*command, "--by", "norms"])
    assert wrong.exit_code == 1
    assert "did you mean 'norm'" in wrong.output
    assert CliRunner().invoke(app, [*command, "--by", "norm=much"]).exit_code == 1


def test_bad_input_is_refused_by_name(tiny):
    llama = tiny("llama")
    words = {
        "did you mean 'norm'": lambda: ss.sink_mask(llama, IDS, "norms"),
        "of which rule?": lambda: ss.sink_mask(llama, IDS, ["norm", "first"], eps=3),
        "unknown rule in eps 'first'": lambda: ss.sink_mask(llama, IDS, "norm", eps={"first": 3}),
        "7 is no layer": lambda: ss.sink_mask(llama, IDS, layers=[7]),
        "layers=[]": lambda: ss.sink_mask(llama, IDS, layers=[]),
        "by=[]": lambda: ss.sink_mask(llama, IDS, []),
        "no hook points": lambda: ss.sink_mask(ss.testing.tiny_hf_model("llama"), IDS, "norm"),
        "unknown side": lambda: ss.sink_mask(llama, IDS, "first").padded("both"),
        "unknown rule in this mask": lambda: ss.sink_mask(llama, IDS, "first").only("norm"),
        "no whole mask": lambda: ss.SinkMask.load("/nowhere"),
    }
    for expected, call in words.items():
        found = attempt(call)
        assert isinstance(found, SinkscopeError), expected
        assert expected in str(found)


@pytest.mark.model
def test_smollm2s_sinks_are_its_bos_and_some_words_later(smollm2):
    """Every rule takes BOS, a hundred times as long as the median token; attention also takes tokens that come later."""
    import pydoc_data.topics

    prose = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    texts = [prose[start : start + 600] for start in (0, 10_000, 30_000, 40_000)]
    mask = ss.sink_mask(smollm2, texts, ["attention", "norm", "massive", "bos_cosine"], max_tokens=64)
    bos = mask.table().query("position == 0")
    assert (bos["rules"] == "attention+norm+massive+bos_cosine").all()
    assert len(bos) == 4
    assert bos["norm"].between(120, 260).all()
    later = mask.only("attention").table().query("position > 0")
    assert len(later) > 0
    assert (later["attention"] < bos["attention"].min()).all()
