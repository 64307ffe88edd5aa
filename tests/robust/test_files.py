"""What a directory holds after kills, full disks, damage and links: a whole report, the old one or the new one, or none."""

import json
import os
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.reports import files, seals
from sinkscope.reports.seals import HALF, SEAL, WHOLE
from sinkscope.runs import store as runs
from sinkscope.runs.resume import FOLDER, LOCK, Finished, Running, Store, kept_runs
from sinkscope.runs.share import Share
from tests.conftest import attempt

SAVED = sorted(p.parent for p in (Path(__file__).parents[1] / "data" / "saved").rglob(SEAL))
TEXTS = ["so it goes", "and on", "and on it goes"]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- reports of earlier versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", SAVED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_reports_of_every_version_open(folder, tmp_path):
    report = ss.load_report(folder)
    assert isinstance(report, ss.EffectReport if folder.name == "evaluate" else ss.SinkReport)
    name = "effects" if folder.name == "evaluate" else "measurements"
    written = pd.read_csv(folder / f"{name}.csv").convert_dtypes(dtype_backend="numpy_nullable")
    numbers = list(report.frame.select_dtypes("number"))
    pd.testing.assert_frame_equal(written[numbers].astype(float), report.frame[numbers].astype(float), check_dtype=False)
    assert report.about["model"] in report.page()
    assert not report.summary().empty
    report.save(tmp_path)
    again = ss.load_report(tmp_path)
    pd.testing.assert_frame_equal(again.frame, report.frame)
    assert again.about == report.about


@pytest.mark.parametrize("stem", ["effects", "details", "curves"])
def test_a_row_that_stands_twice_is_said(tmp_path, stem):
    """In a report of 0.1.0, whose files no checksum vouches for."""
    shutil.copytree(next(p for p in SAVED if p.name == "evaluate" and p.parent.name == "0.1.0"), tmp_path / "r")
    path = tmp_path / "r" / f"{stem}.parquet"
    table = pd.read_parquet(path)
    pd.concat([table, table.tail(1)], ignore_index=True).to_parquet(path)
    with pytest.raises(ss.SinkscopeError, match=f"{stem}.parquet has two rows of one text and intervention"):
        ss.load_report(tmp_path / "r")


def test_every_version_is_there():
    assert {p.parent.name for p in SAVED} >= {"0.1.0"}


# --- kills and full disks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory, llama):
    """Two reports: directory, what fills another one like it, and the seal."""
    made = {}
    for name, metrics, texts in (("old", ["sink_mass", "position_profile"], TEXTS[:2]), ("new", ["sink_mass"], TEXTS)):
        report = ss.measure(llama, texts, metrics)
        folder = report.save(tmp_path_factory.mktemp("both") / name)
        fills = {n: partial(Path.write_bytes, data=data) for n, data in content(folder).items() if n != SEAL}
        made[name] = (folder, fills, report)
    return made


def which(folder, both):
    """Say which of both a directory holds, to the last number."""
    back = ss.load_report(folder)
    (name,) = [n for n, (_, _, report) in both.items() if report.frame.equals(back.frame) and report.about == back.about]
    pd.testing.assert_frame_equal(back.summary(), both[name][2].summary(), check_dtype=False)
    return name


def killed_at(step, call):
    """Run in a process that is killed before its n-th change to the file system; tell whether it got to its end."""
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")

    def hook(event, arguments):
        nonlocal step
        if event in changes and (event != "open" or not isinstance(arguments[1], str) or arguments[1][0] in "wxa"):
            step -= 1
            if step == 0:
                os._exit(9)

    pid = os.fork()
    if pid == 0:
        sys.addaudithook(hook)
        try:
            call()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("version", ["old", "0.1.0"])
