"""The book's figures: one palette, vector graphics, one function a plot."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, Markdown
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from kncore.models import LM
from kncore.neurons import Neuron, top
from knpaper.claims import definitions
from knpaper.rules import CLAIMS
from knpaper.stats import Estimate
from knpaper.stored import visible

# Okabe and Ito's colours, told apart by colour-blind readers: facts, grammar, baselines.
FACTS, GRAMMAR, BASELINE, ACCENT = "#0072B2", "#D55E00", "#7F7F7F", "#009E73"
PALETTE = [FACTS, GRAMMAR, ACCENT, "#56B4E9", "#CC79A7", BASELINE]
PIXELS, NUMBERED = 192, 5  # how many pixels wide an attribution map is, and how many neurons of it have a number
_BEGINS = re.compile(r"^(?=[#%:=+(-])|^(\d+)(?=[.)])")  # a heading, a comment, a label, an item of a list

Colours = Mapping[str, str]
# What a map of traces shows: the effect of each state, the tokens, the blocks, the first and the last of the subject.
Trace = tuple[Float[Tensor, "token block"], Sequence[str], Sequence[int], tuple[int, int]]


def setup() -> None:
    """House style for the figures of a notebook: vector graphics on white, so that they hold in dark mode too."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")
    sns.set_theme(style="ticks", font_scale=0.95, palette=PALETTE)
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.figsize": (8, 3.6),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "svg.fonttype": "path",
        }
    )


def table(rows: Sequence[Mapping] | pd.DataFrame) -> HTML:
    """Return rows as the book's tables look; text in them is escaped, and dollars are no mathematics."""
    return HTML(pd.DataFrame(rows).to_html(index=False, border=0, justify="left", classes="table mathjax_ignore"))


def plain(text: str) -> str:
    """Return text for a Markdown output, which shows it as it is: no markup, HTML or mathematics."""
    escaped = re.sub(r"([\\`*_{}\[\]<>$&!|~])", r"\\\1", visible(" ".join(text.split())))
    return _BEGINS.sub(r"\1\\", escaped)


def _label(text: object) -> str:
    """Return a label that Matplotlib draws as it is: two dollars are mathematics, and a legend leaves out `_name`."""
    return " " * str(text).startswith("_") + visible(text).replace("$", r"\$")


def _panel(height: float) -> tuple[plt.Figure, Axes]:
    """Return a figure of one panel over the width of the page."""
    return plt.subplots(figsize=(8, height))


def attribution_map(scores: Float[Tensor, "block neuron"]) -> Axes:
    """Return blocks × neurons as an image. A pixel is the score of largest size among the neighbours it covers."""
    n_blocks, n_neurons = scores.shape
    edges = np.linspace(0, n_neurons, min(PIXELS, n_neurons) + 1).round().astype(int)
    parts = np.split(scores.numpy().astype(float), edges[1:-1], axis=1)
    image = np.hstack([np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1) for part in parts])
    size = float(np.abs(image).max())
    figure, ax = _panel(max(2.4, 0.14 * n_blocks + 1))
    extent = (0, n_neurons, -0.5, n_blocks - 0.5)
    colours = {"cmap": "RdBu_r", "vmin": -size, "vmax": size}
    shown = ax.imshow(image, aspect="auto", origin="lower", extent=extent, interpolation="nearest", **colours)
    for rank, (neuron, _) in enumerate(top(scores, NUMBERED), 1):
        near_right = neuron.index > 0.9 * n_neurons
        ax.annotate(
            str(rank),
            (neuron.index, neuron.block),
            xytext=(-9 if near_right else 9, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "black", "lw": 0.6},
        )
    ax.set(xlabel="neuron", ylabel="block")
    figure.colorbar(shown, ax=ax, pad=0.01).set_label("score (probability)")
    return ax


def block_shares(curves: Mapping[str, Sequence[float]], ylabel: str) -> Axes:
    """Return one line per group over the blocks."""
    _, ax = _panel(2.8)
    for (label, curve), colour in zip(curves.items(), itertools.cycle(PALETTE), strict=False):
        ax.plot(range(len(curve)), curve, marker="o", ms=3.5, lw=1.5, label=_label(label), color=colour)
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel="block", ylabel=ylabel)
    if len(curves) > 1:
        ax.legend(frameon=False)
    return ax


