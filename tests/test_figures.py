"""Figures: what is drawn is what was given, labelled, without warnings, the same bytes each time."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from kncore.neurons import Neuron
from knpaper import figures
from knpaper.stats import Estimate


def scores(n_blocks=4, n_neurons=30):
    return torch.randn(n_blocks, n_neurons, generator=torch.Generator().manual_seed(0))


ROWS = {"one": Estimate(0.4, 0.2, 0.5, 30), "two": Estimate(-0.1, -0.3, 0.2, 12)}
GROUPS = {"facts": [Neuron(0, 1), Neuron(0, 2), Neuron(3, 1)], "grammar": [Neuron(2, 5)]}
EFFECTS = {
    "all facts": {"answer": Estimate(0.9, 0.8, 0.95, 40), "word": Estimate(0.2, 0.1, 0.35, 40)},
    "capital": {"word": Estimate(0.4, 0.2, 0.5, 9), "answer": Estimate(-0.1, -math.inf, math.inf, 1)},
    "occupation": {"word": Estimate(0.3, 0.1, 0.6, 12)},
}
DOSES = {
    "what falls": {
        "the fact": {1: Estimate(0.8, 0.7, 0.9, 20), 10: Estimate(0.5, 0.3, 0.6, 20), 1000: Estimate(0, 0, 0.1, 20)},
        "random": {1: Estimate(1, 0.9, 1, 20), 10: Estimate(0.9, 0.8, 1, 20)},
    },
    "which neurons": {"the fact": {2: Estimate(0.6, 0.5, 0.7, 20), 5: Estimate(0.4, -math.inf, math.inf, 1)}},
}
DOSE_COLOURS = {"the fact": figures.FACTS, "random": figures.BASELINE}
CHANGES = {
    "plural": {
        "plural": {"are": (Estimate(-1.2, -2, -0.5, 9), True), "were": (Estimate(-0.1, -0.3, 0.2, 9), False)},
        "singular": {"is": (Estimate(4.8, 3, 7.5, 9), True)},
    },
    "singular": {
        "singular": {"is": (Estimate(-0.2, -0.9, 0.4, 9), False), "was": (Estimate(0, -math.inf, math.inf, 1), False)},
        "neutral": {"will": (Estimate(0.3, 0.1, 0.4, 9), True)},
    },
}
MARKS = {
    "plural": {"random neurons": {"are": 0.01, "is": -0.02}},
    "singular": {"as published": {"was": 5.1, "elsewhere": 1.0}, "random neurons": {"is": 0.03}},
}
WORD_COLOURS = {"plural": figures.GRAMMAR, "singular": figures.FACTS, "neutral": figures.BASELINE}
EFFECT_COLOURS = {"answer": "red", "word": "blue"}
NOUNS = pd.DataFrame(
    {
        "kind": ["regular", "made up", "regular", "irregular", "regular", "irregular", "made up", "regular"],
        "effect": [0.1, 0.9, 0.35, 0.4, math.nan, 0.6, 0.2, 0.75],
        "frequency": [1.0, math.nan, 2.0, 4.0, 3.0, 5.5, 0.5, 6.0],
        "association": [0.3, -0.2, math.nan, 1.5, 0.1, math.nan, 2.5, -1.0],
    }
)
ACROSS = {"frequency": "frequency (Zipf)", "association": "association (bits)"}
KINDS = {"irregular": figures.GRAMMAR, "regular": figures.FACTS, "made up": figures.ACCENT}
TOKENS, OTHER_TOKENS = ["The", " capital", " of", " New", " Zealand", " is"], ["the", " $", " $5", "cats"]
EFFECTS_OF_STATES = {
    "residual": (scores(6, 4), TOKENS, range(4), (3, 4)),
    "MLP": (scores(6, 2).abs() / 9, TOKENS, (0, 2), (3, 4)),
    "agreement": (scores(4, 30), OTHER_TOKENS, tuple(range(30)), (0, 0)),
}
BEFORE = {"all facts": {"answer": 0.05, "word": 0.0}, "occupation": {"word": 0.15}}
PROFILES = {"residual": {"the fact": {b: Estimate(0.1 * b, 0.1 * b - 0.2, 0.1 * b + 0.2, 9) for b in range(5)}}}
LOSSES = [[2.5, -0.3, 0.001], [0.0, 1.25, -0.002]]
DRAW = {
    "attribution_map": lambda: figures.attribution_map(scores()),
    "attribution_map_wide": lambda: figures.attribution_map(scores(30, 1536)),
    "attribution_map_tiny": lambda: figures.attribution_map(scores(1, 3)),
    "block_shares": lambda: figures.block_shares({"facts": [0.1, 0.5], "grammar": [0.2, 0.3]}, "share"),
    "block_shares_one": lambda: figures.block_shares({"facts": [0.1, 0.5]}, "share"),
    "intervals": lambda: figures.intervals(ROWS, "R₁²"),
    "intervals_zero": lambda: figures.intervals(ROWS, "R₁²", [figures.FACTS, figures.GRAMMAR], zero=True),
    "leaders": lambda: figures.leaders(LEADERS),
    "grouped": lambda: figures.grouped(EFFECTS, "share", EFFECT_COLOURS),
    "grouped_one": lambda: figures.grouped({"a": {"b": ROWS["one"]}}, "share", {"b": "black"}, zero=False),
    "grouped_before": lambda: figures.grouped(EFFECTS, "share", EFFECT_COLOURS, before=BEFORE),
    "trace_maps_one": lambda: figures.trace_maps({"": EFFECTS_OF_STATES["residual"]}, "effect")[0],
    "trace_maps_zero": lambda: figures.trace_maps({"": (torch.zeros(6, 4), TOKENS, range(4), (3, 4))}, "effect")[0],
    "trace_maps": lambda: figures.trace_maps(EFFECTS_OF_STATES, "effect")[0],
    "token_rows": lambda: figures.token_rows(
        {"a": (["The", " $5", "["], [0.0, 1.0, -0.2]), "b": (["x"], [0.3])}, "reach"
    ),
    "scatter_zero": lambda: figures.scatter(NOUNS, ACROSS, "effect", "loss", "kind", KINDS, zero=True)[0],
    "curves_linear": lambda: figures.curves(PROFILES, "block", "effect", DOSE_COLOURS, log=False)[0],
    "scatter": lambda: figures.scatter(NOUNS, ACROSS, "effect", "loss", "kind", KINDS)[0],
    "scatter_one": lambda: figures.scatter(NOUNS, {"frequency": "Zipf"}, "effect", "loss", "kind", KINDS)[0],
    "curves": lambda: figures.curves(DOSES, "neurons", "share", DOSE_COLOURS)[0],
    "word_changes": lambda: figures.word_changes(CHANGES, WORD_COLOURS, MARKS)[0],
    "word_changes_one": lambda: figures.word_changes({"plural": CHANGES["plural"]}, WORD_COLOURS)[0],
    "matrix": lambda: figures.matrix(torch.eye(3), ["a", "b", "c"], "R₁²"),
    "matrix_signed": lambda: figures.matrix(LOSSES, ["a", "b"], "nats", ["x", "y", "z"], [(0, 0), (1, 2)]),
    "matrix_zero": lambda: figures.matrix(torch.zeros(2, 2), ["a", "b"], "nats"),
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
    "grouped": ("share", ""),
    "grouped_one": ("share", ""),
    "grouped_before": ("share", ""),
    "trace_maps_one": ("block", ""),
    "trace_maps_zero": ("block", ""),
    "trace_maps": ("block", ""),
    "token_rows": ("token of the prompt", ""),
    "scatter_zero": ("frequency (Zipf)", "loss"),
    "curves_linear": ("block", "effect"),
    "scatter": ("frequency (Zipf)", "loss"),
    "scatter_one": ("Zipf", "loss"),
    "curves": ("neurons", "share"),
    "word_changes": ("", "change of mean P (%)"),
    "word_changes_one": ("", "change of mean P (%)"),
    "matrix": ("", ""),
    "matrix_signed": ("", ""),
    "matrix_zero": ("", ""),
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
    assert len(plt.get_fignums()) == 2  # one figure a call, and none is left over
    plt.close("all")
    assert not plt.get_fignums()


def test_every_figure_is_drawn_here():
    own = {name for name, thing in vars(figures).items() if getattr(thing, "__module__", "") == figures.__name__}
    public = {name for name in own if not name.startswith("_")}
    ends = ("_wide", "_tiny", "_one", "_zero", "_empty", "_signed", "_before", "_linear")
    drawn = {name.removesuffix(end) for name in DRAW for end in ends}
    assert public - {"header", "plain", "rules", "setup", "table"} <= drawn


def test_numbers_are_written_into_the_cells_of_tokens_that_they_are_large_for():
    ax = figures.token_rows({"a": (["The", " cat", "s"], [0.04, 1.02, -0.2]), "b": (["x"], [0.3])}, "reach")
    assert [text.get_text() for text in ax.texts] == ["The", "cat\n1.02", "s\n-0.20", "x\n0.30"]
    image = ax.images[0].get_array()
    assert image.shape == (2, 3) and image.mask.tolist() == [[False] * 3, [False, True, True]]


def test_lines_without_a_colour_of_their_own_have_one_of_the_palette():
    ax = figures.block_shares({str(i): [0.1 * i, 0.5] for i in range(len(figures.PALETTE))}, "share")
    assert [line.get_color() for line in ax.lines[:-1]] == figures.PALETTE


def test_text_in_a_table_is_escaped():
    shown = figures.table([{"a": "<script>alert(1)</script>", "b": 1.5}]).data
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "1.5" in shown


def test_other_numbers_give_another_picture():
    one, two = figures.intervals(ROWS, "x"), figures.intervals(ROWS | {"two": Estimate(0, -0.3, 0.2, 12)}, "x")
    assert saved(one) != saved(two)


def test_the_map_shows_the_largest_score_of_each_pixel_with_its_sign():
    table = torch.zeros(2, 384)
    table[0, 3], table[0, 2], table[1, 383] = -2.0, 1.5, 0.7
    ax = figures.attribution_map(table)
    shown = np.asarray(ax.images[0].get_array())
    want = np.zeros((2, 192))
    want[0, 1], want[1, 191] = -2.0, 0.7
    assert shown == pytest.approx(want, abs=1e-6)
    assert ax.images[0].get_clim() == (-2.0, 2.0)
    assert ax.images[0].get_extent() == [0, 384, -0.5, 1.5]


@pytest.mark.parametrize("width", [3, 191, 192, 193, 1000])
def test_no_neuron_falls_between_the_pixels(width):
    table = scores(2, width)
    shown = np.asarray(figures.attribution_map(table).images[0].get_array())
    assert shown.shape == (2, min(width, 192))
    assert np.abs(shown).max(1) == pytest.approx(table.abs().amax(1).numpy())


def test_the_map_numbers_the_largest_scores_where_they_are():
    table = torch.zeros(3, 50)
    table[2, 49], table[0, 7], table[1, 20] = 3.0, 2.0, -9.0
    notes = {note.get_text(): note.xy for note in figures.attribution_map(table).texts}
    assert len(notes) == 5 and notes["1"] == (49, 2) and notes["2"] == (7, 0)


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


def dots(ax):
    """Drawn values: (marker, x, y, colour of the edge, colour of the face) of every line with markers and data."""
    lines = [line for line in ax.lines if line.get_marker() != "None"]
    return [
        (line.get_marker(), x, y, line.get_markeredgecolor(), line.get_markerfacecolor())
        for line in lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def bars(ax):
    """Drawn intervals: (x, y) of the two ends, of every line without markers that is no axis through 0."""
    lines = [line for line in ax.lines if line.get_marker() == "None" and line.get_transform() == ax.transData]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def legend(figure_or_ax):
    return [text.get_text() for text in figure_or_ax.get_legend().get_texts()]


@pytest.mark.parametrize("order", [["answer", "word"], ["word", "answer"]])
def test_groups_of_intervals_are_drawn_row_by_row_each_series_in_its_colour(order):
    ax = figures.grouped(EFFECTS, "share", {label: EFFECT_COLOURS[label] for label in order})
    assert [label.get_text() for label in ax.get_yticklabels()] == list(EFFECTS) and ax.yaxis_inverted()
    assert legend(ax) == order
    assert [handle.get_color() for handle in ax.get_legend().get_lines()] == [EFFECT_COLOURS[label] for label in order]
    drawn = {(round(y), colour): x for _, x, y, colour, _ in dots(ax)}
    given = [(i, label, e) for i, row in enumerate(EFFECTS.values()) for label, e in row.items()]
    assert len(dots(ax)) == len(bars(ax)) == len(given) == 5
    assert drawn == {(i, EFFECT_COLOURS[label]): e.value for i, label, e in given}
    at = {(x, colour): y for _, x, y, colour, _ in dots(ax)}
    for i, label, e in given:
        y = at[e.value, EFFECT_COLOURS[label]]
        assert ([e.low, e.high], [y, y]) in bars(ax)
        assert abs(y - i) < 0.5 and (y < i) == (label == order[0])  # the series of a row, one above the other
    assert all(map(math.isfinite, ax.get_xlim()))


def test_the_line_at_zero_is_drawn_if_asked_for():
    with_zero, without = (figures.grouped(EFFECTS, "share", EFFECT_COLOURS, zero=zero) for zero in (True, False))
    assert len(with_zero.lines) == len(without.lines) + 1


@pytest.mark.parametrize("order", [["answer", "word"], ["word", "answer"]])
def test_values_before_are_hollow_and_lie_on_the_line_of_their_estimate(order):
    ax = figures.grouped(EFFECTS, "share", {label: EFFECT_COLOURS[label] for label in order}, before=BEFORE)
    hollow = {(x, edge): y for _, x, y, edge, face in dots(ax) if face == "white"}
    filled = {(round(y), edge): y for _, x, y, edge, face in dots(ax) if face != "white"}
    given = [(list(EFFECTS).index(row), label, x) for row, some in BEFORE.items() for label, x in some.items()]
    assert len(dots(ax)) == 5 + 3 and len(filled) == 5
    assert hollow == {(x, EFFECT_COLOURS[label]): filled[i, EFFECT_COLOURS[label]] for i, label, x in given}
    assert legend(ax) == [*order, "before"]
    without = figures.grouped(EFFECTS, "share", {label: EFFECT_COLOURS[label] for label in order})
    assert len(bars(ax)) == len(bars(without)) and legend(without) == order


def test_a_scatter_has_lines_through_zero_if_asked_for():
    for zero in (True, False):
        for ax in figures.scatter(NOUNS, ACROSS, "effect", "loss", "kind", KINDS, zero=zero):
            lines = [line for line in ax.lines if line.get_marker() == "None" and line.get_transform() != ax.transData]
            drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
            assert drawn == ([([0, 1], [0, 0]), ([0, 0], [0, 1])] if zero else [])


def test_trace_maps_show_the_effects_as_given_and_share_their_colours():
    axes = figures.trace_maps(EFFECTS_OF_STATES, "indirect effect (nats)")
    assert [ax.get_title() for ax in axes] == list(EFFECTS_OF_STATES)
    largest = max(float(effect.max()) for effect, *_ in EFFECTS_OF_STATES.values())
    for ax, (effect, words, blocks, _) in zip(axes, EFFECTS_OF_STATES.values(), strict=True):
        (image,) = ax.images
        assert np.asarray(image.get_array()) == pytest.approx(effect.numpy())
        assert image.get_clim() == (0, pytest.approx(largest))
        assert list(ax.get_yticks()) == list(range(len(words))) and ax.yaxis_inverted()
        shown = {x: label.get_text() for x, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)}
        assert shown == {x: str(blocks[int(x)]) for x in shown} and shown[0] == "0" and len(shown) <= 8
    (bar,) = [ax for ax in axes[0].figure.axes if ax not in list(axes)]
    assert bar.get_ylabel() == "indirect effect (nats)"
    # The tokens of one prompt are written once, and those of the subject have an asterisk; no dollar starts a formula.
    written = [[label.get_text() for label in ax.get_yticklabels()] for ax in axes]
    assert written == [["The", "capital", "of", "New*", "Zealand*", "is"], [""] * 6, ["the*", r"\$", r"\$5", "cats"]]


@pytest.mark.parametrize("lowest, end", [(-0.1, "min"), (0.0, "neither")])
def test_the_bar_of_a_trace_map_ends_in_an_arrow_where_effects_are_below_zero(lowest, end):
    ax = figures.trace_maps({"": (torch.tensor([[lowest, 0.5], [0.2, 0.1]]), ["a", "b"], [0, 3], (1, 1))}, "effect")[0]
    assert ax.images[0].colorbar.extend == end and ax.images[0].get_clim() == (0, 0.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b*"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "3"]


def test_curves_over_blocks_have_a_linear_axis_and_a_line_at_zero():
    (ax,) = figures.curves(PROFILES, "block", "effect", DOSE_COLOURS, log=False)
    assert ax.get_xscale() == "linear"
    (zero,) = [line for line in ax.lines if line.get_transform() != ax.transData]
    assert list(zero.get_ydata()) == [0, 0]
    (line,) = [line for line in ax.lines if line is not zero]
    assert list(line.get_xdata()) == list(range(5)) and line.get_ydata() == pytest.approx(0.1 * np.arange(5))


def test_scattered_points_are_the_rows_that_have_both_values_in_the_colour_of_their_kind():
    axes = figures.scatter(NOUNS, ACROSS, "effect", "loss", "kind", KINDS)
    assert [ax.get_xlabel() for ax in axes] == list(ACROSS.values())
    assert [ax.get_ylabel() for ax in axes] == ["loss", ""]
    assert [ax.get_legend() is None for ax in axes] == [True, False]
    assert legend(axes[1]) == list(KINDS)
    handles = axes[1].get_legend().get_lines()
    assert [handle.get_markerfacecolor() for handle in handles] == list(KINDS.values())
    for ax, column, count in zip(axes, ACROSS, (6, 5), strict=True):
        drawn = [(x, y, face) for _, x, y, _, face in dots(ax) if math.isfinite(x) and math.isfinite(y)]
        rows = NOUNS[NOUNS[column].notna() & NOUNS["effect"].notna()]
        given = [(row[column], row["effect"], KINDS[row["kind"]]) for _, row in rows.iterrows()]
        assert sorted(drawn) == sorted(given) and len(drawn) == count


def test_each_panel_has_one_line_the_least_squares_of_its_own_rows_and_a_band_around_it():
    axes = figures.scatter(NOUNS, ACROSS, "effect", "loss", "kind", KINDS)
    for ax, column in zip(axes, ACROSS, strict=True):
        rows = NOUNS[[column, "effect"]].dropna()
        (line,) = [line for line in ax.lines if line.get_marker() == "None"]
        x, y = line.get_data()
        assert (min(x), max(x)) == (rows[column].min(), rows[column].max())
        assert y == pytest.approx(np.polyval(np.polyfit(rows[column], rows["effect"], 1), x))
        (band,) = ax.collections
        corners = np.concatenate([path.vertices for path in band.get_paths()])
        for at, height in zip(x, y, strict=True):
            here = corners[np.isclose(corners[:, 0], at), 1]
            assert here.min() <= height + 1e-9 and height - 1e-9 <= here.max()


def test_groups_that_are_not_pooled_have_a_line_each_in_their_colour():
    kinds = {kind: KINDS[kind] for kind in ("irregular", "regular")}
    (ax,) = figures.scatter(NOUNS, {"frequency": "Zipf"}, "effect", "loss", "kind", kinds, pooled=False)
    lines = [line for line in ax.lines if line.get_marker() == "None"]
    assert [line.get_color() for line in lines] == list(kinds.values())
    for line, kind in zip(lines, kinds, strict=True):
        rows = NOUNS[NOUNS["kind"] == kind][["frequency", "effect"]].dropna()
        x, y = line.get_data()
        assert (min(x), max(x)) == (rows["frequency"].min(), rows["frequency"].max())
        assert y == pytest.approx(np.polyval(np.polyfit(rows["frequency"], rows["effect"], 1), x))


def test_curves_are_lines_and_bands_of_what_was_given_with_one_legend():
    axes = figures.curves(DOSES, "neurons", "share", DOSE_COLOURS)
    assert [ax.get_title() for ax in axes] == list(DOSES)
    assert {ax.get_xscale() for ax in axes} == {"log"} and {ax.get_xlabel() for ax in axes} == {"neurons"}
    (shown,) = axes[0].figure.legends
    assert [text.get_text() for text in shown.get_texts()] == ["the fact", "random"]
    assert [line.get_color() for line in shown.get_lines()] == list(DOSE_COLOURS.values())
    for ax, lines in zip(axes, DOSES.values(), strict=True):
        assert len(ax.lines) == len(ax.collections) == len(lines)
        for line, band, (label, points) in zip(ax.lines, ax.collections, lines.items(), strict=True):
            assert list(line.get_xdata()) == list(points) and line.get_color() == DOSE_COLOURS[label]
            assert list(line.get_ydata()) == [estimate.value for estimate in points.values()]
            corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices}
            for x, estimate in points.items():
                finite = math.isfinite(estimate.low)
                assert ((x, estimate.low) in corners) == ((x, estimate.high) in corners) == finite


@pytest.mark.parametrize("marks", [None, MARKS])
def test_changes_of_words_are_percentages_over_the_words_filled_where_significant(marks):
    axes = figures.word_changes(CHANGES, WORD_COLOURS, marks)
    words = ["are", "were", "is", "was", "will"]
    assert [ax.get_title(loc="left") for ax in axes] == list(CHANGES)
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == words  # of both panels, which share the axis
    for ax, groups in zip(axes, CHANGES.values(), strict=True):
        assert list(ax.get_xticks()) == list(range(5))
        given = [(group, word, *told) for group, some in groups.items() for word, told in some.items()]
        drawn = {x: (y, edge, face) for marker, x, y, edge, face in dots(ax) if marker == "o"}
        assert len(given) == len(drawn) == len(bars(ax)) == 3
        for group, word, estimate, significant in given:
            x, colour = words.index(word), WORD_COLOURS[group]
            face = colour if significant else "white"
            assert drawn[x] == (pytest.approx(100 * estimate.value), colour, face)
            assert ([x, x], [100 * estimate.low, 100 * estimate.high]) in bars(ax)
    (shown,) = axes[0].figure.legends
    labels = [text.get_text() for text in shown.get_texts()]
    assert sorted(labels) == sorted([*WORD_COLOURS, *(["random neurons", "as published"] if marks else [])])
    further = [{(marker, x): y for marker, x, y, *_ in dots(ax) if marker != "o"} for ax in axes]
    if marks:  # a label has one marker in all panels, and a word that no panel shows is left out
        assert further == [
            {("x", 0): pytest.approx(1), ("x", 2): pytest.approx(-2)},
            {("D", 3): pytest.approx(510), ("x", 2): pytest.approx(3)},
        ]
        looks = {(marker, edge, face) for ax in axes for marker, _, _, edge, face in dots(ax) if marker != "o"}
        assert looks == {("x", figures.BASELINE, "none"), ("D", "black", "none")}
    else:
        assert further == [{}, {}]


def test_six_marks_can_be_told_apart_and_the_first_is_grey():
    labels = [f"mark {i}" for i in range(6)]
    marks = {"plural": {label: {"are": i / 10} for i, label in enumerate(labels)}}
    ax = figures.word_changes(CHANGES, WORD_COLOURS, marks)[0]
    drawn = sorted((y, marker, edge, face) for marker, _, y, edge, face in dots(ax) if marker != "o")
    assert [y for y, *_ in drawn] == pytest.approx([0, 10, 20, 30, 40, 50])
    assert len({marker for _, marker, *_ in drawn}) == 6
    assert [edge for *_, edge, _ in drawn] == [figures.BASELINE] + ["black"] * 5
    assert {face for *_, face in drawn} == {"none"}


@pytest.mark.parametrize("change, ticks", [(0.01, 2), (3, 3), (60, 4), (2e4, 7)])
def test_the_axis_of_changes_has_round_ticks_with_their_sign_and_no_fewer_for_small_changes(change, ticks):
    (ax,) = figures.word_changes({"": {"g": {"w": (Estimate(change, 0, change, 9), True)}}}, {"g": "black"})
    ax.figure.canvas.draw()
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert shown[ticks - 2 : ticks + 1] == ["−50", "0", "+50"] and len(shown) == 2 * ticks - 1
    low, high = ax.get_ylim()
    assert low <= min(0, 100 * change) and high >= 100 * change


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


def test_a_matrix_with_columns_has_its_own_labels_both_signs_and_frames_where_they_were_asked_for():
    ax = figures.matrix(LOSSES, ["a", "b"], "nats", ["x", "y", "z"], [(0, 1), (1, 2)])
    # One decimal above 1, and what rounds to zero has no sign.
    assert [text.get_text() for text in ax.texts] == ["2.5", "-0.3", "0.0", "0.0", "1.2", "0.0"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y", "z"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in ax.patches] == [(1, 0, 1), (2, 1, 1)]
    assert ax.collections[0].get_clim() == (-2.5, 2.5)
    assert ax.collections[0].colorbar.ax.get_ylabel() == "nats"
    positive = figures.matrix(np.abs(LOSSES), ["a", "b"], "nats", ["x", "y", "z"])
    assert positive.collections[0].get_clim() == (0, 2.5) and not positive.patches
    assert positive.collections[0].get_cmap() != ax.collections[0].get_cmap()


@pytest.mark.parametrize("size, text", [(0.999, "1.00"), (1.0000001, "1.00"), (1.01, "1.0"), (3.14159, "3.1")])
def test_a_matrix_has_two_decimals_up_to_one(size, text):
    shown = figures.matrix([[size, 0.25], [-0.25, 0.0]], ["a", "b"], "R₁²").texts
    assert shown[0].get_text() == text


def test_groups_can_be_told_apart():
    ax = figures.block_shares({"facts": [0.1, 0.2], "grammar": [0.3, 0.4]}, "share")
    assert [line.get_label() for line in ax.lines[:2]] == ["facts", "grammar"]
    assert [line.get_color() for line in ax.lines[:2]] == [figures.FACTS, figures.GRAMMAR]
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[0.1, 0.2], [0.3, 0.4]]
    assert len({figures.FACTS, figures.GRAMMAR, figures.BASELINE, figures.ACCENT}) == 4
