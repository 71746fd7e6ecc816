"""The experiments on what neurons of number respond to, against whole runs of tiny models and numbers by hand."""

from __future__ import annotations

import itertools
from math import isclose, log2

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import kncore
from kncore import ablation, predictions, tokens
from kncore.neurons import Neuron
from kncore.query import MASK, Query
from knpaper import cues, stats, stimuli
from knpaper.frequencies import Counts

NOUNS = pd.DataFrame(
    [("book", "books", "regular", 4.0), ("cat", "cats", "irregular", 5.0), ("France", "Spain", "invented", np.nan)],
    columns=["singular", "plural", "kind", "frequency"],
).set_index("singular", drop=False)
COUNTS = Counts({"these": 40, "books": 8, "cats": 16, "red": 10}, {"these books": 4, "these cats": 2}, 1000, 1)
NEURONS = [Neuron(0, 3), Neuron(2, 7)]


@pytest.fixture(autouse=True)
def words_that_tiny_models_know(monkeypatch):
    monkeypatch.setattr(cues, "OPENERS", ("Anna saw", "the cat saw", "Paris in"))
    monkeypatch.setattr(cues, "DETERMINERS", {"these": "this", "red": "a"})
    monkeypatch.setattr(cues, "VERBS", {"singular": ("is", "in"), "plural": ("in", "is")})


def margin(lm, query: Query) -> float:
    """Log-odds of the target against the foil, by a run of the whole model."""
    logp = predictions.log_probabilities(lm, [query])[0]
    target, foil = (tokens.encode(lm, query, word).target[0] for word in (query.target, query.foil))
    return float(logp[target] - logp[foil])


def loss(lm, query: Query, neurons) -> float:
    before = margin(lm, query)
    with kncore.suppress(lm, neurons):
        return before - margin(lm, query)


def slopes_by_hand(table: pd.DataFrame, predictors) -> list[float]:
    columns = {name: table[name] for name in ("loss_margin", *predictors)}
    for name, column in columns.items():
        if name == "loss_margin" or not set(column) <= {0, 1}:
            columns[name] = (column - column.mean()) / column.std(ddof=1)
    y, *x = columns.values()
    return np.linalg.lstsq(np.column_stack([np.ones(len(y)), *x]), y, rcond=None)[0][1:].tolist()


# --------------------------------------------------------------------------------------------------- nouns


def test_phenomena_are_of_the_own_grammar_or_of_blimp():
    assert cues.phenomena()[0] in stimuli.phenomena() and cues.phenomena()[1] in stimuli.phenomena()
    assert set(cues.phenomena("public")) <= set(stimuli.phenomena("public"))


def test_noun_table_has_every_noun_by_its_singular_with_the_frequency_of_its_plural():
    table = cues.noun_table(Counts({"castles": 50}, {}, 10**6, 1))
    assert table.loc["castle", "plural"] == "castles" and isclose(table.loc["castle", "frequency"], np.log10(50_000))
    assert table.frequency.notna().sum() == 1 and (table.index == table.singular).all()
    assert set(table.kind) == {"regular", "irregular", "invented"}


def test_noun_kinds_counts_the_nouns_of_a_kind_and_gives_the_range_of_their_frequency():
    rows = [(f"n{i}", f"n{i}s", "regular", float(i % 4)) for i in range(10)] + [("wug", "wugs", "invented", np.nan)] * 5
    found = cues.noun_kinds(pd.DataFrame(rows, columns=["singular", "plural", "kind", "frequency"]))
    assert found.values.tolist() == [
        ["regular", 10, "1 to 1,000", "n0s, n2s, n4s, n6s, n8s"],
        ["invented", 5, "none", ", ".join(["wugs"] * 5)],
    ]


