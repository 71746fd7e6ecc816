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


def slopes_by_hand(table: pd.DataFrame, outcome: str, predictors) -> list[float]:
    columns = {name: table[name] for name in (outcome, *predictors)}
    for name, column in columns.items():
        if name != outcome and not set(column) <= {0, 1}:
            columns[name] = (column - column.mean()) / column.std(ddof=1)
    y, *x = columns.values()
    return np.linalg.lstsq(np.column_stack([np.ones(len(y)), *x]), y, rcond=None)[0][1:].tolist()


# --------------------------------------------------------------------------------------------------- nouns


def test_phenomena_are_of_the_own_grammar_or_of_blimp():
    for source in ("own", "public"):
        by_determiner, by_subject = cues.phenomena(source)
        assert len(by_determiner) == 3 and {*by_determiner, by_subject} <= set(stimuli.phenomena(source))


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


def test_slopes_are_in_the_unit_of_the_outcome_for_a_standard_deviation_without_rows_that_miss_a_value():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(60, 3)), columns=["loss_margin", "association", "frequency"])
    table["those"], table["item"] = np.tile([0.0, 1.0], 30), np.repeat(np.arange(30), 2)
    table.loc[:5, "association"] = np.nan
    names = ["association", "frequency", "those"]
    found = cues.slopes(table, "loss_margin", names)
    by_hand = slopes_by_hand(table.iloc[6:], "loss_margin", names)
    np.testing.assert_allclose([found[name].value for name in names], by_hand)
    np.testing.assert_allclose(list(cues.set_slopes(table, "loss_margin", names).values()), by_hand)
    assert found["those"].n == 27
    assert cues.slopes(table, "loss_margin", names[1:])["those"].n == 30


def test_number_sets_are_of_disjoint_groups_of_sentences_of_each_condition():
    scores = torch.zeros(7, 2, 3)
    scores[:3, 0, 1], scores[3:6, 1, 2], scores[6, 0, 0] = 1.0, 1.0, 1.0
    found = cues.number_sets({("determiner_noun", "plural"): scores, ("subject_verb", "plural"): scores[:2]}, 3)
    assert found == {
        ("determiner_noun", "plural", 0): [(0, 1)],
        ("determiner_noun", "plural", 1): [(1, 2)],
        ("subject_verb", "plural", 0): [(0, 1)],
    }


# ---------------------------------------------------------------------------------------- after a determiner


def test_noun_query_asks_a_causal_model_for_the_noun_and_a_masked_one_for_the_determiner():
    noun = next(NOUNS.itertuples())
    query = cues.noun_query(tiny.lm("gpt2"), noun, "these", "Anna saw")
    assert (query.prompt, query.target, query.foil) == ("Anna saw these", "books", "book")
    query = cues.noun_query(tiny.lm("bert"), noun, "these", "Anna saw")
    assert (query.prompt, query.target, query.foil) == (f"Anna saw {MASK} books.", "these", "this")
    assert (query.item, query.value) == ("book", "these")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_losses_after_determiners_are_those_of_suppressing_around_the_whole_model(family, monkeypatch):
    lm = tiny.lm(family)
    drawn = {2: [[(0, 5), (2, 1)], [(0, 6), (2, 9)]], 1: [[(0, 9)], [(0, 10)]]}  # by the size of the set
    monkeypatch.setattr(ablation, "matched_controls", lambda sizes, own, draws, seed: drawn[len(own)][:draws])
    sets = {"first": NEURONS, "second": [Neuron(0, 3)]}
    lost = cues.losses_after_determiners(lm, sets, NOUNS, COUNTS, draws=2)
    assert sorted(zip(lost.set, lost["item"], lost.determiner, strict=True)) == sorted(
        itertools.product((0, 1), ("book", "cat"), ("these", "red"))
    )
    for row in lost.itertuples():
        queries = [cues.noun_query(lm, NOUNS.loc[row.item], row.determiner, opener) for opener in cues.OPENERS]
        own = list(sets.values())[row.set]
        assert isclose(row.found, np.mean([loss(lm, query, own) for query in queries]), abs_tol=1e-4)
        random = np.mean([loss(lm, query, some) for query in queries for some in drawn[len(own)]])
        assert isclose(row.random, random, abs_tol=1e-4) and isclose(row.beyond, row.found - row.random)
        assert isclose(row.margin_before, np.mean([margin(lm, query) for query in queries]), abs_tol=1e-4)


