"""`python -m sinkscope`: the command line."""

from sinkscope.cli import app

app(prog_name="sinkscope")
