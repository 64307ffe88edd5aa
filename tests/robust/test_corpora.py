"""Corpora: streams in memory that does not grow, resumed, refused or shared among processes, with the same numbers."""

import fcntl
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import causal
from sinkscope.results import TextResult
from sinkscope.runs.resume import FOLDER, LOCK
from sinkscope.tokens import portions
from tests.conftest import attempt

ROOT = Path(__file__).parents[2]
METRICS = ["sink_mass", "sink_rate", "position_profile", "sink_positions", "consistency"]


def words(n, seed=0):
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz ."))
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(letters, size=int(rng.integers(8, 30)))) for _ in range(n)]


TEXTS = words(130)


# --- streams -------------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_a_portion_at_a_time():
    read = []

    def texts():
        for i in range(10):
            read.append(i)
            yield f"t {i}"

    first, some = next(iter(portions(texts(), 4)))
    assert (first, some, len(read)) == (0, ["t 0", "t 1", "t 2", "t 3"], 4)
    assert [(first, len(some)) for first, some in portions(texts(), 4)] == [(0, 4), (4, 4), (8, 2)]
    assert list(portions(["a", "b"], 1)) == [(0, ["a", "b"])]


def test_a_long_stream_gives_the_means_of_the_list_and_no_single_rows(llama):
    whole = ss.measure(llama, TEXTS, METRICS, per_text=True)
    streamed = ss.measure(llama, ({"text": text, "id": i} for i, text in enumerate(TEXTS)), METRICS, batch_size=3)
    assert (whole.per_text, streamed.per_text, set(streamed.frame["text"])) == (True, False, {"all"})
    expected = whole.frame[whole.frame["text"] == "all"].reset_index(drop=True)
    pd.testing.assert_frame_equal(streamed.frame.reset_index(drop=True), expected, atol=1e-6, rtol=1e-6)
    pd.testing.assert_frame_equal(streamed.summary(), whole.summary(), atol=1e-6, rtol=1e-6)
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, TextResult)]
    with pytest.raises(ss.SinkscopeError, match=r"per_text=True\) keeps them"):
        streamed.top(text="text 3")
    with pytest.raises(ss.SinkscopeError, match=r"per_text=True\) keeps them"):
        streamed.sink_positions()
    assert "130 texts" in streamed.page()


def test_the_default_keeps_rows_of_up_to_a_hundred_texts(llama):
    assert ss.measure(llama, iter(TEXTS[:100]), ["sink_mass"]).per_text
    assert not ss.measure(llama, TEXTS[:101], ["sink_mass"]).per_text


def test_the_size_of_a_report_does_not_grow(llama):
    few, many = (ss.measure(llama, iter(words(n)), ["sink_mass", "row_entropy"], per_text=False) for n in (20, 60))
    assert len(few.frame) == len(many.frame)
    assert (len(few.summary()), len(many.summary())) == (42, 122)


def test_losses_of_many_texts_are_averaged_by_position(llama):
    fine = ss.evaluate(llama, TEXTS[:9], "window(size=4)", per_text=True)
    coarse = ss.evaluate(llama, iter(TEXTS[:9]), "window(size=4)", per_text=False)
    pd.testing.assert_frame_equal(fine.frame, coarse.frame)
    expected = fine.curves.groupby(["intervention", "position"], sort=False)["loss"].mean().reset_index()
    got = coarse.curves.drop(columns="text")
    pd.testing.assert_frame_equal(
        got.sort_values(["intervention", "position"]).reset_index(drop=True),
        expected.sort_values(["intervention", "position"]).reset_index(drop=True),
    )
    assert set(coarse.curves["text"]) == {"all"}
    assert "9 texts" in coarse.page() or "window" in coarse.page()


