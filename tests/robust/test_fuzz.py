"""Generated calls: each ends in a result or in a SinkscopeError, never in a traceback, a hang or a half-written file.

`make fuzz` runs over ten thousand of them, the suite some hundreds.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope.cli import app
from sinkscope.interventions import Intervention, parse
from sinkscope.metrics import available
from sinkscope.reports.files import SEAL
from sinkscope.runs.resume import RUNNING, RUNS, VALUE, Finished, Running, Store, kept_runs
from sinkscope.runs.share import Share
from sinkscope.testing import tiny_model
from sinkscope.tokens import read_text
from tests.robust.test_hostile import honest_gguf

OLD = Path(__file__).parents[1] / "data" / "saved" / "0.1.0"
TIMES = int(os.environ.get("SINKSCOPE_FUZZ", "1"))


def fuzz(examples):
    return settings(
        max_examples=max(1, examples * TIMES // 2),
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def tried(call):
    """A result, or the one kind of error that may come."""
    with contextlib.suppress(ss.SinkscopeError, TypeCheckError):  # the suite checks annotations before; `make fuzz` does not
        return call()
    return None


# --- what is generated -----------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2) | st.tuples(inner, inner)
    ),
    max_leaves=5,
)
small = st.integers(-3, 40)
numbers = small | st.sampled_from([0, -1, 2**31, 2**63, 10**30, -(10**30)]) | st.floats()
literal = st.recursive(
    numbers.map(repr) | st.text(max_size=5).map(repr) | st.just("None"),
    lambda i: st.lists(i, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
    max_leaves=4,
)
fields = st.sampled_from(
    ["size", "sinks", "keys", "positions", "position", "token", "layers", "heads", "to", "at", "seed", "x"]
)
arguments = st.lists(st.one_of(literal, st.tuples(fields, literal).map("=".join)), max_size=3).map(", ".join)
edits = st.tuples(st.sampled_from([*Intervention.registry, "nothing"]), arguments).map(lambda pair: f"{pair[0]}({pair[1]})")
written = st.lists(edits, min_size=1, max_size=3).map(" & ".join) | st.text(max_size=40) | edits
sane = st.builds("{}({})".format, st.sampled_from(["window", "sink_window", "mask_keys", "zero_value"]), small.map(str))
words = st.text(alphabet="abcdef .,\n\u00e9\U0001f600\x00\x1b<&=\ud83d\ufeff", max_size=30)
ids = st.lists(st.integers(-2, 70) | st.integers(0, 9).map(np.uint16), max_size=12)
keys = st.sampled_from(["attention_mask", "token_type_ids", "position_ids", "labels", "pixel_values", "text", "tokens"])
encodings = st.builds(lambda i, more: more | {"input_ids": i}, ids | st.lists(ids, max_size=2), st.dictionaries(keys, ids))
chats = st.lists(st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant"]), words), max_size=3)
fine = st.text(alphabet="abcdef .,", min_size=6, max_size=30).map("a".__add__)
texts = (
    fine
    | st.lists(fine, min_size=1, max_size=3)
    | words
    | ids
    | st.lists(words | ids, max_size=4)
    | st.dictionaries(words, words | ids | encodings | chats, max_size=3)
    | encodings
    | st.lists(encodings | chats, max_size=2)
    | chats
    | ids.map(np.array)
    | anything
)
names = st.sampled_from([*sorted(available()), "sink_rate@0.5", "sink_rate@", "sink_mass@2", "nothing", ""])
some_metrics = st.just(["sink_mass", "row_entropy"]) | st.none() | st.lists(names, max_size=3) | anything


# --- readers ---------------------------------------------------------------------------------------------------------


@fuzz(400)
@given(text=written)
def test_interventions_in_words(text):
    edit = tried(lambda: parse(text))
    if edit is not None:
        assert str(parse(str(edit))) == str(edit)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ss.measure(model, ["so it goes", "and on"], ["sink_mass", "sink_positions"]).save(folder / "measure")
    ss.evaluate(model, ["so it goes", "and on"], "window(size=4)").save(folder / "evaluate")
    ss.sweep(model, ["so it goes", "and on"], "mask_keys(0)", "layers").save(folder / "sweep")
    return {verb: (folder / verb, ss.load_report(folder / verb)) for verb in ("measure", "evaluate", "sweep")}


@fuzz(120)
@given(data=st.data(), verb=st.sampled_from(["measure", "evaluate", "sweep"]))
def test_a_damaged_report(saved, tmp_path_factory, data, verb):
    """Either the damage is said, or nothing is changed by it."""
    original, whole = saved[verb]
    folder = copied(original, tmp_path_factory)
    damage(folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir()))), data)
    report = tried(lambda: ss.load_report(folder))
    if report is not None:
        assert report.frame.equals(whole.frame)
        assert report.about == whole.about


@fuzz(25)
@given(data=st.data(), verb=st.sampled_from(["measure", "evaluate"]))
def test_a_forged_report(tmp_path_factory, data, verb):
    """Of 0.1.0, whose files nothing vouches for: it is refused, or can be looked at."""
    folder = copied(OLD / verb, tmp_path_factory)
    if data.draw(st.booleans()):
        about = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        (folder / SEAL).write_text(json.dumps(forged(about, data), default=str), encoding="utf-8")
    else:
        path = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.glob("*.parquet"))))
        table = pd.read_parquet(path)
        name = data.draw(st.sampled_from(list(table.columns)))
        table[name] = data.draw(st.sampled_from([None, 1.5, -7, "x", b"x", True, np.nan, "all"]))
        (table if data.draw(st.booleans()) else table.drop(columns=name)).to_parquet(path)
    report = tried(lambda: ss.load_report(folder))
    if report is not None:
        tried(lambda: (str(report), report.page(), report._repr_html_(), report.summary()))


def copied(folder, tmp_path_factory):
    to = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to)


def forged(thing, data):
    """Put something else somewhere into what JSON gave, or leave it out."""
    parts = list(thing if isinstance(thing, dict) else range(len(thing))) if isinstance(thing, dict | list) else []
    if not parts or data.draw(st.integers(0, 3)) == 0:
        return data.draw(anything)
    at = data.draw(st.sampled_from(parts))
    if data.draw(st.integers(0, 4)) == 0:
        del thing[at]
    else:
        thing[at] = forged(thing[at], data)
    return thing


def damage(path, data):
    """Cut a file, flip a bit, change some bytes, or put something else in its place."""
    whole = bytearray(path.read_bytes())
    how = data.draw(st.sampled_from(["cut", "flip", "change", "replace"]))
    if how == "cut":
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    elif how == "flip":
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "change":
        for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
            whole[at] = data.draw(st.integers(0, 255))
    else:
        whole = data.draw(st.binary(max_size=60) | anything.map(lambda x: json.dumps(x, default=str).encode()))
    path.write_bytes(bytes(whole))


@fuzz(100)
@given(data=st.data())
def test_damaged_batches_of_an_unfinished_run(tmp_path_factory, data):
    store = Store.of(tmp_path_factory.getbasetemp() / "kept", {})
    store.write("a", [{"x": 1}], {"b": np.arange(9.0)})
    damage(store.folder / "a.npz", data)
    found = store.read("a")
    assert found is None or (found[0] == [{"x": 1}] and (found[1]["b"] == np.arange(9)).all())


@fuzz(100)
@given(data=st.data(), about=anything)
def test_forged_batches_of_an_unfinished_run(tmp_path_factory, data, about):
    """Whatever a file says, with a digest that is right: it is run again."""
    sequences = ss.tokenize(None, [[1, 2, 3]]).sequences
    store = Store.of(tmp_path_factory.getbasetemp() / "forged", {})
    shapes = st.sampled_from([[[VALUE]], RUNNING, RUNS]).map(example)
    about = json.loads(json.dumps(forged(data.draw(shapes), data), default=str))
    arrays = {f"0-0-{part}": np.arange(data.draw(st.integers(0, 3))) for part in ("value", "null", "loss")}
    for name in (store.name(sequences), f"{store.name([])}-0-of-1"):
        store.write(name, about, arrays)
    Finished(store).has(sequences)
    Running(store, Share())
    kept_runs(store, sequences[0])


def example(shape):
    """Make something of a shape."""
    if isinstance(shape, dict):
        return {key: example(of) for key, of in shape.items() if isinstance(key, str)}
    if isinstance(shape, list | tuple):
        return [example(of) for of in shape]
    return {str: "a", int: 1, float: 0.5}.get(shape)


@fuzz(100)
@given(
    content=st.binary(max_size=80)
    | words.map(lambda w: w.encode("utf-8", "surrogatepass"))
    | anything.map(lambda x: json.dumps(x, default=str).encode())
)
def test_files_of_texts(model, tmp_path_factory, content):
    for name in ("t.txt", "t.jsonl"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        tried(lambda path=path: read_text(path))
        tried(lambda path=path: ss.measure(model, path, ["sink_mass"]))


@fuzz(25)
@given(data=st.data())
def test_damaged_weights(saved_model, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved_model, folder)
    damage(folder / data.draw(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json"])), data)
    tried(lambda: ss.measure(ss.load_model(folder), [[1, 5, 9]], ["sink_mass"]))


@fuzz(25)
@given(data=st.data())
def test_a_damaged_gguf_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "model.gguf"
    honest_gguf(path)
    damage(path, data)
    tried(lambda: ss.measure(ss.load_model(path), [[1, 5, 9]], ["sink_mass"]))


# --- functions -------------------------------------------------------------------------------------------------------


@fuzz(60)
@given(
    texts=texts,
    metrics=some_metrics,
    how=st.fixed_dictionaries(
        {},
        optional={
            "key": small | words | st.lists(small | words, max_size=2),
            "bos": st.none() | st.booleans(),
            "max_tokens": small,
            "engine": st.sampled_from(["auto", "flash", "hooks", "x"]),
            "chunk": small | st.sampled_from(["auto", None, "x"]),
            "batch_size": small,
            "per_text": st.none() | st.booleans(),
        },
    ),
)
def test_measure(model, texts, metrics, how):
    report = tried(lambda: ss.measure(model, texts, metrics, **how))
    if report is not None:
        assert not report.frame.empty or not metrics
        report.page()


@fuzz(50)
@given(
    texts=texts,
    edits=sane | written | st.lists(sane | written, max_size=2),
    how=st.fixed_dictionaries(
        {},
        optional={
            "score_from": small,
            "bos": st.none() | st.booleans(),
            "max_tokens": small,
            "placebo": st.booleans() | small,
        },
    ),
)
def test_evaluate(model, texts, edits, how):
    report = tried(lambda: ss.evaluate(model, texts, edits, **how))
    if report is not None:
        assert np.isfinite(report.frame["loss"]).all()


@fuzz(20)
@given(
    texts=fine | texts,
    edit=st.sampled_from(["zero_head()", "zero_value(0)", "self_only(1)"]) | sane | written,
    over=st.sampled_from(["heads", "layers", "positions", "x"]),
    how=st.fixed_dictionaries(
        {},
        optional={
            "placebo": st.none() | st.booleans() | small,
            "positions": st.lists(small, max_size=3),
            "score_from": small,
            "max_tokens": small,
        },
    ),
)
def test_sweep(model, texts, edit, over, how):
    report = tried(lambda: ss.sweep(model, texts, edit, over, **how))
    if report is not None:
        assert np.isfinite(report.frame["delta_loss"]).all()


@fuzz(80)
@given(texts=texts, how=st.fixed_dictionaries({}, optional={"bos": st.booleans(), "max_tokens": numbers}))
def test_tokenize(model, texts, how):
    tried(lambda: ss.tokenize(model.tokenizer, texts, **how))


# --- the command line -------------------------------------------------------------------------------------------------

options = {
    "--text": words,
    "--metric": names,
    "--max-tokens": numbers.map(str),
    "--engine": st.sampled_from(["auto", "hooks", "y"]),
    "--key": small.map(str) | words,
    "--chunk": small.map(str) | words,
    "--batch-size": small.map(str),
    "--intervention": sane | written,
    "--score-from": small.map(str),
    "--file": words,
    "--device": st.sampled_from(["cpu", "gpu"]),
    "--sequences": small.map(str),
    "--tokens": small.map(str),
    "--ratio": numbers.map(str),
    "--budget": small.map(str),
}
flags = st.sampled_from(["--json", "--bos", "--no-bos", "--no-per-text", "--help", "--debg"])
given_options = st.lists(
    st.sampled_from(sorted(options)).flatmap(lambda o: options[o].map(lambda value: [o, value])) | flags.map(lambda f: [f]),
    max_size=4,
).map(lambda parts: [word for part in parts for word in part])
commands = st.sampled_from(
    [["measure", "m"], ["evaluate", "m"], ["compare"], ["metrics"], ["study", "bos", "m"], ["study", "x", "m"], []]
)


@fuzz(80)
@given(command=commands, options=given_options, text=st.booleans())
def test_the_command_line(model, tmp_path_factory, command, options, text):
    out = tmp_path_factory.getbasetemp() / "out"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [*command, *options, *(["--text", "so it goes"] if text else []), *(["--out", str(out)] if text else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinkscope.models.load_model", lambda *_, **__: model)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 1, 2), (arguments, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, repr(result.exception))
    if result.exit_code == 1:
        assert result.stderr.startswith("sinkscope: error: ")
    assert not [p for p in out.rglob("*") if p.name.endswith(".half")]
    if result.exit_code != 0 and out.exists():
        assert not (out / SEAL).exists()