def test_slopes_are_those_of_least_squares_on_standard_scores_without_rows_that_miss_a_value():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(60, 3)), columns=["loss_margin", "association", "frequency"])
    table["those"], table["item"] = np.tile([0.0, 1.0], 30), np.repeat(np.arange(30), 2)
    table.loc[:5, "association"] = np.nan
    names = ["association", "frequency", "those"]
    found = cues.slopes(table, names)
    np.testing.assert_allclose([found[name].value for name in names], slopes_by_hand(table.iloc[6:], names))
    assert found["those"].n == 27
    assert cues.slopes(table, names[1:])["those"].n == 30


# ---------------------------------------------------------------------------------------- after a determiner


def test_noun_query_asks_a_causal_model_for_the_noun_and_a_masked_one_for_the_determiner():
    noun = next(NOUNS.itertuples())
    query = cues.noun_query(tiny.lm("gpt2"), noun, "these", "Anna saw")
    assert (query.prompt, query.target, query.foil) == ("Anna saw these", "books", "book")
    query = cues.noun_query(tiny.lm("bert"), noun, "these", "Anna saw")
    assert (query.prompt, query.target, query.foil) == (f"Anna saw {MASK} books.", "these", "this")
    assert (query.item, query.value) == ("book", "these")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_losses_after_determiners_are_those_of_suppressing_around_the_whole_model(family):
    lm = tiny.lm(family)
    lost = cues.losses_after_determiners(lm, NEURONS, NOUNS, COUNTS, draws=4, seed=1)
    assert sorted(zip(lost.label, lost["item"], lost.determiner, strict=True)) == sorted(
        itertools.product(("own", "random", "without block 0"), ("book", "cat"), ("these", "red"))
    )
    for row in lost[lost.label != "random"].itertuples():
        queries = [cues.noun_query(lm, NOUNS.loc[row.item], row.determiner, opener) for opener in cues.OPENERS]
        some = NEURONS if row.label == "own" else NEURONS[1:]
        assert isclose(row.loss_margin, np.mean([loss(lm, query, some) for query in queries]), abs_tol=1e-4)
        assert isclose(row.margin_before, np.mean([margin(lm, query) for query in queries]), abs_tol=1e-4)
    assert lost[lost.label == "random"].loss_margin.notna().all()


def test_losses_after_determiners_come_with_what_is_known_of_noun_and_pair():
    lost = cues.losses_after_determiners(tiny.lm("gpt2"), [Neuron(0, 3)], NOUNS, COUNTS, draws=2)
    assert set(lost.label) == {"own", "random"}, "no neuron is above block 0"
    own = lost[lost.label == "own"].set_index(["item", "determiner"])
    assert isclose(own.association["book", "these"], log2(4 * 1000 / (40 * 8)))
    assert isclose(own.association["cat", "these"], log2(2 * 1000 / (40 * 16)))
    assert np.isnan(own.association["cat", "red"])
    assert own.irregular.to_dict() == {key: float(key[0] == "cat") for key in own.index}
    assert own.frequency["book", "these"] == 4.0 and not own.those.any()


def test_losses_after_determiners_leave_out_nouns_of_several_tokens():
    nouns = pd.concat(
        [NOUNS, NOUNS.loc[["cat"]].assign(singular="red-cat", plural="cats").set_index("singular", drop=False)]
    )
    lost = cues.losses_after_determiners(tiny.lm("gpt2"), NEURONS, nouns, COUNTS, draws=1)
    assert set(lost["item"]) == {"book", "cat"}