def test_files_that_are_streams(llama, tmp_path):
    for i, text in enumerate(TEXTS[:4]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[:4]), encoding="utf-8")
    values = [ss.measure(llama, given, ["sink_mass"]) for given in (TEXTS[:4], tmp_path, tmp_path / "c.jsonl")]
    assert values[1].texts == ["0.txt", "1.txt", "2.txt", "3.txt"]
    for other in values[1:]:
        np.testing.assert_array_equal(other.frame["value"], values[0].frame["value"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "so it goes"}, {"words": 3}], "text 1 has no field 'text'"),
        ([{"a": "so it", "b": "goes"}], "text 0 has no field 'text'"),
        (["so it goes", ""], "text 1 is empty"),
        (["so it goes", b"\xff"], "text 1"),
        ([], "stream is empty"),
    ],
)
def test_a_bad_row_is_named(llama, rows, message):
    for call in (lambda: ss.measure(llama, iter(rows)), lambda: ss.evaluate(llama, iter(rows), "window(size=4)")):
        assert message in str(attempt(call))


def test_what_can_not_be_decoded_in_the_middle_is_named_and_what_was_finished_is_kept(llama, tmp_path):
    lines = [json.dumps({"text": t}).encode() for t in words(450)]
    lines[420] = b'{"text": "\xff"}'
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ss.SinkscopeError, match=r"line 421 of .*c.jsonl' is not JSON in UTF-8"):
        ss.measure(llama, tmp_path / "c.jsonl", ["sink_mass"], resume=tmp_path / "out")
    (kept,) = (tmp_path / "out" / FOLDER).glob("*.npz")
    assert len(json.loads(str(np.load(kept)["about"]))["texts"]) == 256
    lines[420] = b'{"text": "mended"}'
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    report = ss.measure(llama, tmp_path / "c.jsonl", ["sink_mass"], resume=tmp_path / "out")
    assert len(report.texts) == 450


# --- going on ------------------------------------------------------------------------------------------------------------


def stopping(after, error=KeyboardInterrupt):
    seen, at = [], SimpleNamespace(after=after, error=error)  # no part of the metric

    @ss.metric(needs="mass", null=None)
    def stop(block):
        if block.layer == 0:
            seen.append(1)
            if len(seen) > at.after:
                raise at.error
        return block.mass

    return stop


def test_a_stream_goes_on_with_the_same_bits(llama, tmp_path):
    def run(folder, stop, texts=TEXTS):
        return ss.measure(llama, iter(texts), [*METRICS, stop], batch_size=8, resume=folder)

    whole = run(None, stopping(10**6))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopping(5))
    assert len(list((tmp_path / FOLDER).glob("*.npz"))) == 1
    with pytest.raises(ss.SinkscopeError, match="beginning of this run on other texts"):
        run(tmp_path, stopping(10**6), words(130, seed=9))
    with pytest.raises(ss.SinkscopeError, match="beginning of this run on other texts"):
        ss.measure(llama, iter(TEXTS[:3]), [*METRICS, stopping(10**6)], batch_size=8, resume=tmp_path, per_text=False)
    report = run(tmp_path, stopping(10**6))
    pd.testing.assert_frame_equal(report.frame, whole.frame, check_exact=True)
    pd.testing.assert_frame_equal(report.summary(), whole.summary(), check_exact=True)
    assert report.texts == whole.texts


