"""A report's tables as xarray Datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pandas import DataFrame

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.reports.tables import QUERY

if TYPE_CHECKING:
    import xarray as xr


def of_measurements(frame: DataFrame, column: str, about: Mapping[str, Any]) -> xr.Dataset:
    """Give a variable per metric, over those of `text, layer, head, key` that it has; see :meth:`SinkReport.to_xarray`."""
    xarray = _xarray()
    if column not in ("value", "null", "std_error"):
        raise unknown("column", column, ["value", "null", "std_error"])
    variables = []
    for name, rows in frame.groupby("metric", sort=False):
        axes = [a for a in ("text", "layer", "head", QUERY) if a in rows and rows[a].notna().all()]
        if rows.duplicated(axes).any():
            axes.append("key")
        index = rows[axes].astype({a: int for a in axes if a != "text"})
        variables.append(index.assign(**{str(name): rows[column]}).set_index(axes).to_xarray())
    merged: xr.Dataset = xarray.merge(variables, join="outer", compat="no_conflicts")
    return merged.assign_attrs(_attributes(about))


def of_effects(both: DataFrame, text: str | None, about: Mapping[str, Any]) -> xr.Dataset:
    """Give a variable per number, over text and intervention, in their order; see :meth:`EffectReport.to_xarray`."""
    _xarray()
    if text is not None and text not in set(both["text"]):
        raise unknown("text in this report", text, both["text"].unique())
    both = both if text is None else both[both["text"] == text]
    order = {axis: list(dict.fromkeys(both[axis])) for axis in ("text", "intervention")}
    numbers = both.drop(columns="model").assign(sink_position=both["sink_position"].astype(float))
    made: xr.Dataset = numbers.set_index(["text", "intervention"]).to_xarray().reindex(order)
    return made.assign_attrs(_attributes(about))


def _xarray() -> Any:
    """Import it, or say what to install."""
    try:
        import xarray
    except ImportError:
        raise SinkscopeError("to_xarray needs xarray: pip install xarray") from None
    return xarray


def _attributes(about: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(about[name]) for name in ("model", "engine", "dtype", "bos")}
