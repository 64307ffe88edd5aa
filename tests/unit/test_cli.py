"""The command line: it equals the API, keeps stdout and stderr apart, and fails in one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope.cli import app
from sinkscope.metrics import BUILT_IN

TEXT = "so it goes"
COMMANDS = ["demo", "measure", "evaluate", "sweep", "mask", "study", "compare", "metrics"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def piped(*arguments, code="", **env):
    """A process of its own, piped, offline: `sinkscope ARGUMENTS`, or python code."""
    where = {"PYTHONPATH": str(Path(ss.__file__).parents[1]), "HF_HUB_OFFLINE": "1", **env}
    what = ["-c", code] if code else ["-m", "sinkscope", *map(str, arguments)]
    return subprocess.run([sys.executable, *what], capture_output=True, text=True, env=os.environ | where, timeout=120)


def fails(message, *arguments):
    """Exactly one line on stderr, nothing on stdout, exit code 1."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sinkscope: error: ")
    assert message in line
    return line


def same(got, expected):
    pd.testing.assert_frame_equal(got.reset_index(drop=True), expected.reset_index(drop=True), check_dtype=False, atol=1e-9)


def test_a_study_refuses_what_it_does_not_take(saved_model, tmp_path):
    (tmp_path / "t.txt").write_text("so it goes, on and on", encoding="utf-8")
    fails("takes no --budget", "study", "massive-activations", saved_model, "--file", tmp_path / "t.txt", "--budget", 8)
    fails("takes no --ratio", "study", "streaming-llm", saved_model, "--file", tmp_path / "t.txt", "--ratio", 8)
    fails("takes no --checkpoint", "study", "bos", saved_model, "--checkpoint", 8)
    fails("did you mean 'bos'", "study", "boss", saved_model)
    fails("give it, --out DIR", "study", "all", saved_model)
    result = run("study", "massive-activations", saved_model, "--file", tmp_path / "t.txt")
    assert result.exit_code == 0, result.output
    assert "has no massive activation" in result.stdout