def test_losses_after_determiners_come_with_what_is_known_of_noun_and_pair():
    lost = cues.losses_after_determiners(tiny.lm("gpt2"), {"only": [Neuron(0, 3)]}, NOUNS, COUNTS, draws=2)
    lost = lost.set_index(["item", "determiner"])
    assert isclose(lost.association["book", "these"], log2(4 * 1000 / (40 * 8)))
    assert isclose(lost.association["cat", "these"], log2(2 * 1000 / (40 * 16)))
    assert np.isnan(lost.association["cat", "red"])
    assert lost.irregular.to_dict() == {key: float(key[0] == "cat") for key in lost.index}
    assert lost.frequency["book", "these"] == 4.0 and not lost.those.any()


def test_losses_after_determiners_leave_out_nouns_of_several_tokens():
    nouns = pd.concat(
        [NOUNS, NOUNS.loc[["cat"]].assign(singular="red-cat", plural="cats").set_index("singular", drop=False)]
    )
    lost = cues.losses_after_determiners(tiny.lm("gpt2"), {"only": NEURONS}, nouns, COUNTS, draws=1)
    assert set(lost["item"]) == {"book", "cat"}


def table_of_losses() -> pd.DataFrame:
    """Three sets of neurons, whose loss rises by 1, 2 and 3 nats for each bit; that with random ones falls by 1."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(3):
        for i in range(80):
            association = rng.normal() if i % 5 else np.nan
            found, random = (slope * np.nan_to_num(association, nan=-2) for slope in (number + 1, -1))
            found += 0.1 * rng.normal()
            margin, frequency = rng.normal(size=2)
            rows.append((number, i // 2, found, random, margin, association, frequency, i % 3 == 0, i % 2))
    names = ["set", "item", "found", "random", "margin_before", "association", "frequency", "irregular", "those"]
    return pd.DataFrame(rows, columns=names).eval("beyond = found - random")


def test_association_slopes_are_means_over_sets_of_neurons():
    table = table_of_losses()
    fits = cues.association_slopes(table)
    for label, outcome in (("found beyond random", "beyond"), ("found", "found"), ("random", "random")):
        parts = [part.dropna(subset="association") for _, part in table.groupby("set")]
        each = [slopes_by_hand(part, outcome, cues.PREDICTORS) for part in parts]
        np.testing.assert_allclose([fits[label][name].value for name in cues.PREDICTORS], np.mean(each, 0))
        assert {estimate.n for estimate in fits[label].values()} == {3}
    spread = stats.mean([slopes_by_hand(part, "beyond", cues.PREDICTORS)[0] for part in parts])
    assert np.allclose(fits["found beyond random"]["association"], spread)
    assert list(fits["beyond random, given the log-odds before"]) == [*cues.PREDICTORS, "margin_before"]
    paired = [part.assign(paired=part.association.notna().astype(float)) for _, part in table.groupby("set")]
    names = ["paired", "frequency", "irregular", "those"]
    found = fits["beyond random, all nouns: is the pair in the table?"]
    each = [slopes_by_hand(part, "beyond", names) for part in paired]
    np.testing.assert_allclose([found[name].value for name in names], np.mean(each, 0))


def test_relative_slope_is_the_mean_slope_over_the_mean_loss_and_endless_where_nothing_is_lost():
    table = table_of_losses().eval("beyond = beyond + 10")
    parts = [part.dropna(subset="association") for _, part in table.groupby("set")]
    steps = [slopes_by_hand(part, "beyond", cues.PREDICTORS)[0] for part in parts]
    found = cues.relative_slope(table)
    assert isclose(found.value, np.mean(steps) / np.mean([part.beyond.mean() for part in parts])) and found.n == 3
    sign = table.set - 1  # one set helps as much as another harms
    nothing = cues.relative_slope(table.assign(beyond=table.beyond * sign + 0.1))
    assert (nothing.low, nothing.high) == (-np.inf, np.inf)


def test_set_table_has_a_row_for_each_set_with_its_own_losses():
    table = table_of_losses()
    sets = {("determiner_noun", "plural", i): [Neuron(0, i)] for i in range(3)}
    rows = cues.set_table(sets, table)
    assert [row["neurons"] for row in rows] == ["0·0", "0·1", "0·2"]
    for i, row in enumerate(rows):
        assert row["mean loss"] == f"{table[table.set == i].found.mean():.2f}"
        own = cues.slopes(table[table.set == i], "beyond")["association"]
        assert row["slope on association (interval over nouns)"] == cues.with_interval(own)


def test_slope_table_has_a_column_for_each_predictor_and_is_empty_where_a_fit_has_none():
    estimate = stats.Estimate(0.256, -0.1, 1.0, 40)
    (row,) = cues.slope_table({"found": {"frequency": estimate}})
    assert row["sets"] == 40 and row["frequency"] == "+0.26 [-0.10, 1.00]"
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
def test_losses_after_subjects_are_those_of_suppressing_each_set_of_their_number(family):
    lm = tiny.lm(family)
    sets = {("s", "singular", 0): [Neuron(1, 2)], ("s", "plural", 0): NEURONS, ("s", "plural", 1): [Neuron(1, 3)]}
    queries = cues.subject_queries(lm, NOUNS)
    table = cues.losses_after_subjects(ablation.capture_prompts(lm, queries), sets, draws=3)
    rows = len(queries) // 2 * 3  # half of them are plural, and there are two sets for these
    assert table.label.value_counts().to_dict() == {"random": 3 * rows, "found": rows}
    for row in table[table.label == "found"].itertuples():
        (_, value, _), own = list(sets.items())[row.set]
        assert queries[row.prompt].value == value
        assert isclose(row.loss_margin, loss(lm, queries[row.prompt], own), abs_tol=1e-4)
    kinds = ("regular", "irregular", "invented")
    order = [f"{kind}, {value}" for value in ("singular", "plural") for kind in kinds]
    assert sorted(table.subjects.unique(), key=list(table.subjects.cat.categories).index) == order


def test_beyond_random_weighs_sets_and_numbers_alike_and_leaves_out_what_was_wrong_before():
    rows = [("regular", "book", "plural", 0, "found", 3.0), ("regular", "book", "plural", 1, "found", 1.0)]
    rows += [("regular", "book", "plural", i, "random", x) for i, x in ((0, 0.0), (0, 1.0), (1, 0.5))]
    rows += [("regular", "book", "singular", 2, label, x) for label, x in (("found", 1.0), ("random", 2.0))]
    rows += [("invented", "wug", "plural", 0, label, x) for label, x in (("found", 4.0), ("random", 1.5))]
    table = pd.DataFrame(rows, columns=["task", "item", "value", "set", "label", "loss_margin"])
    wrong = table.assign(item="cat", prefers_before=False)
    found = cues.beyond_random(pd.concat([table.assign(prefers_before=True), wrong]))
    # Of "book" the plural loses (3 − 0.5 + 1 − 0.5) / 2 = 1.5, the singular 1 − 2 = −1.
    assert found.to_dict() == {("regular", "book"): 0.25, ("invented", "wug"): 2.5}


def test_invented_share_is_relative_to_real_nouns_and_endless_where_these_may_lose_nothing():
    rng = np.random.default_rng(0)
    values = {("invented", f"i{i}"): 1 + 0.1 * rng.normal() for i in range(40)}
    values |= {("regular, split", f"s{i}"): 2 + 0.1 * rng.normal() for i in range(30)}
    beyond = pd.Series(values)
    found = cues.invented_share(beyond, ["regular, split"])
    expected = beyond["invented"].mean() / beyond["regular, split"].mean() - 1
    assert isclose(found.value, expected) and found.low < expected < found.high < -0.4 and found.n == 30
    for real in (-2, 0.01):  # less damage than by random neurons is no effect that anything can be a share of
        shifted = beyond.where(beyond.index.get_level_values(0) == "invented", beyond - 2 + real)
        endless = cues.invented_share(shifted, ["regular, split"])
        assert (endless.low, endless.high) == (-np.inf, np.inf)
    assert cues.compared_kinds(["regular", "regular, split", "invented"]) == ["regular, split"]
    assert cues.compared_kinds(["regular", "irregular", "invented"]) == ["regular", "irregular"]


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
    np.testing.assert_allclose([found[name].value for name in names], slopes_by_hand(real, "loss_margin", names))


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
