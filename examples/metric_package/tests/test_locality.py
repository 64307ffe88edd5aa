"""What every metric package should test: the contract of a block metric, and one number that is known in advance."""

import pytest
from sinkscope_locality import locality

import sinkscope as ss


def test_it_keeps_the_contract() -> None:
    ss.testing.check_metric(locality)


def test_it_is_found_by_its_name_and_knows_a_planted_sink() -> None:
    """A head of the planted model pays exp(c) / (exp(c) + i) to BOS and 1 / (exp(c) + i) to each other key; here c = 0."""
    report = ss.measure(ss.testing.planted_sink(((0.0,),)), "x" * 63, ["locality"])
    expected = sum(min(1.0, 8 / (i + 1)) for i in range(64)) / 64
    (value,) = report.summary("all")["value"]
    assert value == pytest.approx(expected, abs=1e-5)