def test_a_kill_at_any_moment_leaves_the_old_report_or_the_new_one(both, tmp_path, version):
    (before, _, _), (_, fills, new) = both["old"], both["new"]
    if version == "0.1.0":
        before = Path(__file__).parents[1] / "data" / "saved" / "0.1.0" / "measure"
        both = both | {"old": (before, {}, ss.load_report(before))}
    seen = []
    for step in range(1, 99):
        folder = tmp_path / str(step)
        shutil.copytree(before, folder)
        (folder / "mine.png").write_bytes(b"mine")
        code = killed_at(step, lambda folder=folder: seals.replace(folder, fills, new.about))
        seen.append(which(folder, both))
        assert (folder / "mine.png").read_bytes() == b"mine"
        if code == 0:
            break
        assert code == 9
        if step % 3 == 0:  # whatever was left, the next save is whole
            seals.replace(folder, fills, new.about)
            assert set(content(folder)) == {*fills, SEAL, "mine.png"}
            assert which(folder, both) == "new"
    assert code == 0
    assert seen == sorted(seen, reverse=True)  # once it is the new one, it stays
    assert min(seen.count("old"), seen.count("new")) > 5
    assert set(content(folder)) == {*fills, SEAL, "mine.png"}


def test_a_kill_of_the_first_save_leaves_no_report_or_all_of_it(both, tmp_path):
    _, fills, new = both["new"]
    seen = set()
    for step in range(1, 99):
        (tmp_path / str(step)).mkdir()
        code = killed_at(step, lambda step=step: seals.replace(tmp_path / str(step), fills, new.about))
        got = attempt(lambda step=step: which(tmp_path / str(step), both))
        assert got == "new" or "no finished report" in str(got)
        seen.add(str(got)[:3])
        if code == 0:
            break
    assert len(seen) == 2


def test_a_disk_that_fills_up_at_any_file_leaves_the_old_report_as_it_was(both, tmp_path):
    (before, _, _), (_, fills, new) = both["old"], both["new"]
    shutil.copytree(before, tmp_path / "out")

    def full(at):
        at.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    for name in fills:
        with pytest.raises(ss.SinkscopeError, match=f"can't write .*{name}': No space left on device"):
            seals.replace(tmp_path / "out", fills | {name: full}, new.about)
        assert content(tmp_path / "out") == content(before)
        assert not (tmp_path / "out" / HALF).exists()


