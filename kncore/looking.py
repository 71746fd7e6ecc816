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
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from kncore.neurons import Neuron, top
from kncore.stats import Estimate
from kncore.stored import visible

MIME = "application/vnd.vegalite.v5+json"
DIGITS = 4
MARKED = "datum.row === on || indexof(pinned, datum.row) >= 0"
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


def attribution_map(
    scores: Float[Tensor, "block neuron"],
    words: Callable[[Neuron], str],
    *,
    strongest: int = 400,
    bins: int = 192,
    name: int = 5,
    unit: str = "probability",
) -> Spec:
    """Blocks × neurons: the `strongest` scores by size, each as wide as one of `bins` pixels, with its rank by size.

    `words` says what the value vector of a neuron promotes; where it says nothing of any, that line is left out. The
    neurons with the `name` highest scores are numbered, as in the picture.
    """
    n_blocks, n_neurons = scores.shape
    drawn = [neuron for neuron, _ in top(scores.abs(), strongest)]
    numbered = {neuron: str(rank) for rank, (neuron, _) in enumerate(top(scores, name), 1)}
    rows = pd.DataFrame(
        {
            "block": [neuron.block for neuron in drawn],
            "neuron": [neuron.index for neuron in drawn],
            "score": [float(scores[*neuron]) for neuron in drawn],
            "promotes": [words(neuron) for neuron in drawn],
            "name": [numbered.get(neuron, "") for neuron in drawn],
        }
    )
    told = [
        {"field": "which", "title": "block·neuron"},
        {"field": "row", "title": "rank by size"},
        {"field": "score", "title": f"score ({unit})"},
    ]
    told += [{"field": "promotes", "title": "promotes"}] * bool(rows.promotes.any())
    size, half = _short(rows.score.abs().max()), n_neurons / min(bins, n_neurons) / 2
    across = {"field": "neuron", "type": "quantitative", "scale": {"domain": [0, n_neurons], "nice": False}}
    up = {"field": "block", "type": "quantitative", "scale": {"domain": [-0.5, n_blocks - 0.5], "nice": False}}
    return _spec(
        "attribution-map",
        rows,
        [
            {"calculate": "datum.block + '·' + datum.neuron", "as": "which"},
            {"calculate": f"datum.neuron - {half}", "as": "left"},
            {"calculate": f"datum.neuron + {half}", "as": "right"},
            {"calculate": "datum.block - 0.5", "as": "below"},
            {"calculate": "datum.block + 0.5", "as": "above"},
        ],
        width=640,
        height=max(170, 14 * n_blocks),
        encoding={
            "x": across | {"axis": {"title": "neuron", "grid": False, "tickCount": 8, "format": "d"}},
            "y": up | {"axis": {"title": "block", "grid": False, "tickMinStep": 1}},
        },
        layer=[
            {
                "mark": {"type": "rect", "clip": True},
                "encoding": {
                    "x": across | {"field": "left"},
                    "x2": {"field": "right"},
                    "y": up | {"field": "below"},
                    "y2": {"field": "above"},
                    "order": {"field": "row", "sort": "descending"},
                    "color": {
                        "field": "score",
                        "type": "quantitative",
                        "scale": {"domain": [-size, size], "domainMid": 0},
                        "legend": {"title": ["score", f"({unit})"], "format": "~g"},
                    },
                },
            },
            {
                "transform": [{"filter": "datum.name"}],
                "mark": {"type": "text", "dx": 11, "fontWeight": "bold", "color": {"expr": "ink"}},
                "encoding": {"text": {"field": "name"}},
            },
            _points(told, 130),
        ],
    )


