"""Metrics of other people: every way to hand one over, everything one may ask for, and what happens when one is wrong."""

import sys

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.metrics import available, resolve
from sinkscope.metrics.base import Metric
from sinkscope.metrics.catalogue import _as_metric
from sinkscope.metrics.shape import head_profile
from sinkscope.testing import check_metric, tiny_hf_model, tiny_tokenizer
from tests import oracles
from tests.conftest import TEXTS, attempt, play, table, total

TEXT = "so it goes"


def distance(block):
    """Mean distance, in tokens, from a query to what it attends to."""
    return (block.pattern * block.distance).sum(-1)


def hugging_face(family, text, hook=None):
    """Attentions `[layer, head, T, T]`, hidden states and ids of a fresh copy that no TransformerLens has touched."""
    model = tiny_hf_model(family)
    if hook is not None:
        hook(model)
    ids = torch.tensor([tiny_tokenizer()(text).input_ids])
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    return torch.cat(out.attentions), out.hidden_states, ids


@pytest.fixture(scope="module")
def expected():
    """Mean distance per layer and head, by numpy, from Hugging Face's own attentions."""
    pattern = hugging_face("llama", TEXT)[0].numpy()
    i = np.arange(pattern.shape[-1])
    return (pattern * np.abs(i[:, None] - i)).sum(-1).mean(-1)


# --- ways to hand one over -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        ss.metric(distance),
        ss.metric(needs="pattern")(distance),
        distance,
        Metric("distance", distance),
        ss.metric(needs="pattern", name="distance")(lambda block: distance(block)),
    ],
    ids=["decorator", "decorator with arguments", "bare function", "Metric", "named lambda"],
)
def test_every_way_gives_the_same(llama, expected, how):
    report = ss.measure(llama, TEXT, [how, "sink_mass"])
    assert report.metrics == ["distance", "sink_mass"]
    np.testing.assert_allclose(table(report, "distance"), expected, atol=1e-5)
    assert total(report, "distance") == pytest.approx(expected.mean(), abs=1e-5)


def test_its_null_is_itself_on_uniform_attention():
    report = play([oracles.uniform(9)[None, None] * 0 + 0.1], [distance])
    uniform, i = oracles.uniform(9), np.arange(9)
    assert total(report, "distance", column="null") == pytest.approx((uniform * np.abs(i[:, None] - i)).sum() / 9)


def test_its_rows_carry_the_key_only_if_it_looks_at_one(llama):
    mine = ss.metric(needs="mass", name="mine")(lambda block: block.mass * 2)
    report = ss.measure(llama, TEXT, [mine, distance, "sink_mass"], key=3)
    keys = report.frame.groupby("metric")["key"].unique()
    assert keys["mine"].tolist() == [3]
    assert keys["distance"].isna().all()
    np.testing.assert_allclose(table(report, "mine"), 2 * table(report, "sink_mass"), atol=1e-7)


def test_rows_and_thresholds_can_be_chosen(llama):
    late = ss.metric(
        needs="mass", name="late", over=lambda block: block.queries[None, :] >= 5, thresholds=(0.05, 0.5), null=None
    )(lambda block: block.mass)
    report = ss.measure(llama, TEXT, [late])
    alpha = hugging_face("llama", TEXT)[0][:, :, 5:, 0].mean(-1).numpy()
    assert report.metrics == ["late@0.05", "late@0.5"]
    np.testing.assert_array_equal(table(report, "late@0.05"), alpha > 0.05)
    assert report.frame["null"].isna().all()


def test_a_metric_with_a_number_per_key(llama):
    @ss.metric
    def per_key(block):
        return block.pattern

    report = ss.measure(llama, TEXTS, [per_key])
    for label, text in TEXTS.items():
        pattern = hugging_face("llama", text)[0].numpy()
        np.testing.assert_allclose(table(report, "per_key", label), pattern.mean(2), atol=1e-6)
        uniform = np.broadcast_to(oracles.uniform(pattern.shape[-1]).mean(0), pattern.mean(2).shape)
        np.testing.assert_allclose(table(report, "per_key", label, "null"), uniform, atol=1e-9)
    assert "per_key" not in set(report.summary()["metric"])


# --- what it may ask for ---------------------------------------------------------------------------------------------