def test_a_study_prints_and_writes_what_python_gives(saved_model, model, tmp_path):
    (tmp_path / "t.txt").write_text("so it goes, on and on. " * 40, encoding="utf-8")
    given = ("study", "non-first", saved_model, "--file", tmp_path / "t.txt", "--sequences", 4, "--tokens", 40)
    result = run(*given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    expected = ss.studies.non_first(model, {"t.txt": (tmp_path / "t.txt").read_text()}, sequences=4, tokens=40)
    assert expected.said in result.stdout
    assert repr(expected) == str(expected) == f"StudyReport: non-first, tiny-llama\n{expected.verdict}"
    assert result.stdout.splitlines()[-1].endswith("study.html")
    same(pd.read_csv(tmp_path / "out" / "study.csv", keep_default_na=False, na_values=[""]), expected.table.replace("", None))
    printed = json.loads(run(*given, "--json").stdout)
    assert [row["value"] for row in printed] == pytest.approx(expected.table["value"].tolist(), abs=1e-6)


@pytest.fixture(scope="module")
def model(saved_model):
    return ss.load_model(saved_model)


@pytest.fixture
def never_loads(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sinkscope.models.load_model", fail)


# --- measure -----------------------------------------------------------------------------------------------------------


def test_json_is_the_summary_and_nothing_else(saved_model, model):
    result = run("measure", saved_model, "--text", TEXT, "--text", "the other one", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    same(pd.DataFrame(json.loads(result.stdout)), ss.measure(model, [TEXT, "the other one"]).summary())


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (["--metric", "sink_mass", "--metric", "sink_rate@0.5"], {"metrics": ["sink_mass", "sink_rate@0.5"]}),
        (["--max-tokens", "5"], {"max_tokens": 5}),
        (["--no-bos"], {"bos": False}),
        (["--bos"], {"bos": True}),
        (["--key", "3", "--key", "-1"], {"key": [3, -1]}),
        (["--key", "t"], {"key": "t"}),
        (["--engine", "hooks", "--chunk", "4", "--batch-size", "1"], {"engine": "hooks", "chunk": 4, "batch_size": 1}),
        (["--chunk", "none"], {"chunk": None}),
    ],
)
def test_every_option_is_the_argument_of_that_name(saved_model, model, options, how):
    result = run("measure", saved_model, "--text", TEXT, "--json", *options)
    assert result.exit_code == 0, result.output
    expected = ss.measure(model, [TEXT], how.pop("metrics", None), **how).summary()
    same(pd.DataFrame(json.loads(result.stdout)).astype({"std_error": float}), expected)


def test_files_and_texts_have_labels(saved_model, tmp_path):
    (tmp_path / "one.txt").write_text("a file", encoding="utf-8")
    result = run("measure", saved_model, "--text", TEXT, "--file", tmp_path / "one.txt", "--metric", "sink_mass", "--json")
    assert [row["text"] for row in json.loads(result.stdout)] == ["text 0", "one.txt", "all"]


def test_out_holds_the_report_that_the_api_gives(saved_model, model, tmp_path):
    out = tmp_path / "new" / "results"
    result = run("measure", saved_model, "--text", TEXT, "--text", "the other one", "--out", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert str(out / "report.html") in result.stdout
    report, expected = ss.load_report(out), ss.measure(model, [TEXT, "the other one"])
    same(report.frame, expected.frame)
    same(report.summary(), expected.summary())
    assert report.about["arguments"] == expected.about["arguments"]
    assert set(report.attention["query"]) == set(range(len("the other one") + 1))  # the longest that needs no cut


def test_the_table_shows_the_numbers_beside_chance(saved_model, model):
    result = run("measure", saved_model, "--text", TEXT)
    summary = ss.measure(model, TEXT).summary("all").set_index("metric")
    assert result.stdout.startswith(
        "tiny-llama on 1 text of 11 tokens (cpu, float32); BOS '<bos>' (id 1) stands first (the model's"
    )
    rows = {line.split()[0]: line.split()[-2:] for line in result.stdout.splitlines() if line.split()}
    for metric in ("sink_mass", "sink_rate@0.3", "row_entropy"):
        value, null = summary.loc[metric, ["value", "null"]]
        assert [float(cell) for cell in rows[metric]] == pytest.approx([value, null], rel=5e-3, abs=5e-4)
    assert "no interval" in result.stdout


def test_notes_are_printed(saved_model):
    result = run(
        "measure", saved_model, "--text", TEXT, "--text", "some words, and some more of them", "--metric", "sink_mass"
    )
    assert "of 11 to 34 tokens" in result.stdout
    assert "note: the texts have 11 to 34 tokens" in result.stdout
    result = run("evaluate", saved_model, "--text", TEXT, "--intervention", "window(size=256)")
    assert "note: window(size=256) changed nothing (no key was evicted: 11 tokens)" in result.stdout
    assert "10 tokens scored, 32 needed" in result.stdout


def test_with_several_texts_there_is_an_interval(saved_model):
    result = run("measure", saved_model, "--text", TEXT, "--text", "and another")
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("sink_mass ")]
    assert " to " in row
    assert "no interval" not in result.stdout


# --- the other commands --------------------------------------------------------------------------------------------------


def test_compare_puts_directories_side_by_side(saved_model, tmp_path):
    for name, text in (("x", TEXT), ("y", "something else")):
        run("measure", saved_model, "--text", text, "--metric", "sink_mass", "--out", tmp_path / name)
    x, y = (str(tmp_path / name) for name in "xy")
    (row,) = json.loads(run("compare", x, y, "--json").stdout)
    for name in (x, y):
        expected = ss.load_report(name).summary("all").loc[0]
        assert (row[name], row[f"{name} null"]) == pytest.approx((expected["value"], expected["null"]))
    shown = run("compare", x, y)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "sink_mass" in shown.stdout
    assert "y - x" in shown.stdout
    assert "note: the texts' lengths differ" in shown.stdout


def test_metrics_lists_everything_there_is():
    listed = json.loads(run("metrics", "--json").stdout)
    assert set(BUILT_IN) <= set(listed)
    shown = run("metrics").stdout
    assert all(name in shown for name in BUILT_IN)


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"{ss.__version__}\n")


def test_help_names_the_commands_and_each_has_its_own():
    listed = run("--help")
    assert listed.exit_code == 0
    assert all(command in listed.stdout for command in COMMANDS)
    for command in COMMANDS:
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert "--json" in shown.stdout


def test_without_arguments_it_shows_help():
    assert "measure" in run().output


