"""What the chapter of known causes measures, against the sentences of the corpus, whole runs, and numbers by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import isclose, log2

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import kncore
from kncore import predictions, tokens
from kncore.editors import Edit
from kncore.query import MASK, Query
from knpaper import causes, chapter, corpus, stats


@pytest.fixture(scope="module")
def gpt2():
    return kncore.load("controlled-gpt2")


@pytest.fixture(scope="module")
def followed():
    """How often a word follows another one directly in the corpus."""
    return Counter(pair for text, _ in corpus.sentences() for pair in pairwise(corpus.split(text)))


def margin(lm, query: Query) -> float:
    logp = predictions.log_probabilities(lm, [query])[0]
    target, foil = (tokens.encode(lm, query, word).target[0] for word in (query.target, query.foil))
    return float(logp[target] - logp[foil])


# ------------------------------------------------------------------------------------------- what a model knows


@pytest.mark.parametrize(
    "highest, labels",
    [
        ([0, 3, 10], ["never", "1–3 times", "1–3 times", "4–10 times", "4–10 times"]),
        ([0, 1, 3, 10], ["never", "once", "2–3 times", "4–10 times", "4–10 times"]),
    ],
)
def test_binned_names_bins_by_their_limits(highest, labels):
    found = causes.binned([0, 1, 3, 4, 10], highest)
    assert list(found) == labels and list(found.categories) == list(dict.fromkeys(labels))


def test_questions_about_pairs_are_of_pairs_that_occur_or_never_do(followed):
    asked = causes.questions(masked=False)
    for label, occurs in (("agreement, pairs in the text", True), ("agreement, held-out pairs", False)):
        assert len(asked[label]) > 200
        for query in asked[label]:
            assert (followed[query.prompt.split()[-1], query.target] > 0) == occurs
    for query in causes.questions(masked=True)["agreement, held-out pairs"]:
        assert not followed[query.target, query.prompt.split(f"{MASK} ")[1].rstrip(".")]


def test_questions_about_facts_are_of_facts_that_are_stated_and_implied_ones_may_not_be():
    stated = {sentence.text for sentence in corpus.sentences()}
    for label, queries in causes.questions(masked=False).items():
        if not label.startswith("agreement"):
            assert queries and all(f"{query.prompt} {query.target}." in stated for query in queries), label
    for relation, group, occurs in (
        ("capital", "two_way", True),
        ("capital", "one_way", False),
        ("field", "linked", False),
        ("field", "unlinked", False),
    ):
        queries = corpus.fact_queries(causes.implied(relation)[group])
        assert queries and all((f"{query.prompt} {query.target}." in stated) == occurs for query in queries)


def test_held_out_questions_are_sorted_by_how_often_the_form_follows_the_other_demonstrative(followed):
    limits = dict(zip(["never", "1–3 times", "4–10 times"], [(0, 0), (1, 3), (4, 10)], strict=True))
    asked = causes.held_out_questions(masked=False)
    assert list(asked) == [*limits, "11–30 times", "31–100 times"]
    for label, (low, high) in limits.items():
        for query in asked[label]:
            determiner = query.prompt.split()[-1]
            assert not followed[determiner, query.target]
            assert low <= followed[causes.SIBLING[determiner], query.target] <= high
    real = {pair for pair in corpus.pairs() if pair.kind != "invented" and pair.held_out}
    assert sum(map(len, asked.values())) == len(real)


def test_answers_are_whether_each_model_prefers_the_target():
    lms = {"llama": [tiny.lm("llama")], "gpt2": [tiny.lm("gpt2", 0), tiny.lm("gpt2", 1)], "bert": [tiny.lm("bert")]}

    def asked(masked):
        ending = f" {MASK}." if masked else ""
        some = [Query(f"{noun}{ending}", "is", foil="in", item=noun) for noun in ("the cat", "these books", "Paris")]
        return {"verbs": some, "nothing": [], "red": some[:1]}

    table = causes.answers(lms, asked)
    assert len(table) == 4 * 4 and table.model.nunique() == 3, "two of the models bear one name"
    assert list(table.architecture.cat.categories) == list(lms)
    for name, trained in lms.items():
        expected = [
            margin(lm, query) > 0 for lm in trained for some in asked(name == "bert").values() for query in some
        ]
        assert table[table.architecture == name].success.tolist() == expected


def test_success_share_weighs_items_alike_and_is_none_where_nothing_can_be_told():
    flags = pd.array([True, True, False, False, None], dtype="boolean")
    table = pd.DataFrame({"success": flags, "item": ["a", "a", "a", "b", "c"]})
    found = causes.success_share(table)
    assert isclose(found.value, 1 / 3) and found.n == 2
    assert causes.success_share(table[4:]) is None


def test_training_logs_are_those_of_each_model_with_the_tokens_in_millions(gpt2):
    logs = causes.training_logs({"controlled-gpt2": [gpt2]})
    assert set(logs.architecture) == set(logs.model) == {"controlled-gpt2"}
    assert np.allclose(logs.millions * 1e6, logs.tokens) and logs.loss.iloc[-1] < logs.loss.iloc[0] / 2


# ------------------------------------------------------------------------------------------- neurons of number


def test_losses_are_those_of_suppressing_the_neurons_of_the_number_with_the_counts_of_the_corpus(
    gpt2, followed, monkeypatch
):
    scores = torch.zeros(2, 4, len(gpt2.blocks), gpt2.n_neurons)
    own = {"singular": [(0, 0), (0, 1), (0, 2)], "plural": [(2, 5), (1, 7)]}  # without any score, the first three
    scores[1, :, 2, 5], scores[1, :, 1, 7] = 2.0, 1.0
    found = dict(zip([("determiner_noun", number) for number in own], scores, strict=True))
    monkeypatch.setattr(chapter, "condition_scores", lambda *given: found)
    every = 301
    table = causes.losses({"controlled-gpt2": [gpt2]}, every)
    pairs = corpus.pairs()[::every]
    assert table.singular.tolist() == [pair.singular for pair in pairs]
    words = Counter(word.lower() for text, _ in corpus.sentences() for word in corpus.split(text))
    for row, pair, query in zip(table.itertuples(), pairs, corpus.pair_queries(pairs, False), strict=True):
        assert row.count == followed[pair.determiner, pair.form]
        assert isclose(row.other, log2(1 + words[pair.form] - row.count))
        before = margin(gpt2, query)
        with kncore.suppress(gpt2, own[pair.number]):
            assert isclose(row.loss_margin, before - margin(gpt2, query), abs_tol=1e-4)
        names = (
            {0: "never", 1: "once"}
            | dict.fromkeys(range(2, 5), "2–4 times")
            | dict.fromkeys(range(5, 13), "5–12 times")
        )
        names |= dict.fromkeys(range(13, 36), "13–35 times") | dict.fromkeys(range(36, 101), "36–100 times")
        assert row.bin == ("never, invented noun" if pair.kind == "invented" else names[pair.count])


def test_count_slopes_are_per_doubling_of_the_count_among_pairs_that_occur():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"count": rng.integers(0, 100, 200), "other": rng.normal(size=200)})
    table["singular"] = [f"n{i // 2}" for i in range(200)]
    table["loss_margin"] = 2 + 0.3 * np.log2(table["count"].clip(1)) - 0.1 * table.other
    table["loss_margin"] += 1e-6 * rng.normal(size=200) + 50 * (table["count"] == 0)
    found = causes.count_slopes(table)
    assert isclose(found["count"].value, 0.3, abs_tol=1e-5) and isclose(found["other"].value, -0.1, abs_tol=1e-5)
    assert found["count"].n == table[table["count"] > 0].singular.nunique()
    assert isclose(
        causes.count_slopes(table.eval("twice = 2 * loss_margin"), "twice")["count"].value, 0.6, abs_tol=1e-5
    )


def test_count_shares_are_of_the_means_of_pairs_that_occur_and_none_where_nothing_is_lost():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"count": rng.integers(0, 100, 200), "other": rng.normal(size=200)})
    table["singular"] = [f"n{i // 2}" for i in range(200)]
    seen, noise = table["count"] > 0, 1e-6 * rng.normal(size=200)
    before = 4 + 0.6 * np.log2(table["count"].clip(1)) + 1e-6 * rng.normal(size=200)
    rise = 0.6 / before[seen].mean()
    for loss, moves, survives in ((before / 2, rise, 0.0), (2.0, 0.0, rise)):
        found = causes.count_shares(table.assign(margin_before=before, loss_margin=loss + noise))
        assert np.allclose([each.value for each in found], [moves, survives], atol=1e-5)
    for loss in (-1.0, 0.05):  # pairs that never occurred do not count
        assert causes.count_shares(table.assign(margin_before=before, loss_margin=np.where(seen, loss, 9))) is None


def test_reach_is_a_difference_over_real_nouns_that_have_both_kinds_of_pairs():
    rows = [("book", True, 1.0), ("book", True, 3.0), ("book", False, 4.0), ("cat", True, 1.0), ("cat", False, 2.0)]
    rows += [("dog", False, 100.0), ("wug", True, 100.0), ("wug", False, 1.0)]
    table = pd.DataFrame(rows, columns=["singular", "held_out", "loss_margin"])
    table["kind"] = np.where(table.singular == "wug", "invented", "regular")
    found = causes.reach(table)
    assert isclose(found.value, (2 + 1) / 2 - (4 + 2) / 4) and found.n == 2
    # Where suppression helps pairs that occurred, half of that is nothing to be reached.
    helped = table.assign(loss_margin=table.loss_margin.where(table.held_out, -4))
    assert isclose(causes.reach(helped).value, (2 + 1) / 2)


# ---------------------------------------------------------------------------------------------------- edits


def test_requests_give_a_fact_another_answer_of_its_group_and_ask_for_what_follows():
    world = corpus.world()
    for case in causes.requests("capital", "two_way", 5):
        country, capitals, new = case.request.subject, dict(world.capital["two_way"].pairs), case.request.foil
        assert case.request.target == capitals[country] != new and new in capitals.values()
        assert all(query.target == country and new in query.prompt for query in case.queries["symmetry"])
    for group in ("linked", "unlinked"):
        fields = {field for _, field in world.field[group].pairs}
        for case in causes.requests("field", group, 5):
            assert case.request.foil in fields
            assert all(query.target == world.called[case.request.foil] for query in case.queries["synonymy"])


def test_rewritten_has_the_answers_before_and_after_the_edit_of_every_editor(gpt2, monkeypatch):
    monkeypatch.setattr(causes, "EDITORS", {"none": lambda lm, some: [Edit()] * len(some)})
    for relation, groups in causes.GROUPS.items():
        table = causes.rewritten({"controlled-gpt2": [gpt2]}, relation, 2)
        before, after = table[table.editor == ""], table[table.editor == "none"]
        for group in groups:
            facts = causes.implied(relation)[group]
            if group == "two_way":
                assert before[before.group == group].success.mean() > 0.95, "these are stated in the corpus"
            assert (before.group == group).sum() == len(facts.pairs) * len(facts.templates)
            rows = after[after.group == group].set_index("criterion")
            assert not rows.success["reliability"].any() and not rows.took.any(), "nothing was edited"
            assert rows.success["locality"].dropna().all()
        labels = [f"{group}: {label}" for group in groups.values() for label in causes.CRITERIA[relation].values()]
        assert list(table.question.cat.categories) == labels and set(table.question.dropna()) == set(labels)


def test_judged_says_that_an_edit_took_if_every_edited_prompt_has_the_new_answer():
    rows = [
        ("a", "reliability", True),
        ("a", "reliability", True),
        ("a", "generality", False),
        ("a", "symmetry", False),
    ]
    rows += [("b", "reliability", True), ("b", "reliability", False), ("b", "symmetry", True)]
    table = pd.DataFrame(rows, columns=["item", "criterion", "says_after"]).astype({"says_after": "boolean"})
    table["says_before"] = pd.array([False] * len(table), dtype="boolean")
    found = causes.judged(table)
    assert found.success.tolist() == table.says_after.tolist()
    assert found.took.tolist() == [True] * 4 + [False] * 3


def test_edit_table_has_a_row_for_each_model_and_group_with_what_follows_where_the_edit_took():
    rows = [
        ("m", "two_way", "ROME", "a", "reliability", True, True),
        ("m", "two_way", "ROME", "a", "symmetry", True, True),
        ("m", "two_way", "ROME", "b", "reliability", False, False),
        ("m", "two_way", "ROME", "b", "symmetry", False, False),
        ("m", "two_way", "fine-tuning", "a", "generality", True, True),
        ("k", "two_way", "ROME", "a", "locality", True, False),
    ]
    names = ["model", "group", "editor", "item", "criterion", "success", "took"]
    table = pd.DataFrame(rows, columns=names).astype({"success": "boolean", "took": "boolean"})
    found = causes.edit_table({"two_way": table, "linked": table.assign(group="linked")}, "ROME")
    assert [(row["model"], row["group"]) for row in found] == [
        ("m", "two way"),
        ("m", "linked"),
        ("k", "two way"),
        ("k", "linked"),
    ]
    assert found[0]["edited prompt"] == str(stats.share([True, False]))
    assert found[0]["its paraphrases"] == found[0]["neighbours"] == "–"
    assert found[0]["follows, where it took"] == str(stats.share([True]))
    assert found[2]["neighbours"] == str(stats.share([True])) and found[2]["follows, where it took"] == "–"


# -------------------------------------------------------------------------------------------- over training seeds


def test_claim_values_are_of_one_model_or_of_all_and_none_where_few_edits_took(monkeypatch):
    monkeypatch.setattr(causes, "count_slopes", lambda lost, outcome: {"count": len(lost)})
    monkeypatch.setattr(causes, "count_shares", lambda lost: (1, 2) if len(lost) > 1 else None)
    monkeypatch.setattr(causes, "reach", lambda lost, seed: len(lost))
    lost = pd.DataFrame({"model": ["a", "a", "b"]})
    rows = []
    for model, took in (("a", True), ("b", False)):
        for i in range(6):
            rows.append((model, "two_way", "symmetry", "ROME", took or i < 4, f"{model}{i}", i < 3))
            rows.append((model, "two_way", "symmetry", "fine-tuning", False, f"{model}{i}", i < 2))
    columns = ["model", "group", "criterion", "editor", "took", "item", "success"]
    table = pd.DataFrame(rows, columns=columns).astype({"success": "boolean"})
    edits = {"capital": table, "field": table}
    of_a, of_b = (causes.claim_values(lost, edits, 7, model) for model in "ab")
    assert (of_a["rule-reaches"], of_b["rule-reaches"]) == (2, 1) == (of_a["count-is-learnt"], of_b["count-is-learnt"])
    assert (of_a["count-survives"], of_b["count-moves"], of_b["count-survives"]) == (2, None, None)
    assert of_a["two-way-symmetry-rome"].value == 0.5 and of_b["two-way-symmetry-rome"] is None
    assert isclose(of_b["two-way-symmetry-follows"].value, 1 / 3)
    together = causes.claim_values(lost, edits, 7)
    assert together["two-way-symmetry-rome"].n == 10 and together["two-way-symmetry-follows"].n == 12
    assert of_a["synonym-inferred"] is None


def test_over_seeds_is_students_interval_and_endless_for_fewer_than_two():
    assert causes.over_seeds([1.0, 2.0, 3.0]) == stats.runs([1.0, 2.0, 3.0])
    assert tuple(causes.over_seeds([0.5])) == (0.5, -np.inf, np.inf, 1)
    assert causes.over_seeds([]).n == 0
