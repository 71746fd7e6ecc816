"""Figures to look into: Vega-Lite specifications beside the pictures that print and pages without scripts keep.

A specification holds its data as CSV, rounded to `DIGITS`, and two parameters that the book's script sets: `on`, the
row under the reader's finger, and `pinned`, rows that stay marked. Without the script it is an ordinary chart.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from kncore.neurons import Neuron, top
from knpaper.figures import NUMBERED, PIXELS, Trace
from knpaper.stats import Estimate
from knpaper.stored import visible

MIME = "application/vnd.vegalite.v5+json"
DIGITS, STRONGEST = 4, 400  # digits of a number, and how many scores of an attribution map
MARKED = {"condition": {"test": "datum.row === on || indexof(pinned, datum.row) >= 0", "value": 1}, "value": 0}
Spec = dict[str, Any]


class Look:
    """One output of a cell: the picture that `figures` drew and the specification of the same to look into."""

    def __init__(self, drawn: Axes | Sequence[Axes], spec: Spec) -> None:
        from IPython.core.pylabtools import print_figure

        figure = (drawn if isinstance(drawn, Axes) else drawn[0]).figure
        self.picture, self.spec = print_figure(figure, "svg"), spec
        plt.close(figure)

    def __repr__(self) -> str:
        return f"<Look: {self.spec['usermeta']['look']}>"

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return {"image/svg+xml": self.picture, MIME: self.spec}


def attribution_map(scores: Float[Tensor, "block neuron"], words: Callable[[Neuron], str]) -> Spec:
    """Return blocks × neurons: the `STRONGEST` scores by size, each a pixel of the picture wide, with its rank by size.

    `words` says what the value vector of a neuron promotes; where it says nothing of any, that line is left out. The
    neurons with the highest scores are numbered, as in the picture.
    """
    n_blocks, n_neurons = scores.shape
    drawn = [neuron for neuron, _ in top(scores.abs(), STRONGEST)]
    numbered = {neuron: str(rank) for rank, (neuron, _) in enumerate(top(scores, NUMBERED), 1)}
    rows = [(*neuron, float(scores[*neuron]), words(neuron), numbered.get(neuron, "")) for neuron in drawn]
    rows = pd.DataFrame(rows, columns=["block", "neuron", "score", "promotes", "name"])
    titles = {"which": "block·neuron", "row": "rank by size", "score": "score (probability)"}
    titles |= {"promotes": "promotes"} if rows.promotes.any() else {}
    largest, half = _short(rows.score.abs().max()), n_neurons / min(PIXELS, n_neurons) / 2
    return _spec(
        "attribution-map",
        rows,
        left=f"datum.neuron - {half}",
        right=f"datum.neuron + {half}",
        height=max(170, 14 * n_blocks),
        neurons=[0, n_neurons],
        blocks=[-0.5, n_blocks - 0.5],
        scores=[-largest, largest],
        legend=["score", "(probability)"],
        points=_points(titles, 130),
    )


def trace_maps(traces: Mapping[str, Trace], label: str) -> Spec:
    """Return the effects of restoring states, tokens × blocks, side by side, as `figures.trace_maps` draws them.

    The traces are of one prompt: tokens and blocks are those of the first.
    """
    _, tokens, blocks, (first, last) = next(iter(traces.values()))
    rows = [
        (site, place, blocks[at], float(value))
        for site, (effect, *_) in traces.items()
        for (place, at), value in np.ndenumerate(np.asarray(effect))
    ]
    rows = pd.DataFrame(rows, columns=["site", "place", "block", "effect"])
    return _spec(
        "trace",
        rows,
        tokens=[visible(word.strip()) + "*" * (first <= place <= last) for place, word in enumerate(tokens)],
        sites=list(traces),
        columns=len(traces),
        height=22 * len(tokens),
        ticks=list(blocks)[:: max(1, round(len(blocks) / 6))],
        label=label,
        effects=[0, _short(max(rows.effect.max(), 0)) or 1],
        marked=MARKED,
    )


def curves(
    panels: Mapping[str, Mapping[str, Mapping[float, Estimate]]],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str],
    model: str,
) -> Spec:
    """Return one model's estimates along a logarithmic axis, as `figures.curves` draws them; see `combine` for more."""
    rows = [
        (model, panel, what, at, *point)
        for panel, lines in panels.items()
        for what, points in lines.items()
        for at, point in points.items()
    ]
    rows = pd.DataFrame(rows, columns=["model", "panel", "what", "at", "value", "low", "high", "n"])
    used = [what for what in colours if (rows.what == what).any()]
    titles = {"model": "model", "what": "of", "at": xlabel, "value": ylabel, "interval": "95 % interval", "n": "n"}
    return _spec(
        "dose",
        rows.replace([math.inf, -math.inf], np.nan),
        model=model,
        panels=list(panels),
        columns=len(panels),
        xlabel=xlabel,
        ylabel=ylabel,
        groups=used,
        colours=[colours[what] for what in used],
        points=_points(titles, 110),
    )