def _bar(ax: Axes, x: Sequence[float], y: Sequence[float], colour: str, lw: float = 2) -> None:
    """Draw the interval of an estimate."""
    ax.plot(x, y, color=colour, lw=lw, solid_capstyle="round")


def _label_rows(ax: Axes, rows: Sequence[str], xlabel: str, zero: bool) -> None:
    """Put the first row on top, light lines across, a black one at zero."""
    if zero:
        ax.axvline(0, color="black", lw=0.6)
    ax.set_yticks(range(len(rows)), labels=list(map(_label, rows)))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set(xlabel=xlabel)
    ax.grid(axis="x", lw=0.4)


def intervals(rows: Mapping[str, Estimate], xlabel: str, colours: Sequence[str] = (), zero: bool = False) -> Axes:
    """Return one line per estimate: the value as a dot, its 95 % interval as a bar."""
    _, ax = _panel(0.36 * len(rows) + 1.0)
    for i, estimate in enumerate(rows.values()):
        colour = colours[i] if colours else FACTS
        _bar(ax, [estimate.low, estimate.high], [i, i], colour, 2.2)
        ax.plot(estimate.value, i, "o", color=colour, ms=6)
    _label_rows(ax, list(rows), xlabel, zero)
    return ax


def grouped(
    rows: Mapping[str, Mapping[str, Estimate]],
    xlabel: str,
    colours: Colours,
    zero: bool = True,
    before: Mapping[str, Mapping[str, float]] | None = None,
) -> Axes:
    """Return several estimates a row, in order and colour of `colours`: values as dots, 95 % intervals as bars.

    `before` adds a hollow dot to an estimate: the value that it started from.
    """
    _, ax = _panel((0.11 * len(colours) + 0.18) * len(rows) + 1.2)
    for place, (label, colour) in enumerate(colours.items()):
        shift = (place - (len(colours) - 1) / 2) * 0.72 / len(colours)
        here = {i + shift: estimates[label] for i, estimates in enumerate(rows.values()) if label in estimates}
        for y, estimate in here.items():
            _bar(ax, [estimate.low, estimate.high], [y, y], colour)
        began = {i + shift: before[row][label] for i, row in enumerate(rows) if label in (before or {}).get(row, {})}
        if began:
            ax.plot(list(began.values()), list(began), "o", ms=5, mec=colour, mfc="white")
        ax.plot([e.value for e in here.values()], list(here), "o", ms=5, color=colour, label=_label(label))
    if before:
        ax.plot([], [], "o", ms=5, mec="black", mfc="white", label="before")
    _label_rows(ax, list(rows), xlabel, zero)
    entries = len(colours) + bool(before)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(4, entries), fontsize=9)
    return ax


def scatter(
    table: pd.DataFrame,
    across: Mapping[str, str],
    up: str,
    ylabel: str,
    by: str,
    colours: Colours,
    seed: int = 0,
    zero: bool = False,
    pooled: bool = True,
) -> Sequence[Axes]:
    """Return one column of a table against others, a panel each, coloured `by` a third.

    The line is least squares with its 95 % band: one of all rows, or where they are not `pooled`, which groups that lie
    apart must not be, one of each group in its colour. `across` maps columns to axis labels. Rows without a value in a
    column are left out of its panel. `zero` draws lines through zero on both axes.
    """
    table = table[table[by].isin(colours)]
    _, axes = plt.subplots(1, len(across), figsize=(8, 3.4), sharey=True, squeeze=False)
    for ax, (column, label) in zip(axes[0], across.items(), strict=True):
        if zero:
            ax.axhline(0, color="black", lw=0.6)
            ax.axvline(0, color="black", lw=0.6)
        for kind, colour in colours.items():
            part = table[table[by] == kind]
            ax.plot(part[column], part[up], "o", ms=3, alpha=0.45, mew=0, color=colour, label=_label(kind))
        for kind, colour in {"": "black"}.items() if pooled else colours.items():
            part = table if pooled else table[table[by] == kind]
            settings = {"scatter": False, "line_kws": {"lw": 1.4, "color": colour}, "n_boot": 1000, "seed": seed}
            if pooled or part[column].nunique() > 1:
                sns.regplot(part, x=column, y=up, ax=ax, color=None if pooled else colour, **settings)
        ax.set(xlabel=label, ylabel="")
        ax.grid(axis="y", lw=0.4)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend(frameon=False, fontsize=9, markerscale=1.8)
    return axes[0]