def table_of_losses() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = []
    for label, sign in (("own", 1), ("random", -1), ("without block 0", 0)):
        for i in range(80):
            association = rng.normal() if i % 5 else np.nan
            loss = sign * np.nan_to_num(association, nan=-2) + 0.1 * rng.normal()
            margin, frequency = rng.normal(size=2)
            rows.append((label, i // 2, loss, margin, association, frequency, float(i % 3 == 0), float(i % 2)))
    names = ["label", "item", "loss_margin", "margin_before", "association", "frequency", "irregular", "those"]
    return pd.DataFrame(rows, columns=names)


def test_association_slopes_are_of_each_set_of_neurons_and_of_the_pairs_that_are_in_the_table():
    table = table_of_losses()
    fits = cues.association_slopes(table)
    assert fits["own neurons"]["association"].value > 0.9 and fits["random neurons"]["association"].value < -0.9
    assert abs(fits["own, without block 0"]["association"].value) < 0.4
    assert list(fits["own, given the log-odds before"]) == [*cues.PREDICTORS, "margin_before"]
    own = table[table.label == "own"]
    paired = own.assign(paired=own.association.notna().astype(float))
    names = ["paired", "frequency", "irregular", "those"]
    found = fits["own, all nouns: is the pair in the table?"]
    np.testing.assert_allclose([found[name].value for name in names], slopes_by_hand(paired, names))
    assert "own, without block 0" not in cues.association_slopes(table[table.label != "without block 0"])


def test_slope_table_has_a_column_for_each_predictor_and_is_empty_where_a_fit_has_none():
    estimate = stats.Estimate(0.256, -0.1, 1.0, 40)
    (row,) = cues.slope_table({"own neurons": {"frequency": estimate}})
    assert row["n"] == 40 and row["frequency"] == "+0.26 [-0.10, 1.00]"
    assert row["association"] == row["pair in table"] == row["irregular"] == row["log-odds before"] == ""


# --------------------------------------------------------------------------------------------- as a subject


def test_subject_queries_take_every_sixth_regular_noun_and_every_third_that_is_split():
    rows = [(f"a{i}", f"a{i}", "regular", -float(i)) for i in range(13)]
    rows += [(f"b{i}", f"b{i}-s", "regular", float(i)) for i in range(7)] + [("cat", "cats", "irregular", 0.0)]
    nouns = pd.DataFrame(rows, columns=["singular", "plural", "kind", "frequency"]).set_index("singular", drop=False)
    queries = cues.subject_queries(tiny.lm("gpt2"), nouns)
    assert [(q.item, q.task) for q in queries[::2]] == [
        *[(f"a{i}", "regular") for i in (12, 6, 0)],
        *[(f"b{i}", "regular, split") for i in (0, 3, 6)],
        ("cat", "irregular"),
    ]
    assert [(q.value, q.target, q.foil) for q in queries[-2:]] == [("singular", "is", "in"), ("plural", "in", "is")]
    assert queries[-1].prompt.endswith(" cats") and queries[-2].prompt.endswith(" cat")
    assert cues.subject_queries(tiny.lm("bert"), nouns)[-1].prompt.endswith(f" cats {MASK} very old.")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_losses_after_subjects_are_those_of_suppressing_the_neurons_of_their_number(family):
    lm, sets = tiny.lm(family), {"singular": [Neuron(1, 2)], "plural": NEURONS}
    queries = cues.subject_queries(lm, NOUNS)
    table = cues.losses_after_subjects(ablation.capture_prompts(lm, queries), sets, draws=3)
    assert table.label.value_counts().to_dict() == {"random": 3 * len(queries), "own": len(queries)}
    for row in table[table.label == "own"].itertuples():
        assert isclose(row.loss_margin, loss(lm, queries[row.prompt], sets[row.value]), abs_tol=1e-4)
    kinds = ("regular", "irregular", "invented")
    order = [f"{kind}, {value}" for value in ("singular", "plural") for kind in kinds]
    assert sorted(table.subjects.unique(), key=list(table.subjects.cat.categories).index) == order


def test_separations_count_the_pairs_in_which_the_plural_excites_the_neuron_more():
    lm, sets = tiny.lm("gpt2"), {"singular": [Neuron(1, 2)], "plural": NEURONS}
    nouns = pd.concat([NOUNS, NOUNS.assign(singular=["Paris", "red", "a"]).set_index("singular", drop=False)])
    held = ablation.capture_prompts(lm, cues.subject_queries(lm, nouns.assign(kind="irregular")))
    found = cues.separations(held, sets)
    assert list(found) == ["1·2 (singular)", "0·3 (plural)", "2·7 (plural)"]
    states = held.activations(range(len(held.queries)))
    numbers = [query.value for query in held.queries]
    for label, neuron in zip(found, [Neuron(1, 2), *NEURONS], strict=True):
        values = {n: states[[i for i, own in enumerate(numbers) if own == n], *neuron] for n in ("singular", "plural")}
        gaps = torch.sign(values["plural"][:, None] - values["singular"])
        assert list(found[label]) == ["irregular"]
        assert isclose(found[label]["irregular"].value, float((gaps + 1).mean() / 2), abs_tol=1e-6)


def test_frequency_slopes_are_of_real_nouns_on_what_differs_among_them():
    rng = np.random.default_rng(1)
    nouns = pd.DataFrame({"frequency": rng.normal(size=40)}, index=[f"n{i}" for i in range(40)])
    rows = [
        (f"n{i}", "irregular" if i % 3 else "regular", value, rng.normal())
        for i in range(40)
        for value in ("singular", "plural")
    ]
    rows.append(("wug", "invented", "plural", 100.0))
    lost = pd.DataFrame(rows, columns=["item", "task", "value", "loss_margin"])
    found = cues.frequency_slopes(lost, nouns)
    names = ["frequency", "irregular", "plural"]
    assert list(found) == names and found["plural"].n == 40
    real = lost[:-1].assign(
        frequency=nouns.frequency[lost["item"][:-1]].to_numpy(),
        irregular=(lost.task == "irregular").astype(float),
        plural=(lost.value == "plural").astype(float),
    )
    np.testing.assert_allclose([found[name].value for name in names], slopes_by_hand(real, names))


# ------------------------------------------------------------------------------------- where neurons are active


def test_shared_fact_neurons_are_those_refined_for_the_most_facts(monkeypatch):
    leading = [(0, 1), (0, 1), (2, 3), (1, 1), (0, 1), (2, 3)]  # of six facts, three in each of two relations
    scores = torch.zeros(len(leading) * stimuli.TEMPLATES, 3, 24)
    for i, (block, index) in enumerate(leading):
        scores[i * stimuli.TEMPLATES : (i + 1) * stimuli.TEMPLATES, block, index] = 1.0
    queries = [Query(f"the cat is {i}", "red") for i in range(3 * stimuli.TEMPLATES)]
    monkeypatch.setattr(stimuli, "relations", lambda source: ["capital", "occupation"])
    monkeypatch.setattr(stimuli, "known_facts", lambda *given: stimuli.Selection(queries, 3, 3))

    class Result:
        pass

    Result.scores = scores
    monkeypatch.setattr(cues, "attribute", lambda lm, asked, **options: Result if len(asked) == 30 else None)
    assert cues.shared_fact_neurons(tiny.lm("gpt2"), 3, k=2) == {(0, 1): 3, (2, 3): 2}


def test_context_table_says_where_each_neuron_is_most_active_and_what_it_raises():
    lm = tiny.lm("gpt2")
    neuron, texts = Neuron(1, 5), ["the red cat is in Paris", "Anna saw these books", "the capital of France"]
    (row,) = cues.context_table(lm, texts, {neuron: "subject verb, plural"}, k=2)
    peaks = []
    for text in texts:
        seen = []
        activation = lm.model.transformer.h[1].mlp.act
        with torch.no_grad():
            hook = activation.register_forward_hook(lambda *given, seen=seen: seen.append(given[2][0, :, 5]))
            lm.model(torch.tensor([tokens.read(lm, text)]))
            hook.remove()
        place = 1 + int(seen[0][1:].abs().argmax())
        peaks.append((text.split(" ")[:place], text.split(" ")[place], float(seen[0][place])))
    best = sorted(peaks, key=lambda peak: -abs(peak[2]))[:2]
    expected = " · ".join(f"{' '.join(before[-4:])} [{token}] {value:+.1f}" for before, token, value in best)
    assert row["neuron"] == "1·5" and row["found for"] == "subject verb, plural"
    assert row["most active at"] == expected
    assert len(row["its value vector raises"].split(", ")) == 6