def combine(spec: Spec, others: Sequence[Spec]) -> Spec:
    """Return the curves of several models as one specification with drop-downs for a model and one beside it.

    Where there are no `others`, or the figure is not of one model's curves, it is returned as it is.
    """
    if spec["usermeta"]["look"] != "dose":
        return spec
    specs = {_value(each, "model"): each for each in [spec, *others]}
    if len(specs) < 2:
        return spec
    whole, names = copy.deepcopy(spec), list(specs)
    whole["data"]["values"] = _texts(*specs.values()).to_csv(index=False)
    choose = {
        "model": {"input": "select", "options": names, "name": "Model"},
        "beside": {"input": "select", "options": ["", *names], "labels": ["none", *names], "name": "Dashed"},
    }
    for parameter in whole["params"]:
        if parameter["name"] in choose:
            parameter["bind"] = choose[parameter["name"]]
    return whole


def data(*specs: Spec) -> pd.DataFrame:
    """Return the rows of specifications, one below the other: numbers where they declare them, else text."""
    parsed = {name for spec in specs for name in spec["data"].get("format", {}).get("parse", ())}
    rows = _texts(*specs)
    return rows.assign(**{name: pd.to_numeric(rows[name]) for name in rows if name in parsed})


def _texts(*specs: Spec) -> pd.DataFrame:
    """Return the rows of specifications as they stand there: a model called 010 is no number."""
    read = functools.partial(pd.read_csv, dtype=str, keep_default_na=False, na_values=[""])
    return pd.concat([read(io.StringIO(spec["data"]["values"])) for spec in specs])


def _filled(node: object, values: Mapping[str, object]) -> object:
    """Return a part of a specification with the values that "$name" stands for."""
    if isinstance(node, dict):
        return {name: _filled(value, values) for name, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, values) for value in node]
    return values[node[1:]] if isinstance(node, str) and node.startswith("$") else node


def _spec(kind: str, rows: pd.DataFrame, **values: object) -> Spec:
    """Return the specification in vega/<kind>.json, filled, with the data and the parameters that the script sets."""
    spec = _filled(json.loads((files("knpaper") / "vega" / f"{kind}.json").read_text(encoding="utf-8")), values)
    exact = rows.apply(lambda column: column.map(_short if column.dtype == float else _shown))
    parse = {name: "number" for name in exact.select_dtypes("number")}  # else a sum of columns would join their text
    set_by_script = [{"name": "on", "value": 0}, {"name": "pinned", "value": []}, {"name": "ink", "value": "black"}]
    return spec | {
        "usermeta": {"look": kind},
        "data": {"values": exact.to_csv(index=False), "format": {"type": "csv", "parse": parse}},
        "params": [*set_by_script, *spec.get("params", [])],
        "transform": [{"window": [{"op": "row_number", "as": "row"}]}, *spec["transform"]],
    }


def _points(titles: Mapping[str, str], size: int) -> Spec:
    """Return rings that show where the reader is; the one nearest to the pointer tells its row."""
    tooltip = [{"field": field, "title": title} for field, title in titles.items()]
    return {
        "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True}}],
        "mark": {"type": "point", "filled": False, "stroke": {"expr": "ink"}, "strokeWidth": 1.8, "size": size},
        "encoding": {"opacity": MARKED, "tooltip": tooltip},
    }


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) else value


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _value(spec: Spec, name: str) -> Any:
    return next(parameter["value"] for parameter in spec["params"] if parameter["name"] == name)