def curves(
    panels: Mapping[str, Mapping[str, Mapping[float, Estimate]]],
    xlabel: str,
    ylabel: str,
    colours: Colours,
    log: bool = True,
) -> Sequence[Axes]:
    """Return estimates along an axis, one panel beside the other: lines with their 95 % intervals as bands.

    The axis is logarithmic, or with `log=False` linear (blocks), with a line at zero.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 3.6), sharey=True, squeeze=False)
    handles: dict[str, object] = {}
    for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (label, points) in enumerate(lines.items()):
            x, (values, low, high, _) = list(points), zip(*points.values(), strict=True)
            style = {"color": colours[label], "ls": "--" if i and colours[label] == BASELINE else "-"}
            (handles[label],) = ax.plot(x, values, marker="o", ms=3.5, lw=1.6, **style)
            ax.fill_between(x, low, high, color=colours[label], alpha=0.14, lw=0)
        if log:
            ax.set_xscale("log")
        else:
            ax.axhline(0, color="black", lw=0.6)
        ax.set(title=_label(title), xlabel=xlabel)
        ax.grid(axis="y", lw=0.4)
    axes[0, 0].set_ylabel(ylabel)
    legend = {"loc": "outside upper center", "ncols": 3, "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), map(_label, handles), **legend)
    return axes[0]


def word_changes(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[Estimate, bool]]]],
    colours: Colours,
    marks: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Sequence[Axes]:
    """Return the relative change of the probability of words, in per cent: a panel per edit, the words in groups.

    Each estimate comes with whether it is significant after correction (filled dot) or not (hollow). `marks` adds
    further values to a panel, one marker a label (at most six): a control, a published figure. The panels share the
    axis of words, in the order in which they first come.
    """
    words = list(dict.fromkeys(word for groups in panels.values() for group in groups.values() for word in group))
    at = {word: i for i, word in enumerate(words)}
    marks = marks or {}
    shapes = dict(zip(dict.fromkeys(itertools.chain.from_iterable(marks.values())), "xDsvP*", strict=False))
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.7 * len(panels) + 0.4), sharex=True, squeeze=False)
    for ax, (title, groups) in zip(axes[:, 0], panels.items(), strict=True):
        for label, group in groups.items():
            for word, (estimate, significant) in group.items():
                _bar(ax, [at[word]] * 2, [100 * estimate.low, 100 * estimate.high], colours[label])
                face = colours[label] if significant else "white"
                ax.plot(at[word], 100 * estimate.value, "o", ms=6, mec=colours[label], mfc=face)
            ax.plot([], [], "o", color=colours[label], label=_label(label))
        for label, changes in marks.get(title, {}).items():
            known = [word for word in changes if word in at]
            colour = BASELINE if label == next(iter(shapes)) else "black"
            values = [100 * changes[word] for word in known]
            style = {"ms": 6, "mfc": "none", "color": colour, "label": _label(label)}
            ax.plot([at[word] for word in known], values, shapes[label], **style)
        ax.axhline(0, color="black", lw=0.6)
        _per_cent_axis(ax)
        ax.set_title(_label(title), loc="left")
        ax.set_ylabel("change of mean P (%)")
        ax.grid(axis="y", lw=0.4)
        labels = list(map(_label, words))
        ax.set_xticks(range(len(words)), labels=labels, rotation=60, ha="right", rotation_mode="anchor")
    handles = {}
    for ax in axes[:, 0]:
        drawn, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles, frameon=False, ncols=6, loc="outside upper center", fontsize=9)
    return axes[:, 0]


def _per_cent_axis(ax: Axes) -> None:
    """Make the axis of changes linear up to 100 per cent and logarithmic beyond, with signs at its ticks."""
    ax.set_yscale("symlog", linthresh=100)
    reach = max(abs(limit) for limit in ax.get_ylim())
    ticks = [0, 50, *(10**power for power in range(2, 9) if 10**power <= reach)]
    ax.set_yticks(sorted({sign * tick for tick in ticks for sign in (1, -1)}))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:+,.0f}".replace(",", " ").replace("-", "−") if y else "0")
    ax.minorticks_off()


def trace_maps(traces: Mapping[str, Trace], label: str) -> Sequence[Axes]:
    """Return the effects of restoring states, tokens × blocks, as images side by side; the subject has asterisks.

    The images share the colours, from zero to the largest effect; what is below has the colour of zero, and then the
    bar ends in an arrow. `label` names the effect and its unit.
    """
    lowest = min(float(effect.min()) for effect, *_ in traces.values())
    highest = max(float(effect.max()) for effect, *_ in traces.values())
    tallest = max(len(tokens) for _, tokens, *_ in traces.values())
    figure, axes = plt.subplots(1, len(traces), figsize=(8, 0.24 * tallest + 1.3), squeeze=False)
    colours = {"cmap": "cividis", "vmin": 0, "vmax": highest if highest > 0 else 1}
    shown = None
    for ax, (title, (effect, tokens, blocks, (first, last))) in zip(axes[0], traces.items(), strict=True):
        image = ax.imshow(np.asarray(effect), aspect="auto", interpolation="nearest", **colours)
        words = [_label(word.strip()) + "*" * (first <= i <= last) for i, word in enumerate(tokens)]
        # Beside an image of the same prompt, its labels will do.
        ax.set_yticks(range(len(words)), labels=[] if words == shown else words, fontsize=8)
        step = max(1, round(len(blocks) / 6))
        ax.set_xticks(range(0, len(blocks), step), labels=blocks[::step])
        ax.set(xlabel="block", title=_label(title))
        ax.tick_params(length=2)
        sns.despine(ax=ax, left=True, bottom=True)
        shown = words
    bar = figure.colorbar(image, ax=axes[0].tolist(), pad=0.01, extend="min" if lowest < 0 else "neither")
    bar.set_label(label)
    return axes[0]


def leaders(groups: Mapping[str, Sequence[Neuron]]) -> Axes:
    """Return one bar per group, cut into the neurons that lead its items: a wide piece is a neuron that leads many."""
    _, ax = _panel(0.42 * len(groups) + 1.0)
    for row, found in enumerate(groups.values()):
        left = 0
        for neuron, count in Counter(found).most_common():
            shared = count > 1
            ax.barh(row, count, left=left, height=0.7, color=FACTS if shared else "#D9D9D9", edgecolor="white")
            if shared:
                label = f"{neuron.block}·{neuron.index}" if count > 2 else f"{neuron.block}·\n{neuron.index}"
                ax.text(left + count / 2, row, label, ha="center", va="center", color="white", fontsize=7.5)
            left += count
    ax.set_yticks(range(len(groups)), labels=[_label(group).replace("_", " ") for group in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set(xlabel="facts")
    return ax


def matrix(
    values: Float[Tensor, "row column"],
    labels: Sequence[str],
    unit: str,
    columns: Sequence[str] | None = None,
    frames: Sequence[tuple[int, int]] = (),
) -> Axes:
    """Return a matrix with its values written in; without `columns` it is square and symmetric.

    Colours run from zero to the largest value, or over both signs around zero where there are negative ones. `frames`
    marks cells (row, column).
    """
    table, across = np.asarray(values, dtype=float), labels if columns is None else columns
    _, ax = plt.subplots(figsize=(0.46 * len(across) + 2.8, 0.46 * len(labels) + 2.2))
    digits = 2 if np.abs(table).max() < 1.005 else 1
    table = table.round(digits) + 0.0  # a negative value that rounds to zero loses its sign
    signed, size = bool((table < 0).any()), float(np.abs(table).max())
    sns.heatmap(
        table,
        vmin=-size if signed else 0,
        vmax=size,
        cmap="RdBu_r" if signed else "cividis",
        square=True,
        annot=True,
        fmt=f".{digits}f",
        annot_kws={"size": 7},
        xticklabels=list(map(_label, across)),
        yticklabels=list(map(_label, labels)),
        cbar_kws={"label": unit, "shrink": 0.7},
        ax=ax,
    )
    for row, column in frames:
        ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, ec="black", lw=1.4))
    ax.tick_params(axis="both", length=0, labelsize=8)
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    return ax


def depths(groups: Mapping[str, Sequence[Neuron]], n_blocks: int, colours: Sequence[str]) -> Axes:
    """Return the share of each group's neurons in every block, side by side."""
    _, ax = _panel(2.8)
    width = 0.8 / len(groups)
    for i, (label, neurons) in enumerate(groups.items()):
        counts = np.bincount([neuron.block for neuron in neurons], minlength=n_blocks)
        where = np.arange(n_blocks) + (i - (len(groups) - 1) / 2) * width
        ax.bar(where, counts / max(1, counts.sum()), width, color=colours[i], label=f"{_label(label)} ({counts.sum()})")
    ax.set(xlabel="block", ylabel="share of refined neurons")
    ax.legend(frameon=False)
    return ax