def test_pattern_and_value(llama):
    @ss.metric(needs=("pattern", "value"))
    def output_norm(block):
        value = block.value.repeat_interleave(block.pattern.shape[1] // block.value.shape[2], 2)
        return torch.einsum("bhqk,bkhd->bhqd", block.pattern, value[:, : block.pattern.shape[-1]]).norm(dim=-1)

    seen = {}

    def keep(model):
        for layer, block in enumerate(model.model.layers):
            block.self_attn.v_proj.register_forward_hook(lambda m, a, out, layer=layer: seen.update({layer: out}))

    pattern, _, _ = hugging_face("llama", TEXT, keep)
    report = ss.measure(llama, [TEXT, "the longer text of the two"], [output_norm, "sink_mass"])
    for layer in range(3):
        value = seen[layer][0].unflatten(-1, (2, 8)).transpose(0, 1).repeat_interleave(2, 0)
        expected = (pattern[layer] @ value).norm(dim=-1).mean(-1)
        np.testing.assert_allclose(table(report, "output_norm")[layer], expected, atol=1e-5)
    assert report.frame.loc[report.frame["metric"] == "output_norm", "null"].isna().all()


@pytest.mark.parametrize("need", ["residual", "hook_resid_post"])
def test_the_residual_stream(llama, need):
    @ss.metric(needs=need)
    def norm(block):
        return block[need].norm(dim=-1)[:, None, :]

    _, hidden, _ = hugging_face("llama", TEXT)
    report = ss.measure(llama, [TEXT, "the longer text of the two"], [norm])
    expected = [h[0].norm(dim=-1).mean() for h in hidden[1:3]]  # the last is taken after the final norm
    np.testing.assert_allclose(table(report, "norm")[:2, 0], expected, rtol=1e-5)


def test_any_hook_point_by_its_name(llama):
    @ss.metric(needs="mlp.hook_post")
    def active(block):
        return (block["mlp.hook_post"] > 0).float().mean(-1)[:, None]

    report = ss.measure(llama, TEXT, [active, "sink_mass"])
    assert table(report, "active").shape == (3, 1)
    assert 0.1 < total(report, "active") < 0.9


def test_token_ids_are_there(llama):
    @ss.metric
    def to_spaces(block):
        spaces = block.tokens[:, None, None, : block.pattern.shape[-1]] == llama.tokenizer.convert_tokens_to_ids(" ")
        return (block.pattern * spaces).sum(-1)

    pattern, _, ids = hugging_face("llama", TEXT)
    spaces = (ids[0] == llama.tokenizer.convert_tokens_to_ids(" ")).numpy()
    report = ss.measure(llama, TEXT, [to_spaces])
    np.testing.assert_allclose(table(report, "to_spaces"), pattern.numpy()[..., spaces].sum(-1).mean(-1), atol=1e-6)


def test_a_hook_point_that_does_not_exist(llama):
    mine = ss.metric(needs="mlp.hook_pots", name="mine")(lambda block: block["mlp.hook_pots"])
    with pytest.raises(ss.SinkscopeError, match=r"unknown hook point 'mlp.hook_pots'; did you mean 'mlp.hook_post'\? Avail"):
        ss.measure(llama, TEXT, [mine])


def test_what_was_not_declared_is_not_there(llama):
    @ss.metric(needs="pattern")
    def nosy(block):
        return block.value.norm(dim=-1).transpose(1, 2)

    with pytest.raises(ss.SinkscopeError, match=r"metric 'nosy' raised SinkscopeError in layer 0: .*needs='value'"):
        ss.measure(llama, TEXT, [nosy])

    @ss.metric(needs="value")
    def blind(block):
        return block.mass

    with pytest.raises(ss.SinkscopeError, match=r"'blind' raised SinkscopeError in layer 0: the block has no attention"):
        ss.measure(llama, TEXT, [blind])


def test_nothing_is_hooked_that_nobody_asked_for(llama):
    seen = []

    @ss.metric(needs="residual")
    def watch(block):
        seen.append({id(point) for point in llama.hook_dict.values() if point.fwd_hooks})
        return block.residual.norm(dim=-1)[:, None]

    ss.measure(llama, TEXT, [watch])
    assert seen == 3 * [{id(llama.hook_dict[f"blocks.{layer}.hook_resid_post"]) for layer in range(3)}]


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_lambda_needs_a_name(llama):
    with pytest.raises(ss.SinkscopeError, match=r"a lambda has no name: write ss\.metric"):
        ss.measure(llama, TEXT, [lambda block: block.pattern[..., 0]])


def test_what_is_received_is_the_profile_of_heads_alone():
    """It is taken from sums, not from the function, so that another function would be passed over."""
    assert head_profile.reads == "received"
    with pytest.raises(ss.SinkscopeError, match="metric 'mine': reads='received' is none of 'pattern', 'entropy'"):
        ss.metric(reads="received", name="mine")(lambda block: 2 * block.pattern)


@pytest.mark.parametrize("thing", [3, None, object()])
def test_what_is_no_metric(thing):
    with pytest.raises(ss.SinkscopeError, match=f"not a {type(thing).__name__}"):
        _as_metric(thing)


@pytest.mark.parametrize("asked", ["sink_mass", "sink_strength", "consistency"])
@pytest.mark.parametrize("first", [True, False])
def test_a_name_that_is_taken_never_stands_for_another_metric(llama, asked, first):
    """`sink_strength` is made from the built-in `sink_mass`, and mine stays mine; or it is refused."""
    mine = ss.metric(needs="mass", name="sink_mass")(lambda block: block.mass * 0)
    right = total(ss.measure(llama, TEXT, ["sink_strength"]), "sink_strength")
    got = attempt(lambda: ss.measure(llama, TEXT, [mine, asked] if first else [asked, mine]))
    if isinstance(got, ss.SinkscopeError):
        assert "'sink_mass'" in str(got)
    else:
        assert asked == "sink_strength"
        assert total(got, "sink_strength") == pytest.approx(right)
        assert not table(got, "sink_mass").any()


def test_the_same_metric_twice_is_measured_once(llama):
    assert ss.measure(llama, TEXT, [distance, distance]).metrics == ["distance"]
    assert ss.measure(llama, TEXT, ["sink_mass", "sink_mass"]).metrics == ["sink_mass"]


# --- entry points ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a distribution, for the time of a test, that offers these metrics: name -> object."""

    def install(source, **entries):
        (tmp_path / "sinkplug.py").write_text(source)
        info = tmp_path / "sinkplug-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sinkplug\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[sinkscope.metrics]", *lines]) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "sinkplug", raising=False)

    return install