def trace_maps(
    traces: Mapping[str, tuple[Float[Tensor, "token block"], Sequence[str], Sequence[int], tuple[int, int]]], label: str
) -> Spec:
    """Effects of restoring states, tokens × blocks, side by side; the arguments are those of `figures.trace_maps`.

    The traces are of one prompt: tokens and blocks are those of the first.
    """
    _, tokens, blocks, (first, last) = next(iter(traces.values()))
    shown = [visible(word.strip()) + "*" * (first <= place <= last) for place, word in enumerate(tokens)]
    rows = [
        (site, place, blocks[at], float(value))
        for site, (effect, *_) in traces.items()
        for (place, at), value in np.ndenumerate(np.asarray(effect))
    ]
    rows = pd.DataFrame(rows, columns=["site", "place", "block", "effect"])
    told = [
        {"field": "site", "title": "restored"},
        {"field": "token", "title": "token"},
        {"field": "block", "title": "block"},
        {"field": "effect", "title": label},
    ]
    ordered = {"type": "ordinal", "scale": {"paddingInner": 0, "paddingOuter": 0}}
    return _spec(
        "trace",
        rows,
        [{"calculate": "tokens[datum.place]", "as": "token"}],
        [{"name": "tokens", "value": shown}],
        facet={"field": "site", "type": "nominal", "sort": list(traces), "header": {"title": None}},
        columns=len(traces),
        spec={
            "width": 170,
            "height": 22 * len(tokens),
            "encoding": {
                "x": ordered
                | {
                    "field": "block",
                    "axis": {"title": "block", "values": list(blocks)[:: max(1, round(len(blocks) / 6))]}
                    | {"labelAngle": 0},
                },
                "y": ordered | {"field": "place", "axis": {"title": None, "labelExpr": "tokens[datum.value]"}},
                "tooltip": told,
            },
            "layer": [
                {
                    "mark": "rect",
                    "encoding": {
                        "color": {
                            "field": "effect",
                            "type": "quantitative",
                            "scale": {
                                "scheme": "cividis",
                                "domain": [0, _short(max(rows.effect.max(), 0)) or 1],
                                "clamp": True,
                            },
                            "legend": {"title": label, "orient": "bottom", "gradientLength": 200},
                        }
                    },
                },
                {
                    "mark": {"type": "rect", "filled": False, "stroke": "#D55E00", "strokeWidth": 2.5},
                    "encoding": {"opacity": {"condition": {"test": MARKED, "value": 1}, "value": 0}},
                },
            ],
        },
    )


def curves(
    panels: Mapping[str, Mapping[str, Mapping[float, Estimate]]],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str],
    model: str,
) -> Spec:
    """Estimates along a logarithmic axis, as `figures.curves` draws them, of one model; see `combine` for several."""
    rows = [
        (model, panel, what, at, *point)
        for panel, lines in panels.items()
        for what, points in lines.items()
        for at, point in points.items()
    ]
    rows = pd.DataFrame(rows, columns=["model", "panel", "what", "at", "value", "low", "high", "n"])
    used = [what for what in colours if (rows.what == what).any()]
    told = [
        {"field": "model", "title": "model"},
        {"field": "what", "title": "of"},
        {"field": "at", "title": xlabel},
        {"field": "value", "title": ylabel},
        {"field": "interval", "title": "95 % interval"},
        {"field": "n", "title": "n"},
    ]
    side = {"type": "quantitative", "title": ylabel}
    dashed = {"condition": {"test": "datum.model === model", "value": [1, 0]}, "value": [4, 3]}
    return _spec(
        "dose",
        rows.replace([math.inf, -math.inf], np.nan),
        [
            {"filter": "datum.model === model || datum.model === beside"},
            {"calculate": "format(datum.low, '.3f') + ' to ' + format(datum.high, '.3f')", "as": "interval"},
        ],
        [{"name": "model", "value": model}, {"name": "beside", "value": ""}, {"name": "columns", "value": 4}],
        facet={"field": "panel", "type": "nominal", "sort": list(panels), "header": {"title": None}},
        columns=len(panels),
        spec={
            "width": 270,
            "height": 230,
            "encoding": {
                "x": {
                    "field": "at",
                    "type": "quantitative",
                    "scale": {"type": "log"},
                    "axis": {"title": xlabel, "grid": False, "tickCount": 4, "format": "~s"},
                },
                "color": {
                    "field": "what",
                    "type": "nominal",
                    "scale": {"domain": used, "range": [colours[what] for what in used]},
                    "legend": {
                        "title": None,
                        "orient": "top",
                        "columns": {"expr": "columns"},
                        "symbolType": "circle",
                        "symbolOpacity": 1,
                        "labelLimit": 0,
                    },
                },
                "detail": {"field": "model"},
                "y": side | {"field": "value"},
            },
            "layer": [
                {
                    "mark": {"type": "area", "opacity": 0.14},
                    "encoding": {"y": side | {"field": "low"}, "y2": {"field": "high"}},
                },
                {"mark": "line", "encoding": {"strokeDash": dashed}},
                {"mark": {"type": "circle", "size": 30, "opacity": 1}},
                _points(told, 110),
            ],
        },
    )


