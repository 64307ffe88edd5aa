"""Which queries count: every rule against a loop over rows, and the null over the same queries."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import sinkscope as ss
from sinkscope import SinkscopeError
from tests.conftest import attempt, play, table, total

METRICS = ["sink_mass", "sink_mass_excess", "sink_rate@0.3", "row_entropy", "head_profile", "row_deficit"]


def random_patterns(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for t in lengths:
        scores = np.where(np.tril(np.ones((t, t))) > 0, rng.normal(size=(2, 3, t, t)) * 2, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        made.append(shares / shares.sum(-1, keepdims=True))
    return made


def slow(pattern, counted):
    """Averages over the queries that count, row by row: per layer and head."""
    t = pattern.shape[-1]
    rows = [i for i in range(t) if counted[i]]
    later = [i for i in rows if i >= 1]
    mass = np.mean([pattern[..., i, 0] for i in rows], axis=0)
    entropy = [
        -np.sum(np.where(pattern[..., i, :] > 0, pattern[..., i, :] * np.log(pattern[..., i, :] + 1e-300), 0), -1)
        for i in rows
    ]
    return {
        "sink_mass": mass,
        "sink_mass_excess": np.mean([pattern[..., i, 0] - 1 / (i + 1) for i in later], axis=0),
        "sink_rate@0.3": (mass > 0.3).astype(float),
        "row_entropy": np.mean(entropy, axis=0),
        "head_profile": np.mean([pattern[..., i, :] for i in rows], axis=0),
    }


def uniform(t):
    return np.tril(np.ones((t, t))) / np.arange(1, t + 1)[:, None]


@pytest.fixture(scope="module")
def compared():
    patterns = random_patterns(9, 13)
    counted = [np.random.default_rng(i).random(len(p[0, 0])) < 0.5 for i, p in enumerate(patterns)]
    report = play(patterns, METRICS, where=[torch.tensor(c) for c in counted], compare=True)
    return patterns, counted, report


@pytest.mark.parametrize("suffix", ["", "[others]"])
def test_means_and_nulls_are_over_the_queries_that_count(compared, suffix):
    patterns, counted, report = compared
    for text, (pattern, chosen) in enumerate(zip(patterns, counted, strict=True)):
        chosen = ~chosen if suffix else chosen
        null = slow(np.broadcast_to(uniform(len(chosen)), pattern.shape), chosen)
        for name, value in slow(pattern, chosen).items():
            assert table(report, name + suffix, f"text {text}") == pytest.approx(value, abs=1e-6)
            assert table(report, name + suffix, f"text {text}", "null") == pytest.approx(null[name], abs=1e-6)
        assert total(report, "where_share" + suffix, f"text {text}") == pytest.approx(chosen.mean())


def test_the_difference_is_paired_within_texts(compared):
    patterns, counted, report = compared
    gaps = [p[..., c, 0].mean() - p[..., ~c, 0].mean() for p, c in zip(patterns, counted, strict=True)]
    row = report.intervals().set_index("metric").loc["sink_mass[difference]"]
    assert row["value"] == pytest.approx(np.mean(gaps), abs=1e-6)
    assert row["std_error"] == pytest.approx(np.std(gaps, ddof=1) / np.sqrt(2), abs=1e-6)
    assert row["low"] < row["value"] < row["high"]


def test_a_function_of_a_block_chooses_by_layer():
    (pattern,) = random_patterns(11)

    def sharp(block):
        return block.pattern.amax(-1).mean(1) > 0.6

    report = play([pattern], ["sink_mass"], where=sharp)
    chosen = pattern.max(-1).mean(1) > 0.6
    assert 0 < chosen.sum() < chosen.size
    expected = [pattern[layer][:, chosen[layer], 0].mean(-1) for layer in range(2)]
    null = [uniform(11)[chosen[layer], 0].mean() for layer in range(2)]
    assert table(report, "sink_mass") == pytest.approx(np.array(expected), abs=1e-6)
    assert table(report, "sink_mass", column="null") == pytest.approx(np.repeat(null, 3).reshape(2, 3))
    assert table(report, "where_share") == pytest.approx(chosen.mean(-1))


def test_all_queries_give_the_numbers_of_none_chosen(llama):
    texts = ["the quick brown fox", "so it goes"]
    plain = ss.measure(llama, texts, ["sink_mass", "row_entropy", "sink_strength", "first_to_rest_ratio"])
    every = ss.measure(llama, texts, plain.metrics, where=ss.where.positions(None))
    rows = every.frame[every.frame["metric"] != "where_share"].reset_index(drop=True)
    assert rows["value"].to_numpy() == pytest.approx(plain.frame["value"].to_numpy(), abs=1e-7)
    assert rows["null"].to_numpy() == pytest.approx(plain.frame["null"].to_numpy())


def losses(model, ids):
    with torch.no_grad():
        logits = model.original_model(ids[None]).logits[0]
    return cross_entropy(logits[:-1], ids[1:], reduction="none")


@pytest.mark.parametrize("engine", ["flash", "hooks"])
def test_queries_whose_next_token_is_hard(llama, engine):
    texts = {"a": "the quick brown fox", "b": "so it goes on"}
    report = ss.measure(
        llama, texts, ["query_profile", "sink_mass"], where=ss.where.next_loss(above=3.5), compare=True, engine=engine
    )
    whole = ss.measure(llama, texts, ["query_profile"], engine=engine)
    for label, text in texts.items():
        ids = llama.to_tokens(text)[0]
        hard = (losses(llama, ids) > 3.5).numpy()
        assert 0 < hard.sum() < len(hard)
        rows = whole.frame[whole.frame["text"] == label].sort_values(["layer", "head", "query"])["value"]
        by_query = rows.to_numpy(float).reshape(3, 4, len(ids))[..., :-1]
        assert table(report, "sink_mass", label) == pytest.approx(by_query[..., hard].mean(-1), abs=1e-6)
        assert table(report, "sink_mass[others]", label) == pytest.approx(by_query[..., ~hard].mean(-1), abs=1e-6)
        seen = report.frame[(report.frame["text"] == label) & (report.frame["metric"] == "query_profile")]["query"]
        assert sorted(seen.unique()) == np.flatnonzero(hard).tolist()


def test_next_losses_in_pieces(llama, monkeypatch):
    from sinkscope.capture import losses as module
    from sinkscope.models import adapt

    adapter = adapt(llama)
    tokens = adapter.tokenize(["the quick brown fox", "so it goes on"])
    (batch,) = tokens.batches(8)
    assert len(batch.sequences) == 2
    monkeypatch.setattr(module, "rows_at_a_time", lambda *_: 3)
    found = module.next_losses(adapter, batch)
    for row, s in enumerate(batch.sequences):
        assert found[row, : len(s) - 1] == pytest.approx(losses(llama, s.ids), abs=1e-5)
        assert bool(found[row, len(s) - 1 :].isnan().all())


def test_queries_whose_next_token_is_hard_in_a_chunked_prefill(llama):
    """A batch of 20 and 11 tokens: the shorter text ends two chunks before the longer one."""
    how = {"metrics": ["sink_mass", "query_profile"], "where": ss.where.next_loss(above=3.5), "engine": "hooks"}
    texts = ["the quick brown fox", "so it goes"]
    whole, chunked = (ss.measure(llama, texts, chunk=chunk, **how) for chunk in (None, 4))
    assert chunked.about["arguments"]["chunk"] == 4
    assert 0 < whole.summary("all").set_index("metric").loc["where_share", "value"] < 1
    np.testing.assert_allclose(chunked.frame["value"], whole.frame["value"], atol=1e-6)


def test_tokens_and_positions(llama):
    text = "so it goes so it"
    strings = ["", *text]
    profile = ss.measure(llama, text, ["query_profile"]).frame.query("text == 'all' and layer == 0 and head == 0")["value"]
    for rule, chosen in (
        (ss.where.tokens("o", " "), [c in ("o", " ") for c in strings]),
        (ss.where.tokens(str.isspace, next=True), [c.isspace() for c in strings[1:]] + [False]),
        (ss.where.positions(3, -2), [3 <= i < len(strings) - 2 for i in range(len(strings))]),
    ):
        report = ss.measure(llama, text, ["sink_mass"], where=rule)
        assert report.about["arguments"]["where"] == repr(rule)
        assert table(report, "sink_mass", "all")[0, 0] == pytest.approx(profile.to_numpy()[chosen].mean(), abs=1e-6)


def test_padded_booleans_follow_padded_ids(llama):
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [5, 9, 7, 8, 4, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    counted = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).bool()
    padded = ss.measure(llama, ids, ["sink_mass"], attention_mask=mask, where=counted)
    encoded = ss.measure(llama, {"input_ids": ids, "attention_mask": mask}, ["sink_mass"], where=counted)
    alone = ss.measure(llama, [ids[0, 2:], ids[1]], ["sink_mass"], where=[counted[0, 2:], counted[1]])
    assert padded.frame.equals(alone.frame)
    assert encoded.frame.equals(alone.frame)


def test_what_has_no_meaning_is_refused_by_name(llama, tiny):
    rule = ss.where.positions(2, None)
    words = {
        "received_profile averages over all queries": lambda: ss.measure(llama, "so it", ["received_profile"], where=rule),
        "say which, where=": lambda: ss.measure(llama, "so it", compare=True),
        "6 tokens, BOS included": lambda: ss.measure(llama, "so it", where=[True, False]),
        "one boolean per token": lambda: ss.measure(llama, "so it", where=[[1.0] * 6]),
        "is an encoder": lambda: ss.measure(tiny("bert"), "so it", where=ss.where.next_loss(above=1)),
        "expected [batch, query] = [1, 6] of bool": lambda: ss.measure(llama, "so it", where=lambda block: block.mass),
        "give a lower bound": lambda: ss.where.next_loss(),
        "no booleans for 'b'": lambda: ss.measure(llama, {"b": "so it"}, where={"a": torch.ones(6).bool()}),
        "where='hard'": lambda: ss.measure(llama, "so it", where="hard"),
    }
    for expected, call in words.items():
        found = attempt(call)
        assert isinstance(found, SinkscopeError)
        assert expected in str(found)
    assert "received_profile" not in ss.measure(llama, "so it", where=rule).metrics


def test_a_report_with_a_column_more_survives_the_round_trip(llama, tmp_path):
    report = ss.measure(
        llama, ["so it goes", "and on"], ["query_profile", "sink_mass"], where=ss.where.positions(2, None), compare=True
    )
    report.save(tmp_path)
    again = ss.load_report(tmp_path)
    assert again.frame.equals(report.frame)
    assert report.to_xarray()["query_profile"].dims == ("text", "layer", "head", "query")


def test_a_number_per_query_is_no_picture_of_heads(llama, tmp_path):
    report = ss.measure(llama, ["so it goes", "and on"], ["query_profile"], key=[0, 1])
    assert report.figures() == {}
    assert isinstance(attempt(lambda: report.heatmap("query_profile")), SinkscopeError)
    assert report.to_xarray()["query_profile"].dims == ("text", "layer", "head", "query", "key")
    report.save(tmp_path)
    assert ss.load_report(tmp_path).frame.equals(report.frame)


def test_a_run_with_other_queries_is_not_taken_up(llama, tmp_path):
    texts = ["so it goes", "and on"]
    ss.measure(llama, texts, ["sink_mass"], where=ss.where.positions(2, None), resume=tmp_path)
    other = ss.measure(llama, texts, ["sink_mass"], where=ss.where.positions(4, None), resume=tmp_path)
    assert other.frame.equals(ss.measure(llama, texts, ["sink_mass"], where=ss.where.positions(4, None)).frame)