def test_an_old_report_survives_a_full_disk(both, tmp_path):
    """A disk that is really full, as far as a process can be told so."""
    (before, _, _), (_, fills, new) = both["old"], both["new"]
    shutil.copytree(before, tmp_path / "out")

    def save(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        seals.replace(tmp_path / "out", fills, new.about)

    sizes = sorted({0, 100, *(len(data) - 1 for data in content(both["new"][0]).values())})
    for size in sizes:
        assert killed_at(0, lambda size=size: save(size)) == 1
        assert content(tmp_path / "out") == content(before)


# --- damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["measure", "evaluate"])
def test_the_damaged_file_is_named(kind, tmp_path):
    report = ss.load_report(next(p for p in SAVED if p.name == kind))
    folder = report.save(tmp_path / "good")
    for name in content(folder):
        shutil.copytree(folder, tmp_path / "bad", dirs_exist_ok=True)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (tmp_path / "bad" / name).write_bytes(data)
        with pytest.raises(ss.SinkscopeError, match=rf"can't be read: {name} is damaged"):
            ss.load_report(tmp_path / "bad")
        (tmp_path / "bad" / name).unlink()
        needed = name.endswith((".parquet", ".json")) and name != "attention.parquet"
        got = attempt(lambda: ss.load_report(tmp_path / "bad"))
        assert ("missing" in str(got) or "no finished report" in str(got)) == needed, (name, got)


def column(name, values, table="summary"):
    """Put something else into a column of a table."""

    def change(folder):
        frame = pd.read_parquet(folder / f"{table}.parquet")
        frame[name] = values(len(frame)) if values else frame[name]
        (frame if values else frame.drop(columns=name)).to_parquet(folder / f"{table}.parquet")

    return change


def said(change):
    def changed(folder):
        about = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        change(about)
        (folder / SEAL).write_text(json.dumps(about), encoding="utf-8")

    return changed


FORGED = {
    "bytes for numbers": column("value", lambda n: [b"x"] * n),
    "lists for numbers": column("value", lambda n: [[1.0]] * n),
    "words for numbers": column("value", lambda n: ["1"] * n),
    "numbers for words": column("text", lambda n: [1.0] * n),
    "nothing for words": column("metric", lambda n: ["a"] * (n - 1) + [None]),
    "a column less": column("null", None),
    "another text": column("text", lambda n: ["who?"] * n),
    "numbers below zero": column("tokens", lambda n: [-1] * n, "measurements"),
    "a query twice": column("query", lambda n: [0] * n, "attention"),
    "no seal of JSON": lambda folder: (folder / SEAL).write_text("[" * 100_000),
    "a list for a seal": lambda folder: (folder / SEAL).write_text("[]"),
    "not UTF-8": lambda folder: (folder / SEAL).write_bytes(b'{"a": "\xff"}'),
    "no texts": said(lambda about: about.pop("texts")),
    "texts that are words": said(lambda about: about.update(texts=["a"])),
    "tokens that are numbers": said(lambda about: about["texts"][0].update(tokens=[1])),
    "no arguments": said(lambda about: about.update(arguments=[])),
    "true for a number": said(lambda about: about["texts"][0].update(n_tokens=True)),
    "no engine": said(lambda about: about.update(engine=None)),
    "checksums that are none": said(lambda about: about.update(files={SEAL: 5})),
    "checksums of others": said(lambda about: about.update(files={SEAL: "0" * 64, "../../x": "1" * 64})),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_looks_otherwise_than_a_report_is_refused_in_one_line(what, tmp_path):
    shutil.copytree(next(p for p in SAVED if p.name == "measure"), tmp_path / "bad")  # of 0.1.0: no checksums
    FORGED[what](tmp_path / "bad")
    with pytest.raises(ss.SinkscopeError, match="can't be read: ") as error:
        ss.load_report(tmp_path / "bad")
    assert "\n" not in str(error.value)


def test_an_evil_seal_deletes_nothing_elsewhere(llama, tmp_path):
    """A directory from elsewhere, whose seal names files that are none of a report's: a report is saved over it."""
    victim, out = tmp_path / "victim.csv", tmp_path / "out"
    out.mkdir()
    for at in (victim, out / "notes.csv", out / "mine.txt"):
        at.write_text("mine")
    digest = seals.digest_of(b"mine")
    evil = {
        "sinkscope": "0.2",
        "files": {"../victim.csv": digest, "notes.csv": "0" * 64, "mine.txt": digest, str(victim): digest},
    }
    (out / SEAL).write_text(json.dumps(evil))
    shutil.copytree(out, out / WHOLE)
    report = ss.measure(llama, TEXTS, ["sink_mass"])
    with pytest.raises(ss.SinkscopeError, match="something else than a report is in the way"):
        report.save(out)
    (out / WHOLE / "mine.txt").unlink()
    report.save(out)
    assert [p.read_text() for p in (victim, out / "notes.csv", out / "mine.txt")] == ["mine"] * 3
    assert ss.load_report(out).texts == ["text 0", "text 1", "text 2"]


# --- the folder of an unfinished run ---------------------------------------------------------------------------------------


VERBS = {
    "texts": lambda model, out: ss.measure(model, TEXTS, ["sink_mass", "position_profile"], batch_size=1, resume=out),
    "means": lambda model, out: ss.measure(model, TEXTS, ["sink_mass"], batch_size=1, resume=out, per_text=False),
    "evaluate": lambda model, out: ss.evaluate(model, TEXTS, "window(size=4)", resume=out),
}
TAKEN = {
    "texts": lambda store: Finished(store).has(SEQUENCES[:1]),
    "means": lambda store: bool(Running(store, Share()).batches),
    "evaluate": lambda store: kept_runs(store, SEQUENCES[0]) is not None,
}
SEQUENCES = ss.tokenize(None, [[1, 2, 3]]).sequences


class Named(Store):
    """A store in which all is in one file."""

    def name(self, sequences):
        return "a" * 32


def kept(verb, folder):
    """What a run kept, under one name."""
    first = min((folder / FOLDER).glob("*.npz"))
    about, arrays = Store(folder / FOLDER, "").read(first.stem)
    store = Named(folder / FOLDER, "")
    name = f"{store.name([])}-0-of-1" if verb == "means" else store.name([])
    store.write(name, about, arrays)
    return store, name, about, arrays


@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_batch_is_run_again(verb, llama, tmp_path):
    whole = VERBS[verb](llama, tmp_path)
    store, name, about, arrays = kept(verb, tmp_path)
    path = store.folder / f"{name}.npz"
    good = path.read_bytes()
    assert TAKEN[verb](store)
    places = [0, 6, 8, *range(20, len(good), len(good) // 40), good.find(b"PK\x01\x02") + 8, len(good) - 3]
    for n in places:
        for data in (good[:n], good[:n] + bytes([good[n] ^ 33]) + good[n + 1 :], good[:n] + b"[" * 10**5):
            path.write_bytes(data)
            taken = store.read(name)
            assert taken is None or (taken[0] == about and all((taken[1][k] == v).all() for k, v in arrays.items()))
    path.write_bytes(good[: len(good) // 2])
    assert not TAKEN[verb](store)
    forged = [5, None, [[5]], [5], {"runs": [5], "located": {}}, {"batches": 5}, "x", {}, [[], []]]
    forged += [dict(about, **{key: [[1, 2]]}) for key in about] if isinstance(about, dict) else []
    for thing in forged:  # with a digest that is right
        store.write(name, thing, arrays)
        assert not TAKEN[verb](store), thing
    store.write(name, about, {})
    assert not TAKEN[verb](store)
    path.unlink()
    for kept_file in (tmp_path / FOLDER).glob("*.npz"):
        kept_file.write_bytes(kept_file.read_bytes()[:-40])
    pd.testing.assert_frame_equal(VERBS[verb](llama, tmp_path).frame, whole.frame, check_exact=True)


def test_a_file_under_another_name_is_not_taken_up(tmp_path):
    store = Store.of(tmp_path, {})
    store.write("a" * 32, [1], {"x": np.arange(3)})
    shutil.copy(store.folder / f"{'a' * 32}.npz", store.folder / f"{'b' * 32}.npz")
    assert store.read("a" * 32)[0] == [1]
    assert store.read("b" * 32) is None


def test_what_json_can_not_hold_counts_in_a_runs_name():
    first, second = (Store.of(None, {"weights": np.zeros(2000) + (np.arange(2000) == at)}) for at in (900, 901))
    assert first.run != second.run
    assert first.run == Store.of(None, {"weights": np.zeros(2000) + (np.arange(2000) == 900)}).run


@pytest.mark.parametrize("link", [FOLDER, f"{FOLDER}/{LOCK}"])
def test_no_link_is_followed(link, llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{'a' * 32}.npz").write_text("keep")
    out = tmp_path / "out"
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(tmp_path / "mine" if link == FOLDER else tmp_path / "mine" / f"{'a' * 32}.npz")
    report = ss.measure(llama, TEXTS, ["sink_mass"])
    for call in (
        lambda: report.save(out),
        lambda: runs.forget(out),
        *(lambda v=verb: VERBS[v](llama, out) for verb in VERBS),
    ):
        assert "is a link, which is not followed: remove it" in str(attempt(call))
    assert (tmp_path / "mine" / f"{'a' * 32}.npz").read_text() == "keep"
    assert len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize("hidden", [HALF, WHOLE])
def test_hidden_folders_that_are_links_are_refused(hidden, llama, tmp_path):
    shutil.copytree(next(p for p in SAVED if p.name == "measure"), tmp_path / "mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / hidden).symlink_to(tmp_path / "mine")
    before = content(tmp_path / "mine")
    assert "is a link" in str(attempt(lambda: ss.measure(llama, TEXTS, ["sink_mass"]).save(tmp_path / "out")))
    assert content(tmp_path / "mine") == before


def test_only_files_of_ours_are_dropped(llama, tmp_path):
    mine = tmp_path / FOLDER
    mine.mkdir()
    for name in ("x.npz", "data.half", "lock", f"{'g' * 32}.npz", f"{'a' * 31}.npz"):
        (mine / name).write_text("keep")
    kept = content(mine)
    VERBS["texts"](llama, tmp_path).save(tmp_path)
    assert {name: data for name, data in content(mine).items() if name != LOCK} == kept


def test_a_link_for_a_half_written_file_is_not_written_through(tmp_path):
    store = Store.of(tmp_path, {})
    store.folder.mkdir()
    (tmp_path / "mine").write_text("keep")
    for at in (store.folder / "a.half", store.folder / "a.npz", tmp_path / ".x.csv.half"):
        at.symlink_to(tmp_path / "mine")
    assert store.read("a") is None
    store.write("a", [1], {})
    files.write(tmp_path / "x.csv", lambda p: p.write_text("new"))
    assert store.read("a") == ([1], {})
    assert (tmp_path / "mine").read_text() == "keep"
