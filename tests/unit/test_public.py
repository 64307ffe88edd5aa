"""What others build on: the public names with their arguments, the commands with their options, and the wheel.

A change here is a change for users: `python -m tests.unit.test_public` writes the new list, the changelog says why.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import typer

import sinkscope as ss
from sinkscope.cli import app
from sinkscope.edit import Edit
from sinkscope.reports.paged import Paged
from sinkscope.reports.pictures import Pictures

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("public.txt")


def lines():
    """One line per public function, method and attribute, with the arguments' names and defaults."""
    for name in sorted(ss.__all__):
        thing = getattr(ss, name)
        if inspect.ismodule(thing):
            for inner in sorted(getattr(thing, "__all__", [])):
                yield from described(f"{name}.{inner}", getattr(thing, inner))
        else:
            yield from described(name, thing)
    command = typer.main.get_command(app)
    for name, sub in sorted(command.commands.items()):
        options = sorted("/".join([*p.opts, *p.secondary_opts]) for p in sub.params if p.param_type_name == "option")
        arguments = [p.name.upper() for p in sub.params if p.param_type_name == "argument"]
        yield " ".join(["$ sinkscope", name, *arguments, *options])


def described(name, thing):
    if not callable(thing):
        yield name
        return
    yield name + arguments(thing)
    if inspect.isclass(thing) and not issubclass(thing, BaseException):
        # what an intervention's subclasses may say, the exits that all reports have, and their pictures
        contract = {name for base in (Edit, Paged, Pictures) if base in thing.__bases__ for name in vars(base)}
        for member in sorted({*vars(thing), *contract}):
            if not member.startswith("_"):
                value = inspect.getattr_static(thing, member)
                function = getattr(value, "__func__", value)
                yield f"{name}.{member}" + (arguments(function) if inspect.isfunction(function) else "")


def arguments(thing):
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    plain = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(plain))


def test_the_public_interface_is_the_one_on_record():
    assert SNAPSHOT.read_text(encoding="utf-8").splitlines() == list(lines())


def test_at_most_twenty_eight_public_names():
    assert len(ss.__all__) <= 28


def test_the_wheel_works_outside_the_checkout(tmp_path, saved_model):
    """Built, unpacked into a directory of its own, and run from there; its requirements are those of this environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "there", wheel], check=True, capture_output=True)
    code = (
        "import sys, sinkscope as ss; from pathlib import Path; "
        "from sinkscope import samples; from sinkscope.studies import report; "
        "assert Path(ss.__file__).parent == Path(sys.argv[1]); assert len(samples.samples()) == 5; report.published('bos');"
        "ss.measure(ss.load_model(sys.argv[2]), 'so it goes').save('out')"
    )
    where = os.environ | {"PYTHONPATH": str(tmp_path / "there")}
    command = [sys.executable, "-c", code, tmp_path / "there" / "sinkscope", saved_model]
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    listed = {str(p.relative_to(tmp_path / "there")) for p in (tmp_path / "there" / "sinkscope").rglob("*")}
    assert {"sinkscope/py.typed", "sinkscope/reports/page/page.html.j2", "sinkscope/samples/1_pangram.txt"} <= listed
    assert not [name for name in listed if "tests" in name]


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n", encoding="utf-8")