# --- errors --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path):
    """Paths that are wrong in one way each."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no text: give --text"),
        (["--text", ""], "text 0 ('text 0') is empty"),
        (["--file", "BAD/empty.txt"], "text 0 ('empty.txt') is empty"),
        (["--file", "BAD/gone.txt"], "no such file"),
        (["--file", "BAD/latin.txt"], "is not UTF-8 text: byte 3 can't be decoded"),
        (["--file", "BAD/folder"], "holds no .txt file"),
        (["--file", "BAD/x.txt", "--file", "BAD/x.txt"], "no such file"),
        (["--text", TEXT, "--metric", "sinkmass"], "unknown metric 'sinkmass'; did you mean 'sink_mass'?"),
        (["--text", TEXT, "--out", "BAD/file"], "can't write to the directory"),
        (["--text", TEXT, "--out", "BAD/file/below"], "can't write to the directory"),
    ],
)
def test_what_can_be_known_is_said_before_the_model_is_loaded(never_loads, bad, options, message):
    fails(message, "measure", "gpt2", *(o.replace("BAD", str(bad)) for o in options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--key", "99"], "key=99 lies outside 'text 0', whose positions are 0 to 10"),
        (["--key", "[SEP]"], "key='[SEP]' does not occur"),
        (["--key=--5"], "key='--5' does not occur"),
        (["--key", "²"], "key='²' does not occur"),
        (["--max-tokens", "1"], "max_tokens=1: at least 2"),
        (["--text", "a" * 200], "max_tokens=128 (--max-tokens 128)"),
        (["--engine", "hook"], "did you mean 'hooks'"),
        (["--chunk", "-3"], "chunk"),
        (["--chunk", "some"], "chunk='some': give a number"),
        (["--chunk", "²"], "chunk"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_an_error_is_one_line(saved_model, options, message):
    fails(message, "measure", saved_model, "--text", TEXT, *options)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "a/b/c"])
def test_a_model_that_is_not_there(name):
    fails(f"'{name}'", "measure", name, "--text", TEXT)


def test_compare_says_what_is_missing(tmp_path):
    fails("no finished report (no summary.json)", "compare", tmp_path, tmp_path)
    fails("no finished report", "compare", tmp_path / "gone", tmp_path)


def test_compare_with_one_directory(saved_model, tmp_path):
    run("measure", saved_model, "--text", TEXT, "--metric", "sink_mass", "--out", tmp_path)
    fails("at least two reports, got 1", "compare", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [["measure"], ["measure", "gpt2", "--wat"], ["wat"], ["measure", "gpt2", "--max-tokens", "few"],
     ["measure", "gpt2", "--batch-size", "0"], ["compare"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(never_loads, arguments):
    assert run(*arguments).exit_code == 2


def test_nothing_is_written_where_the_activations_are_nan(tmp_path):
    from sinkscope.testing import tiny_hf_model, tiny_tokenizer

    network = tiny_hf_model("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    network.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    fails("NaN or infinity in layer 1 of m", "measure", tmp_path / "m", "--text", TEXT, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_an_error_text_can_not_drive_the_terminal(never_loads):
    line = fails("unknown metric", "measure", "gpt2", "--text", TEXT, "--metric", "\x1b[31mred\nand more\u202e")
    assert line.isprintable()


def test_debug_gives_the_traceback(never_loads):
    result = run("measure", "gpt2", "--text", TEXT, "--metric", "sinkmass", "--debug")
    assert isinstance(result.exception, ss.SinkscopeError)


def test_an_interrupt_is_exit_code_130(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sinkscope.models.load_model", interrupt)
    result = run("measure", "gpt2", "--text", TEXT)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "sinkscope: interrupted\n")


# --- as a process --------------------------------------------------------------------------------------------------------


def test_a_real_process_says_nothing_on_stderr(saved_model, model, tmp_path):
    result = piped("measure", saved_model, "--text", TEXT, "--json", "--out", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    same(pd.DataFrame(json.loads(result.stdout)).astype({"std_error": float}), ss.measure(model, TEXT).summary())
    assert (tmp_path / "out" / "summary.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm2-135"], "sinkscope: error: can't load model 'smollm2-135'"),
        (["gpt2", "--backend", "bride"], "sinkscope: error: unknown backend 'bride'; did you mean 'bridge'?"),
    ],
)
def test_a_real_error_is_one_line(arguments, message):
    result = piped("measure", "--text", TEXT, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


HEAVY = "{'torch', 'transformers', 'transformer_lens', 'pandas', 'matplotlib', 'numpy', 'scipy'}"
IMPORT = f"import sys; import sinkscope; dir(sinkscope); print(sorted({HEAVY} & set(sys.modules)))"
HELP = f"""
import sys
sys.argv = ["sinkscope", "--help"]
try:
    from sinkscope.cli import app
    app()
finally:
    print(sorted({HEAVY} & set(sys.modules)))
"""


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "--help"])
def test_nothing_heavy_is_imported_and_it_takes_less_than_a_second(code):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = piped(code=code)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 1


@pytest.mark.parametrize("name", ss.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ss, name) is not None
    assert name in dir(ss)


EVERYTHING = """
import importlib, pkgutil, types
import sinkscope
for module in pkgutil.walk_packages(sinkscope.__path__, "sinkscope."):
    if module.name not in ("sinkscope.__main__", "sinkscope.models.legacy"):
        importlib.import_module(module.name)
print([n for n in sinkscope.__all__ if isinstance(getattr(sinkscope, n), types.ModuleType)])
"""


def test_no_module_takes_the_place_of_a_public_function():
    """Importing `sinkscope.x` binds the module to `sinkscope.x`: no function may have a module's name."""
    result = piped(code=EVERYTHING)
    assert (result.stdout, result.returncode) == (
        "['interventions', 'metrics', 'plots', 'studies', 'testing', 'where']\n",
        0,
    ), result.stderr


