"""Figures to look into: sound Vega-Lite, data equal to what was given, the picture beside it, one place on a page."""

import json
import math

import altair
import jsonschema
import nbformat
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_notebook, new_output

from kncore.neurons import Neuron
from knpaper import figures, looking, stored
from knpaper.stats import Estimate

SCORES = torch.randn(4, 150, generator=torch.Generator().manual_seed(0)) / 7
TOKENS = ["The", " <b>", " of", ' "Rome"']
EFFECTS = {site: torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i, site in enumerate(("all", "MLP"))}
TRACES = {site: (effect, TOKENS, (0, 2, 4), (1, 2)) for site, effect in EFFECTS.items()}
COLOURS = {"the fact": figures.FACTS, "unused": "#123456", "random": figures.BASELINE}


def says(neuron: Neuron) -> str:
    return f"{neuron.block}, </script>`{neuron.index}`" if neuron.index % 2 else ""


def doses(shift: float) -> dict:
    points = {at: Estimate(0.5 + shift, 0.41234567 + shift, 0.6 + shift, 20) for at in (1, 10, 1000)}
    wide = {5: Estimate(0.25, -math.inf, math.inf, 1)}
    return {"what falls": {"the fact": points, "random": wide}, "which": {"the fact": points}}


def curves(model: str = "one", shift: float = 0.0) -> dict:
    return looking.curves(doses(shift), "neurons", "share", COLOURS, model)


def parameters(spec: dict) -> dict:
    return {one["name"]: one for one in spec["params"]}


SPECS = {
    "attribution-map": looking.attribution_map(SCORES, says),
    "attribution-map of few": looking.attribution_map(SCORES[:1, :3], says),
    "trace": looking.trace_maps(TRACES, "nats"),
    "dose": curves(),
    "dose of several": looking.combine(curves(), [curves("two", 0.1)]),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_specification_is_sound_vega_lite_and_plain_json(name):
    spec = SPECS[name]
    altair.Chart.from_dict(spec)  # raises where the schema is not met
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    assert spec["usermeta"]["look"] == name.split(" of ")[0]
    assert "://" not in json.dumps(spec)
    assert {"on", "pinned", "ink"} <= set(parameters(spec))


def test_the_check_of_specifications_sees_a_wrong_one():
    with pytest.raises(jsonschema.ValidationError):
        altair.Chart.from_dict(SPECS["dose"] | {"layer": [{"mark": "no such mark"}]})


def test_the_map_holds_the_strongest_neurons_with_their_scores_and_words():
    rows = looking.data(SPECS["attribution-map"])
    assert len(rows) == looking.STRONGEST
    sizes = SCORES.abs().flatten().sort(descending=True).values
    assert rows.score.abs().tolist() == pytest.approx(sizes[: looking.STRONGEST].tolist(), rel=1e-3)
    for row in rows.itertuples():
        assert row.score == pytest.approx(float(SCORES[row.block, row.neuron]), rel=1e-3)
        assert (row.promotes if isinstance(row.promotes, str) else "") == says(Neuron(row.block, row.neuron))
    named = rows.dropna(subset="name").set_index("name").score
    best = SCORES.flatten().sort(descending=True).values[:5]
    assert [named[str(rank)] for rank in range(1, 6)] == pytest.approx(best.tolist(), rel=1e-3)
    assert rows.score.map(lambda score: len(f"{score:.10g}".lstrip("-0.").replace(".", ""))).max() <= looking.DIGITS


def test_the_map_of_a_model_whose_vectors_cannot_be_read_has_no_line_of_words():
    assert "promotes" in json.dumps(SPECS["attribution-map"]["layer"])
    assert "promotes" not in json.dumps(looking.attribution_map(SCORES, lambda neuron: "")["layer"])


def test_a_trace_holds_every_effect_at_its_token_and_block():
    spec = SPECS["trace"]
    rows = looking.data(spec)
    assert len(rows) == 2 * 4 * 3
    for row in rows.itertuples():
        effect, tokens, blocks, _ = TRACES[row.site]
        assert row.effect == pytest.approx(float(effect[row.place, blocks.index(row.block)]), rel=1e-3)
    assert parameters(spec)["tokens"]["value"] == ["The", "<b>*", "of*", '"Rome"']


def test_curves_hold_every_estimate_and_what_the_data_do_not_bound_is_left_open():
    rows = looking.data(curves())
    assert len(rows) == 3 + 1 + 3
    told = rows.set_index(["panel", "what", "at"])
    for panel, lines in doses(0).items():
        for what, points in lines.items():
            for at, point in points.items():
                row = told.loc[(panel, what, at)]
                ends = [end if math.isfinite(end) else np.nan for end in (point.low, point.high)]
                assert [row.value, row.low, row.high] == pytest.approx([point.value, *ends], rel=1e-3, nan_ok=True)
    colour = curves()["spec"]["encoding"]["color"]["scale"]
    assert dict(zip(colour["domain"], colour["range"], strict=True)) == {
        "the fact": figures.FACTS,
        "random": figures.BASELINE,
    }


def test_curves_of_several_models_are_chosen_among_and_those_of_one_are_not():
    alone, other = curves(), curves("two", 0.1)
    before = json.dumps(alone)
    both = looking.combine(alone, [other])
    assert json.dumps(alone) == before
    assert looking.combine(alone, []) == looking.combine(alone, [curves()]) == alone
    assert "bind" not in json.dumps(alone)
    assert parameters(both)["model"]["value"] == "one"
    assert parameters(both)["model"]["bind"]["options"] == ["one", "two"]
    assert parameters(both)["beside"]["bind"]["options"] == ["", "one", "two"]
    rows = looking.data(both)
    for spec in (alone, other):
        mine = looking.data(spec)
        assert rows[rows.model == mine.model[0]].reset_index(drop=True).equals(mine)
    assert looking.combine(SPECS["trace"], [SPECS["trace"]]) == SPECS["trace"]


def look() -> looking.Look:
    return looking.Look(figures.trace_maps(TRACES, "nats"), SPECS["trace"])


def test_one_output_carries_the_picture_and_the_specification_and_the_figure_is_not_drawn_again():
    shown = look()
    data, metadata = InteractiveShell().display_formatter.format(shown)
    assert set(data) == {"image/svg+xml", looking.MIME, "text/plain"} and not metadata
    assert data["image/svg+xml"].startswith("<?xml") and data[looking.MIME] == SPECS["trace"]
    assert figures.plt.get_fignums() == []
    nb = new_notebook(cells=[new_code_cell("x", execution_count=1, outputs=[new_output("display_data", data)])])
    nb.cells[0].metadata.tags = ["parameters"]
    assert stored.problems(nb) == []
    assert nbformat.reads(stored.dumps(stored.finalise(nb)), 4).cells[0].outputs[0].data[looking.MIME] == SPECS["trace"]