def combine(spec: Spec, others: Sequence[Spec]) -> Spec:
    """The curves of several models as one specification with two drop-downs: the model, and one to set beside it.

    Where there are no `others`, or the figure is not of one model's curves, it is returned as it is.
    """
    if spec["usermeta"]["look"] != "dose":
        return spec
    told = {_value(one, "model"): one for one in [spec, *others]}
    if len(told) < 2:
        return spec
    whole, names = copy.deepcopy(spec), list(told)
    whole["data"]["values"] = _texts(*told.values()).to_csv(index=False)
    choose = {
        "model": {"input": "select", "options": names, "name": "Model"},
        "beside": {"input": "select", "options": ["", *names], "labels": ["none", *names], "name": "Dashed"},
    }
    for parameter in whole["params"]:
        if parameter["name"] in choose:
            parameter["bind"] = choose[parameter["name"]]
    return whole


def data(*specs: Spec) -> pd.DataFrame:
    """The rows of specifications, one below the other: numbers where they declare them, else text."""
    parsed = {name for spec in specs for name in spec["data"].get("format", {}).get("parse", ())}
    rows = _texts(*specs)
    return rows.assign(**{name: pd.to_numeric(rows[name]) for name in rows if name in parsed})


def _texts(*specs: Spec) -> pd.DataFrame:
    """The rows of specifications as they stand there: a model called 010 is no number."""
    read = functools.partial(pd.read_csv, dtype=str, keep_default_na=False, na_values=[""])
    return pd.concat([read(io.StringIO(spec["data"]["values"])) for spec in specs])


def markup(spec: Spec, figure: int) -> str:
    """HTML that the book's script reads: the specification, as of the figure of that number in the cell above."""
    # In ASCII, since what reads the page takes some other characters for line ends.
    told = json.dumps(spec, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    begin = f'<div class="look" data-look="{escape(str(spec["usermeta"]["look"]))}" data-figure="{figure}">'
    return f'{begin}<script type="application/json">{told}</script></div>'


def _spec(
    kind: str, rows: pd.DataFrame, transform: Sequence[Spec], params: Sequence[Spec] = (), **rest: object
) -> Spec:
    """A specification of the house: data as CSV with numbered rows, and the parameters that the script sets."""
    exact = rows.apply(lambda column: column.map(_short if column.dtype == float else _shown))
    set_by_script = [{"name": "on", "value": 0}, {"name": "pinned", "value": []}, {"name": "ink", "value": "black"}]
    parse = {name: "number" for name in exact.select_dtypes("number")}  # else a sum of columns would join their text
    numbered = {"window": [{"op": "row_number", "as": "row"}]}
    return {
        "usermeta": {"look": kind},
        "data": {"values": exact.to_csv(index=False), "format": {"type": "csv", "parse": parse}},
        "params": [*set_by_script, *params],
        "transform": [numbered, *transform],
        **rest,
    }


def _points(told: Sequence[Spec], size: int) -> Spec:
    """Rings that show where the reader is; the one nearest to the pointer tells its row."""
    return {
        "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True}}],
        "mark": {"type": "point", "filled": False, "stroke": {"expr": "ink"}, "strokeWidth": 1.8, "size": size},
        "encoding": {
            "opacity": {"condition": {"test": MARKED, "value": 1}, "value": 0},
            "tooltip": told,
        },
    }


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) else value


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _value(spec: Spec, name: str) -> Any:
    return next(parameter["value"] for parameter in spec["params"] if parameter["name"] == name)