def test_there_are_few_public_names_and_others_are_errors():
    assert len(ss.__all__) <= 28
    with pytest.raises(AttributeError, match=r"has no attribute 'mesure'$"):
        ss.mesure  # noqa: B018


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("MeanValue", "interventions"),
        ("heatmap", "plots"),
        ("tiny_model", "testing"),
        ("bos", "studies"),
        ("Metric", "metrics"),
    ],
)
def test_a_name_of_a_public_module_says_where_it_is(name, module):
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}': it is sinkscope\.{module}\.{name}$"):
        getattr(ss, name)
    assert hasattr(getattr(ss, module), name)


def test_every_edit_is_found_or_said_where():
    for name in ss.interventions.__all__:
        if not hasattr(ss, name):
            with pytest.raises(AttributeError, match=rf"it is sinkscope\.interventions\.{name}$"):
                getattr(ss, name)


# --- evaluate -----------------------------------------------------------------------------------------------------


def test_evaluate_equals_the_api(model, saved_model, tmp_path):
    edits = ["window(size=4)", "mask_keys(keys=[0]) & window(size=6)"]
    asked = [x for e in edits for x in ("--intervention", e)]
    result = run("evaluate", saved_model, "--text", "so it goes on", *asked, "--score-from", "3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    expected = ss.evaluate(model, {"text 0": "so it goes on"}, edits, score_from=3)
    same(pd.read_csv(tmp_path / "effects.csv").drop(columns="model"), expected.frame.drop(columns="model"))
    assert all(e in result.stdout for e in ("none", *edits))
    shown = json.loads(run("evaluate", saved_model, "--text", "so it goes on", *asked, "--json").stdout)
    assert [row["intervention"] for row in shown] == ["none", *edits]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--intervention", "windw(size=3)"], "did you mean 'window'"),
        (["--intervention", "window(size="], "can't read the intervention"),
        (["--text", " "], "is empty"),
    ],
)
def test_evaluate_says_what_is_wrong_before_loading(never_loads, arguments, message):
    fails(message, "evaluate", "anything", "--text", TEXT, *arguments)


def test_sweep_equals_the_api(model, saved_model, tmp_path):
    asked = ["--text", "so it goes on", "--text", "and on, and on", "--edit", "mask_keys(0)", "--score-from", "3"]
    result = run("sweep", saved_model, *asked, "--over", "layers", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    texts = {"text 0": "so it goes on", "text 1": "and on, and on"}
    expected = ss.sweep(model, texts, "mask_keys(0)", "layers", score_from=3)
    numbers = expected.frame.select_dtypes("number").astype(float)
    same(pd.read_csv(tmp_path / "sweep.csv")[numbers.columns].astype(float), numbers)
    assert "mask_keys(keys=[0]) at 3 layers" in result.stdout
    one = ["--over", "positions", "--position", "4", "--position", "2", "--json"]
    assert [row["position"] for row in json.loads(run("sweep", saved_model, *asked, *one).stdout)] == [4, 2]
    expected.save(tmp_path / "other")
    both = run("compare", tmp_path, tmp_path / "other", "--json", "--out", tmp_path / "both")
    rows = json.loads(both.stdout)
    assert [(row["layer"], row[f"{tmp_path / 'other'} - {tmp_path}"]) for row in rows] == [(0, 0), (1, 0), (2, 0)]
    assert "sweep" in (tmp_path / "both" / "report.html").read_text()
    fails("did you mean 'heads'", "sweep", saved_model, *asked, "--over", "head")
    fails("did you mean 'mask_keys'", "sweep", saved_model, "--text", TEXT, "--edit", "mask_key(0)")


def test_compare_takes_one_kind_at_a_time(model, tmp_path):
    for name, size in (("x", 4), ("y", 2)):
        ss.evaluate(model, "so it goes on and on", ss.Window(size)).save(tmp_path / name)
    ss.measure(model, "so it goes", ["sink_mass"]).save(tmp_path / "z")
    x, y, z = (tmp_path / name for name in "xyz")
    fails("what evaluate wrote, ", "compare", x, z)
    fails("what measure wrote: give reports of one kind", "compare", x, z)
    rows = json.loads(run("compare", x, y, "--json", "--out", tmp_path / "both").stdout)
    assert [row["intervention"] for row in rows] == ["none", "window(size=4)", "window(size=2)"]
    assert rows[1][str(x)] == pytest.approx(ss.load_report(x).summary()["delta_loss"][1])
    assert rows[1][str(y)] is None
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "window(size=2)" in page
