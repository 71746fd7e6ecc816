"""Figures: what is drawn is what was given, labelled, without warnings, the same bytes each time."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kncore import figures
from kncore.neurons import Neuron
from kncore.stats import Estimate


def scores(n_blocks=4, n_neurons=30):
    return torch.randn(n_blocks, n_neurons, generator=torch.Generator().manual_seed(0))


ROWS = {"one": Estimate(0.4, 0.2, 0.5, 30), "two": Estimate(-0.1, -0.3, 0.2, 12)}
GROUPS = {"facts": [Neuron(0, 1), Neuron(0, 2), Neuron(3, 1)], "grammar": [Neuron(2, 5)]}
DRAW = {
    "attribution_map": lambda: figures.attribution_map(scores()),
    "attribution_map_wide": lambda: figures.attribution_map(scores(30, 1536), unit="log probability"),
    "attribution_map_tiny": lambda: figures.attribution_map(scores(1, 3)),
    "block_shares": lambda: figures.block_shares({"facts": [0.1, 0.5], "grammar": [0.2, 0.3]}, "share"),
    "block_shares_one": lambda: figures.block_shares({"facts": [0.1, 0.5]}, "share", [figures.FACTS]),
    "intervals": lambda: figures.intervals(ROWS, "R₁²"),
    "intervals_zero": lambda: figures.intervals(ROWS, "R₁²", [figures.FACTS, figures.GRAMMAR], zero=True),
    "leaders": lambda: figures.leaders(LEADERS),
    "matrix": lambda: figures.matrix(torch.eye(3), ["a", "b", "c"], "R₁²"),
    "depths": lambda: figures.depths(GROUPS, 5, [figures.FACTS, figures.GRAMMAR]),
    "depths_empty": lambda: figures.depths({"facts": [Neuron(0, 1)], "none": []}, 3, ["black", "red"]),
}
LABELS = {
    "attribution_map": ("neuron", "block"),
    "attribution_map_wide": ("neuron", "block"),
    "attribution_map_tiny": ("neuron", "block"),
    "block_shares": ("block", "share"),
    "block_shares_one": ("block", "share"),
    "intervals": ("R₁²", ""),
    "intervals_zero": ("R₁²", ""),
    "leaders": ("facts", ""),
    "matrix": ("", ""),
    "depths": ("block", "share of refined neurons"),
    "depths_empty": ("block", "share of refined neurons"),
}
LEADERS = {
    "capital": [Neuron(1, 2)] * 3 + [Neuron(0, 7)] * 2 + [Neuron(2, 2)],
    "occupation": [Neuron(0, 7), Neuron(1, 2)],
}


@pytest.fixture(autouse=True)
def house_style():
    """The style of the book, on the canvas that needs no screen; settings come back afterwards."""
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        figures.setup()
        plt.switch_backend("agg")
        matplotlib.rcParams["svg.hashsalt"] = "kncore"
        yield
    plt.close("all")
    plt.switch_backend(before)


def saved(ax):
    stream = io.BytesIO()
    ax.figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DRAW)
def test_figures_draw_without_warnings_are_labelled_and_repeat_byte_for_byte(name):
    ax = DRAW[name]()
    assert (ax.get_xlabel(), ax.get_ylabel()) == LABELS[name]
    first = saved(ax)
    assert first.startswith(b"<?xml") and len(first) > 5000
    assert b"<dc:date>" not in first
    assert saved(DRAW[name]()) == first


def test_every_figure_is_drawn_here():
    public = {name for name, thing in vars(figures).items() if getattr(thing, "__module__", "") == figures.__name__}
    drawn = {name.removesuffix(end) for name in DRAW for end in ("_wide", "_tiny", "_one", "_zero", "_empty")}
    assert public - {"setup", "table"} <= drawn


def test_text_in_a_table_is_escaped():
    shown = figures.table([{"a": "<script>alert(1)</script>", "b": 1.5}]).data
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "1.5" in shown


def test_other_numbers_give_another_picture():
    one, two = figures.intervals(ROWS, "x"), figures.intervals(ROWS | {"two": Estimate(0, -0.3, 0.2, 12)}, "x")
    assert saved(one) != saved(two)


def test_the_map_shows_the_largest_score_of_each_pixel_with_its_sign():
    table = torch.zeros(2, 400)
    table[0, 3], table[0, 2], table[1, 399] = -2.0, 1.5, 0.7
    ax = figures.attribution_map(table, bins=100)
    shown = np.asarray(ax.images[0].get_array())
    want = np.zeros((2, 100))
    want[0, 0], want[1, 99] = -2.0, 0.7
    assert shown == pytest.approx(want, abs=1e-6)
    assert ax.images[0].get_clim() == (-2.0, 2.0)
    assert ax.images[0].get_extent() == [0, 400, -0.5, 1.5]


@pytest.mark.parametrize("width", [3, 191, 192, 193, 1000])
def test_no_neuron_falls_between_the_pixels(width):
    table = scores(2, width)
    shown = np.asarray(figures.attribution_map(table).images[0].get_array())
    assert shown.shape == (2, min(width, 192))
    assert np.abs(shown).max(1) == pytest.approx(table.abs().amax(1).numpy())


def test_the_map_numbers_the_largest_scores_where_they_are():
    table = torch.zeros(3, 50)
    table[2, 49], table[0, 7], table[1, 20] = 3.0, 2.0, -9.0
    notes = {note.get_text(): note.xy for note in figures.attribution_map(table, name=2).texts}
    assert notes == {"1": (49, 2), "2": (7, 0)}


def test_intervals_are_drawn_from_end_to_end_in_the_order_given():
    ax = figures.intervals(ROWS, "x")
    bars = [line.get_data() for line in ax.lines]
    for i, estimate in enumerate(ROWS.values()):
        assert list(bars[2 * i][0]) == [estimate.low, estimate.high] and list(bars[2 * i][1]) == [i, i]
        assert list(bars[2 * i + 1][0]) == [estimate.value]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(ROWS)
    assert ax.yaxis_inverted()  # the first row on top


@pytest.mark.filterwarnings("error")
def test_an_endless_interval_does_not_stop_the_figure():
    ax = figures.intervals(ROWS | {"one unit": Estimate(0.3, -math.inf, math.inf, 1)}, "x")
    saved(ax)
    assert all(map(math.isfinite, ax.get_xlim()))


def test_depths_are_shares_that_sum_to_one_per_group():
    ax = figures.depths(GROUPS, 5, ["red", "blue"])
    facts, grammar = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert facts == pytest.approx([2 / 3, 0, 0, 1 / 3, 0]) and grammar == pytest.approx([0, 0, 1, 0, 0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["facts (3)", "grammar (1)"]


def test_leaders_are_pieces_as_wide_as_the_facts_they_lead():
    ax = figures.leaders(LEADERS)
    pieces = [[], []]
    for bar in ax.patches:
        pieces[round(bar.get_y() + bar.get_height() / 2)].append((bar.get_x(), bar.get_width()))
    assert pieces == [[(0, 3), (3, 2), (5, 1)], [(0, 1), (1, 1)]]
    assert [text.get_text().replace("\n", "") for text in ax.texts] == ["1·2", "0·7"]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(LEADERS) and ax.yaxis_inverted()


def test_the_matrix_writes_its_values_in():
    values = torch.tensor([[1.0, 0.25], [0.25, 1.0]])
    ax = figures.matrix(values, ["a", "b"], "R₁²")
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.25", "1.00"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_groups_can_be_told_apart():
    ax = figures.block_shares({"facts": [0.1, 0.2], "grammar": [0.3, 0.4]}, "share", [figures.FACTS, figures.GRAMMAR])
    assert [line.get_label() for line in ax.lines[:2]] == ["facts", "grammar"]
    assert [line.get_color() for line in ax.lines[:2]] == [figures.FACTS, figures.GRAMMAR]
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[0.1, 0.2], [0.3, 0.4]]
    assert len({figures.FACTS, figures.GRAMMAR, figures.BASELINE, figures.ACCENT}) == 4