def test_evaluate_goes_on_with_the_same_bits(llama, tmp_path, monkeypatch):
    texts, own, ran = TEXTS[:6], causal._One._run, []

    def counted(self, capture, sequence, *rest):
        ran.append(sequence.label)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return own(self, capture, sequence, *rest)

    monkeypatch.setattr(causal._One, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        ss.evaluate(llama, texts, "window(size=4)", resume=tmp_path)
    ran[:] = ["", "", "", "", ""]
    report = ss.evaluate(llama, texts, "window(size=4)", resume=tmp_path)
    assert ran[5:] == ["text 3", "text 4", "text 5"]
    whole = ss.evaluate(llama, texts, "window(size=4)")
    for table in ("frame", "details", "curves"):
        pd.testing.assert_frame_equal(getattr(report, table), getattr(whole, table), check_exact=True)
    assert report.about == whole.about
    report.save(tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_two_runs_in_one_directory_are_refused(llama, tmp_path):
    (tmp_path / FOLDER).mkdir()
    with (tmp_path / FOLDER / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for call in (
            lambda: ss.measure(llama, TEXTS[:2], ["sink_mass"], resume=tmp_path),
            lambda: ss.evaluate(llama, TEXTS[:2], "window(size=4)", resume=tmp_path),
            lambda: ss.measure(llama, TEXTS[:2], ["sink_mass"]).save(tmp_path),
        ):
            assert "another run is writing to" in str(attempt(call))
    ss.measure(llama, TEXTS[:2], ["sink_mass"], resume=tmp_path).save(tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_a_full_disk_says_so_and_keeps_what_is_finished(llama, tmp_path, monkeypatch):
    own, written = np.savez, []

    def full(file, **arrays):
        written.append(1)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        own(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ss.SinkscopeError, match=r"No space left on device\. What is finished stays there"):
        ss.measure(llama, TEXTS[:30], METRICS, batch_size=4, resume=tmp_path)
    assert len(list((tmp_path / FOLDER).glob("*.npz"))) == 2
    assert not list((tmp_path / FOLDER).glob("*.half"))
    monkeypatch.undo()
    report = ss.measure(llama, TEXTS[:30], METRICS, batch_size=4, resume=tmp_path)
    pd.testing.assert_frame_equal(report.frame, ss.measure(llama, TEXTS[:30], METRICS, batch_size=4).frame)


def test_a_directory_that_vanishes_is_made_again(llama, tmp_path):
    import shutil

    @ss.metric(needs="mass", null=None)
    def removing(block):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return block.mass

    report = ss.measure(llama, TEXTS[:9], ["sink_mass", removing], batch_size=3, resume=tmp_path / "out")
    report.save(tmp_path / "out")
    assert ss.load_report(tmp_path / "out").texts == report.texts


# --- several processes ---------------------------------------------------------------------------------------------------


def launch(processes, *arguments, code=None):
    """`sinkscope ARGUMENTS`, or a script, in one process or under torchrun, a thread each."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += [] if code else ["-m"]
    start += [str(code)] if code else ["sinkscope"]
    where = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | where, timeout=200)


@pytest.mark.slow
def test_two_processes_print_and_write_what_one_gives(saved_model, tmp_path):
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[:20]), encoding="utf-8")
    given = ("--file", tmp_path / "c.jsonl", "--metric", "sink_mass", "--batch-size", 3, "--out", tmp_path / "two")
    done = launch(2, "measure", saved_model, *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sink_mass") == 1  # by the first alone
    one = ss.measure(ss.load_model(saved_model), tmp_path / "c.jsonl", ["sink_mass"], batch_size=3)
    two = ss.load_report(tmp_path / "two")
    pd.testing.assert_frame_equal(one.frame, two.frame, atol=1e-12, rtol=0)
    pd.testing.assert_frame_equal(one.summary(), two.summary(), atol=1e-12, rtol=0, check_dtype=False)
    assert (one.texts, one.about["sentences"]) == (two.texts, two.about["sentences"])


SHARED = """
import sys
import sinkscope as ss
from sinkscope.runs.share import joined
from tests.robust.test_corpora import METRICS, TEXTS

with joined() as share:
    model = ss.load_model(sys.argv[1])
    for kept in (True, False):
        report = ss.measure(model, TEXTS[:20], METRICS, batch_size=3, per_text=kept, distributed=True)
        effect = ss.evaluate(model, iter(TEXTS[:5]), "window(size=4)", per_text=kept, distributed=True)
        report.save(f"{sys.argv[2]}/measure-{kept}-{share.rank}")
        effect.save(f"{sys.argv[2]}/evaluate-{kept}-{share.rank}")
    mask = ss.sink_mask(model, iter(TEXTS[:20]), ["attention", "first"], batch_size=3, distributed=True)
    mask.save(f"{sys.argv[2]}/mask-{share.rank}")
"""


def test_every_process_gets_what_one_gives(saved_model, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED, encoding="utf-8")
    done = launch(2, saved_model, tmp_path, code=tmp_path / "shared.py")
    assert done.returncode == 0, done.stderr
    model = ss.load_model(saved_model)
    for kept in (True, False):
        report = ss.measure(model, TEXTS[:20], METRICS, batch_size=3, per_text=kept)
        effect = ss.evaluate(model, TEXTS[:5], "window(size=4)", per_text=kept)
        for rank in (0, 1):
            shared, edited = (ss.load_report(tmp_path / f"{verb}-{kept}-{rank}") for verb in ("measure", "evaluate"))
            pd.testing.assert_frame_equal(report.frame, shared.frame, atol=1e-12, rtol=0)
            pd.testing.assert_frame_equal(report.summary(), shared.summary(), atol=1e-12, rtol=0)
            pd.testing.assert_frame_equal(effect.frame, edited.frame, atol=1e-12, rtol=0)
            pd.testing.assert_frame_equal(effect.curves, edited.curves, atol=1e-12, rtol=0)
    mask = ss.sink_mask(model, TEXTS[:20], ["attention", "first"], batch_size=3).table()
    for rank in (0, 1):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"mask-{rank}" / "mask.parquet"), mask)


SCRIPT = """
import os
import sinkscope as ss
from sinkscope.runs.share import joined
from sinkscope.testing import tiny_model

@ss.metric(needs="mass", null=None)
def dies(block):
    if os.environ["RANK"] == "1" and block.layer == 1:
        raise ZeroDivisionError("of rank 1")
    return block.mass

with joined():
    ss.measure(tiny_model("llama"), ["so it goes"] * 9, [dies], batch_size=2, distributed=True)
    print("the end")
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_its_error(tmp_path):
    (tmp_path / "dies.py").write_text(SCRIPT, encoding="utf-8")
    done = launch(2, code=tmp_path / "dies.py")
    assert done.returncode != 0
    assert "metric 'dies' raised ZeroDivisionError in layer 1: of rank 1" in done.stderr
    assert "the end" not in done.stdout


def test_distributed_needs_a_process_group(llama):
    with pytest.raises(ss.SinkscopeError, match="no process group"):
        ss.measure(llama, TEXTS[:2], distributed=True)


# --- several devices -----------------------------------------------------------------------------------------------------

FIRST = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"]
LAST = ["model.layers.2", "model.norm", "lm_head"]


def same_numbers(model, other):
    for engine in ("flash", "hooks"):
        kept, expected = (
            ss.measure(m, TEXTS[:3], ["sink_mass", "row_entropy", "key_norm"], engine=engine) for m in (model, other)
        )
        np.testing.assert_allclose(kept.frame["value"], expected.frame["value"], atol=1e-5)
    edits = ["mask_keys(keys=[0])", "zero_value(keys=[0])", "window(size=4)", "streaming_window(size=6, sinks=2)"]
    kept, expected = (ss.evaluate(m, TEXTS[:3], edits) for m in (model, other))
    np.testing.assert_allclose(kept.frame["loss"], expected.frame["loss"], atol=1e-5)


@pytest.mark.parametrize("where", ["auto", "some on disk", "the first on disk"])
def test_a_model_that_is_not_all_in_memory(saved_model, tmp_path, where):
    spread = dict.fromkeys([*FIRST, *LAST], "cpu")
    spread |= {"some on disk": {"model.layers.1": "disk"}, "the first on disk": {"model.embed_tokens": "disk"}}.get(where, {})
    given = "auto" if where == "auto" else spread
    model = attempt(lambda: ss.load_model(saved_model, device_map=given, offload_folder=tmp_path))
    if isinstance(model, ss.SinkscopeError):  # TransformerLens 3.9
        assert "offload" in str(model)
        return
    same_numbers(model, ss.load_model(saved_model))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_a_model_on_two_gpus(saved_model):
    spread = dict.fromkeys(FIRST, 0) | dict.fromkeys(LAST, 1)
    same_numbers(ss.load_model(saved_model, device_map=spread), ss.load_model(saved_model, device="cpu"))


def test_a_map_leaves_no_other_choice(saved_model):
    with pytest.raises(ss.SinkscopeError, match="leave out device="):
        ss.load_model(saved_model, device_map="auto", device="cpu")