SOURCE = '''
import sinkscope as ss

def distance(block):
    """Mean distance."""
    return (block.pattern * block.distance).sum(-1)

double = ss.metric(needs="mass", name="double", thresholds=(0.3,))(lambda block: block.mass * 2)
number = 3
'''


def test_a_metric_from_another_package(llama, expected, plugin):
    plugin(SOURCE, far="sinkplug:distance", double="sinkplug:double")
    assert available()["far"].doc == "Mean distance."
    report = ss.measure(llama, TEXT, ["far", "double@0.1"])
    assert report.metrics == ["far", "double@0.1"]
    np.testing.assert_allclose(table(report, "far"), expected, atol=1e-5)


@pytest.mark.parametrize("value", ["sinkplug:number", "sinkplug:missing", "sinkgone:distance"])
def test_a_broken_package_is_named_when_its_metric_is_asked_for(plugin, value):
    plugin(SOURCE, far=value)
    with pytest.raises(ss.SinkscopeError, match=rf"metric 'far' \({value}\) can't be loaded"):
        resolve(["far"])


def test_a_broken_package_does_not_stop_the_built_in_metrics(llama, plugin):
    plugin(SOURCE, far="sinkgone:distance")
    assert ss.measure(llama, TEXT, ["sink_mass"]).metrics == ["sink_mass"]


def test_a_package_can_not_take_a_built_in_name(llama, plugin):
    plugin(SOURCE, sink_mass="sinkplug:distance")
    assert "first" not in available()["sink_mass"].doc
    assert total(ss.measure(llama, TEXT, ["sink_mass"]), "sink_mass") <= 1


# --- when one is wrong -----------------------------------------------------------------------------------------------


def writes(block):
    block.pattern.mul_(0)
    return block.pattern[..., 0]


@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_a_metric_that_writes_into_the_pattern_changes_no_other_number(llama, engine):
    """Neither the other metrics of its layer nor the layers after it: refuse it by name, or hand out copies."""
    right = ss.measure(llama, TEXT, ["sink_mass"], engine=engine)
    got = attempt(lambda: ss.measure(llama, TEXT, [writes, "sink_mass"], engine=engine))
    if isinstance(got, ss.SinkscopeError):
        assert "'writes'" in str(got)
    else:
        np.testing.assert_allclose(table(got, "sink_mass"), table(right, "sink_mass"), atol=1e-7)


@pytest.mark.parametrize("name", ["sink_mass", "sink_rate", "row_entropy", "normalized_row_entropy", "head_profile"])
def test_check_metric_passes_ours(name):
    check_metric(name)


def forgets_a_batch(block):
    return block.pattern[:1, ..., 0]


def looks_at_pads(block):
    return block.pattern.sum(-1) * block.pattern.shape[-1]


def not_finite(block):
    return block.mass.log() * float("inf")


state = []


def remembers(block):
    state.append(1)
    return block.pattern[..., 0] + len(state)


@pytest.mark.parametrize("wrong", [forgets_a_batch, looks_at_pads, not_finite, remembers, writes], ids=lambda f: f.__name__)
def test_check_metric_finds_what_is_wrong(wrong):
    with pytest.raises(ss.SinkscopeError, match=f"'{wrong.__name__}'"):
        check_metric(wrong)


@pytest.mark.parametrize("engine", ["flash", "hooks"])
def test_a_bug_in_a_metric_comes_up_in_a_few_lines(llama, engine):
    """The traceback has none of the model's own frames, and ends with the metric's line."""
    import traceback

    @ss.metric
    def buggy(block):
        return block.pattern.summ(-1)

    @ss.metric
    def wrong(block):
        return block.pattern[0]

    for metric, last in ((buggy, "in buggy: return block.pattern.summ(-1)"), (wrong, "for one number per key")):
        with pytest.raises(ss.SinkscopeError) as caught:
            ss.measure(llama, "so it goes", [metric], engine=engine)
        shown = "".join(traceback.format_exception(caught.value)).strip()
        assert shown.endswith(last)
        assert len(shown.splitlines()) < 40  # with what the tests' own type checks add; it was over 200
        assert "torch/nn/modules" not in shown
