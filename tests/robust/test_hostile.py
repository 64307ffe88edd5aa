"""Files and names of bad will: nothing of them is run, and what lies about its size is refused without taking the memory."""

import csv
import json
import pickle
import resource
import struct
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope.cli import app
from sinkscope.runs.resume import FOLDER, Store
from sinkscope.studies.report import Estimate, StudyReport, tabulate

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")']
FORMULAS += [
    "\n=1",
    "\uff1d1+1",
    "\uff0b1",
    "\uff0d1",
    "\uff20SUM(A1)",
    "a;=1+1",
    ";@x",
    "\x1b[31m=1",
    "\u202e=1",
    "\x85=1",
    "\0=1",
]
TERMINAL = "a\x1b[31mred\x1b]0;title\x07\u202e"


# --- names and tokens that go into files and terminals ---------------------------------------------------------------


def cells(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [cell for row in csv.reader(file) for cell in row]


def no_formulas(folder):
    found = [cell for path in folder.rglob("*.csv") for cell in cells(path)]
    assert len(found) > 10
    for cell in found:
        try:
            float(cell or 0)
        except ValueError:
            for part in cell.split(";"):
                assert not part.startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")), cell
            assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in cell), cell


def test_no_cell_is_a_formula(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(llama.cfg, "model_name", FORMULAS[0])
    texts = dict.fromkeys(FORMULAS, "so it goes")
    report = ss.measure(llama, texts, ["sink_mass", "sink_positions"])
    report.save(tmp_path / "measure")
    ss.evaluate(llama, texts, "window(size=4)").save(tmp_path / "evaluate")
    no_formulas(tmp_path)
    kept = ss.load_report(tmp_path / "measure")  # Parquet keeps what was there
    assert (kept.texts, set(kept.frame["model"])) == (FORMULAS, {FORMULAS[0]})


def test_no_cell_of_a_study_is_a_formula(tmp_path):
    table = tabulate("bos", "=evil()", [("@case", "+quantity", Estimate(-3.0, -4.0, 4.0), "-setting")])
    StudyReport("bos", "?", table, "v", "s", {}, {"p": lambda *, ax: ax.plot([0])}).save(tmp_path)
    no_formulas(tmp_path)


def test_nothing_reaches_the_terminal_but_text(saved_model, tmp_path):
    folder = tmp_path / TERMINAL
    folder.symlink_to(saved_model)
    (tmp_path / "t.txt").write_text("so it goes", encoding="utf-8")
    for arguments in (
        ["measure", str(folder), "--file", str(tmp_path / "t.txt"), "--metric", "sink_mass"],
        ["measure", TERMINAL, "--text", "so it goes"],
        ["measure", str(folder), "--text", "so it goes", "--metric", TERMINAL],
        ["evaluate", str(folder), "--text", "so it goes", "--intervention", TERMINAL],
        ["compare", TERMINAL],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code in (0, 1)
        for character in "\x1b\x07\u202e":
            assert character not in result.output, arguments


def test_labels_never_become_paths(llama, tmp_path):
    inside = tmp_path / "a" / "out"
    texts = {"../../escaped": "so it goes", "/etc/passwd": "and on", "a/b\\c": "so it is"}
    ss.measure(llama, texts, ["sink_mass"], resume=inside).save(inside)
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"out"}
    assert all(p.is_file() for p in inside.iterdir())


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """A limit that honest reading of these files stays far under, and believing them does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


NAME = "model.embed_tokens.weight"
LIES = {
    "header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "header longer than the file": struct.pack("<Q", 10_000) + b'{"a": 1}',
    "data beyond the file": safetensors({NAME: {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, 8192]}}),
    "a shape of 2^60": safetensors(
        {NAME: {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 16]}}, b"\0" * 16
    ),
    "offsets backwards": safetensors({NAME: {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, b"\0" * 16),
    "a negative shape": safetensors({NAME: {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, b"\0" * 16),
    "not JSON": safetensors(b"{nonsense", b"\0" * 16),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(saved_model, tmp_path, little_memory, lie):
    for path in saved_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(ss.SinkscopeError, match="can't load"):
        ss.load_model(tmp_path)


def header(tensors=1, pairs=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def word(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text


def honest_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (("context_length", 64), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 64)):
        getattr(writer, f"add_{add}")(value)
    writer.add_head_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path.read_bytes()


def claiming(path, name, truth, lie):
    """A file that is right but for one number of its header."""
    whole, said = honest_gguf(path), word(name) + struct.pack("<I", 4)
    assert whole.count(said + struct.pack("<I", truth)) == 1
    return whole.replace(said + struct.pack("<I", truth), said + struct.pack("<I", lie))


GGUF_LIES = {
    "2^60 tensors": lambda _: header(tensors=1 << 60),
    "2^60 pairs": lambda _: header(pairs=1 << 60),
    "a word of 2^60 letters": lambda _: header(pairs=1, body=word(b"general.architecture", 1 << 60)),
    "a list of 2^60 numbers": lambda _: header(
        pairs=1, body=word(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 4, 1 << 60) + b"\0" * 64
    ),
    "cut short": lambda path: honest_gguf(path)[:200],
    "no tensor data": lambda path: honest_gguf(path)[:-8000],
    "another width": lambda path: honest_gguf(path).replace(
        word(b"token_embd.weight") + struct.pack("<IQQ", 2, 32, 64),
        word(b"token_embd.weight") + struct.pack("<IQQ", 2, 1 << 40, 1 << 20),
    ),
    "2^31 layers": lambda path: claiming(path, b"llama.block_count", 1, 1 << 31),
    "layers of 2^31": lambda path: claiming(path, b"llama.feed_forward_length", 64, 1 << 31),
    "not GGUF": lambda _: b"GGML" + b"\0" * 100,
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("lie", GGUF_LIES)
def test_gguf_that_lies(tmp_path, little_memory, lie):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF_LIES[lie](tmp_path / "honest.gguf"))
    claims = "2^31" in lie
    with pytest.raises(ss.SinkscopeError, match="can't load .*: its header names" if claims else "can't load"):
        ss.load_model(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_files_cut_short(saved_model, tmp_path, little_memory, share):
    for path in saved_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    whole = honest_gguf(tmp_path / "honest.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    for path in (tmp_path, tmp_path / "cut.gguf"):
        with pytest.raises(ss.SinkscopeError, match="can't load"):
            ss.load_model(path)


# --- code that must not run ------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/sinkscope-was-here"),))


@pytest.fixture
def mark():
    path = Path("/tmp/sinkscope-was-here")
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def test_no_code_of_a_repository_is_run(saved_model, tmp_path, mark):
    for path in saved_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\n", encoding="utf-8")
    config = json.loads((tmp_path / "config.json").read_text())
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "auto_map": maps}))
    with pytest.raises(ss.SinkscopeError, match="can't load"):
        ss.load_model(tmp_path)
    assert not mark.exists()


def test_no_pickle_is_read(llama, tmp_path, mark):
    store = Store.of(tmp_path, {})
    (tmp_path / FOLDER).mkdir()
    bomb = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / FOLDER / "a.npz", about=bomb, b=bomb)
    mark.unlink(missing_ok=True)
    assert store.read("a") is None
    (tmp_path / FOLDER / "a.npz").write_bytes(pickle.dumps(Bomb()))
    assert store.read("a") is None
    assert not mark.exists()