def token_rows(rows: Mapping[str, tuple[Sequence[str], Sequence[float]]], label: str) -> Axes:
    """Return a prompt a row, a token a cell, shaded by a number from zero to one, which cells above a tenth show."""
    width = max(len(tokens) for tokens, _ in rows.values())
    figure, ax = _panel(0.46 * len(rows) + 0.9)
    image = np.full((len(rows), width), np.nan)
    for i, (_, numbers) in enumerate(rows.values()):
        image[i, : len(numbers)] = numbers
    shown = ax.imshow(image, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, (tokens, numbers) in enumerate(rows.values()):
        for at, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
            text = _label(token.strip()) + (f"\n{number:.2f}" if abs(number) >= 0.1 else "")
            ax.text(at, i, text, ha="center", va="center", fontsize=6.5, color="white" if number > 0.6 else "black")
    ax.set_yticks(range(len(rows)), labels=list(map(_label, rows)))
    ax.set_xticks([])
    ax.set_xlabel("token of the prompt")
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    figure.colorbar(shown, ax=ax, pad=0.01).set_label(label)
    return ax


def header(lm: LM, *more: str) -> Markdown:
    """Return the line on the model at the top of a chapter, with further sentences after it."""
    size = f"{len(lm.blocks)} blocks of {lm.n_neurons:,} neurons."
    model = f"Model: **{lm.name}** (revision `{lm.revision}`, {str(lm.dtype)[6:]}), {size}"
    return Markdown(" ".join((model, *more)))


def rules(number: str) -> HTML:
    """Return the claims of a chapter with their rules, a block a claim, for a chapter by its number ("08")."""
    blocks = []
    for claim in (claim for claim in CLAIMS.values() if claim.chapter == number):
        expected = {"the thesis": claim.thesis, "the paper": claim.paper}
        details = {
            "metric": claim.metric,
            "null": claim.control,
            "unit": f"{claim.unit}, at least {claim.min_n}" if claim.unit else "",
            "supported if": f"the 95 % interval lies {claim.border.replace('>', 'above')}",
            "smallest effect that matters": claim.smallest,
            "expected": ", ".join(f"{verdict} by {who}" for who, verdict in expected.items() if verdict),
            "rule chosen": claim.when,
        }
        kind = "Check that an intervention took. " if claim.check else ""
        head = f"{kind}<strong>{escape(visible(claim.statement))}</strong>"
        blocks.append(f'<div class="rule">{head}{definitions(details, claim.id)}</div>')
    return HTML(f'<div class="rules mathjax_ignore">{"".join(blocks)}</div>')
