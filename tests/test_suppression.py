"""Edits of facts and conditions on tiny models, against the model run as a whole and against counts by hand."""

import asking
import numpy as np
import pandas as pd
import pytest
import torch

from kncore import predictions
from kncore.ablation import measure
from kncore.interventions import enhance, suppress
from knpaper import stats, suppression


@pytest.fixture(scope="module")
def held_groups():
    return asking.held_groups()


def loss(held, p, neurons) -> float:
    """What the right word loses under an edit of the model run as a whole."""
    query = held.queries[p]
    before = asking.log_probabilities(query)[asking.token(query.target)]
    with suppress(asking.LM, neurons):
        return float(before - asking.log_probabilities(query)[asking.token(query.target)])


def test_compare_measures_every_prompt_under_every_set(held_groups):
    held, facts, _ = held_groups
    table = suppression.compare(held, facts, 3, neighbours=True)
    counts = table.groupby("label").size()
    assert counts["its own"] == counts["another fact's"] == counts["the most active"] == 20
    assert counts["random"] == 60
    for i, fact in enumerate(facts):
        p = fact.prompts[i]
        rows = table[table.prompt == p].set_index("label")
        assert rows.loss["its own"] == pytest.approx(loss(held, p, fact.neurons), abs=1e-4)
        other = facts[i ^ 1].ranked(len(fact.neurons))
        assert rows.loss["another fact's"] == pytest.approx(loss(held, p, other), abs=1e-4)
        drawn = [loss(held, p, some) for some in fact.alike(3, i)]
        assert np.allclose(rows.loss["random"], drawn, atol=1e-4)
        upper = [neuron for neuron in fact.neurons if neuron.block]
        if upper:
            assert rows.loss["its own, without block 0"] == pytest.approx(loss(held, p, upper), abs=1e-4)


def test_match_is_the_activity_of_random_neurons_over_that_of_the_own(held_groups):
    _, facts, _ = held_groups
    means = [[], []]
    for i, fact in enumerate(facts):
        drawn = [neuron for some in fact.alike(2, 5 + i) for neuron in some]
        for values, some in zip(means, (drawn, fact.neurons), strict=True):
            values.append(sum(float(fact.sizes[at]) for at in map(tuple, some)) / len(some))
    assert suppression.match(facts, 2, 5).value == pytest.approx(sum(means[0]) / sum(means[1]))


EDITS = pd.DataFrame(
    {
        "label": ["its own", "its own", "random", "random", "random", "random"],
        "prompt": [0, 1, 0, 0, 1, 1],
        "task": ["a_b", "c", "a_b", "a_b", "c", "c"],
        "item": ["x", "y", "x", "x", "y", "y"],
        "loss": [5.0, 2.0, 1.0, 3.0, 0.0, 1.0],
        "prefers_before": [True, True, True, True, False, True],
        "prefers_after": [True, False, True, True, True, True],
        "says_before": [False] * 6,
        "says_after": [True] * 6,
    }
)


def test_own_edits_and_beyond_random_compare_prompt_by_prompt():
    assert suppression.own_edits(EDITS).loss.to_dict() == {0: 5.0, 1: 2.0}
    assert suppression.beyond_random(EDITS, "loss").to_dict() == {0: 3.0, 1: 1.5}


def test_stays_counts_what_was_right_before_and_knows_nothing_of_the_rest():
    estimate = suppression.stays(EDITS)
    assert (estimate.value, estimate.n) == (pytest.approx((1 + 0.5) / 2), 2)  # x: all of three; y: one of two
    assert suppression.stays(EDITS, "says") == (0.5, 0.0, 1.0, 0)


def test_by_relation_estimates_all_and_each():
    found = suppression.by_relation(EDITS, {"loss": lambda table: stats.mean(table.loss)})
    assert {name: estimates["loss"].value for name, estimates in found.items()} == {
        "all facts": 2.0,
        "a b": 3.0,
        "c": 1.0,
    }


def test_with_first_tokens_lets_all_answers_compete(held_groups):
    held, facts, _ = held_groups
    table = suppression.with_first_tokens(asking.LM, asking.FACTS, facts).set_index("prompt")
    for p in (0, 7, 19):
        logp = asking.log_probabilities(held.queries[p])
        words = [asking.token(word) for word in asking.rivals(held.queries[p])]
        assert table.mass_before[p] == pytest.approx(float(logp[words].logsumexp(0)), abs=1e-4)


def test_on_unseen_templates_suppresses_what_the_first_templates_gave(held_groups):
    held, facts, _ = held_groups
    table = suppression.on_unseen_templates(held, facts)
    assert table.prompt.tolist() == [5 * i + t for i in range(4) for t in (3, 4)]
    found = suppression.chapter.refined(facts[2].scores[:3])
    assert table.loss[5] == pytest.approx(loss(held, 14, found), abs=1e-4)


def test_on_neighbours_asks_other_facts_of_the_relation(held_groups):
    held, facts, _ = held_groups
    table = suppression.on_neighbours(held, facts)
    assert list(zip(table.label, table.item, strict=True)) == [
        ("France", "Spain"),
        ("Spain", "France"),
        ("Anna", "cat"),
        ("cat", "Anna"),
    ]
    assert table.loss[0] == pytest.approx(loss(held, table.prompt[0], facts[0].neurons), abs=1e-4)


def test_everything_draws_neurons_of_the_row_and_of_other_facts_or_the_same_condition(held_groups, monkeypatch):
    held, facts, conditions = held_groups
    texts = asking.FACTS["capital"].queries[:2]  # the tiny vocabulary has no prose
    monkeypatch.setattr(suppression, "next_words", lambda count, seed: texts)
    trials = []
    monkeypatch.setattr(suppression.ablation, "measure", lambda held, some: trials.extend(some) or measure(held, some))
    table = suppression.everything(held, facts, conditions, np.random.default_rng(0), count=2)
    assert len(table) == 4 * 5 * 2 and set(table.row) == {"capital", "likes", "noun", "verb"}
    groups = {id(group.neurons): group for group in [*facts, *conditions.values()]}
    for trial, row in zip(trials, table.itertuples(), strict=True):
        group = groups[id(trial.neurons)]
        assert group.task == row.row
        assert (row.column == "text") == (row.prompt >= len(held.queries))
        if row.column in ("capital", "likes"):
            assert group.name != row.item
        elif row.column == row.row:
            assert group.name == row.value
    kinds = {(row.row, row.column): row[-2:] for row in table.itertuples(index=False)}
    assert kinds["capital", "capital"] == ("facts", "other facts of the relation")
    assert kinds["capital", "likes"] == ("facts", "other relations")
    assert kinds["likes", "verb"] == ("facts", "agreement")
    assert kinds["noun", "noun"] == ("agreement", "the same condition")
    assert kinds["noun", "verb"] == ("agreement", "other phenomena")
    assert kinds["verb", "capital"] == ("agreement", "facts")
    assert kinds["verb", "text"] == ("agreement", "plain text")


def test_shared_neurons_are_those_that_most_groups_have(held_groups):
    _, facts, _ = held_groups
    sets = [[(0, 1), (1, 2)], [(1, 2), (2, 3)], [(1, 2), (2, 3), (0, 5)]]
    groups = [type(facts[0])("", "", None, some, None, [], []) for some in sets]
    assert suppression.shared_neurons(groups, 2) == [(1, 2), (2, 3)]


def test_perplexities_are_those_of_the_whole_model(monkeypatch):
    texts = ["the cat is in Paris", "Anna saw these red books"]
    monkeypatch.setattr(suppression.prose, "passages", lambda: [*texts, "never read"])
    rows = suppression.perplexities(asking.LM, {"a_b": [(1, 3)]}, count=2)
    with suppress(asking.LM, [(1, 3)], position="all"):
        expected = predictions.text_loss(asking.LM, texts)
    assert [row["neurons suppressed everywhere"] for row in rows] == ["none", "a b: 1·3"]
    assert rows[1]["perplexity"] == f"{expected.mean().exp():.1f}"


def test_word_changes_are_of_mean_probabilities_over_the_sentences(held_groups):
    held, _, conditions = held_groups
    condition = conditions["verb", "plural"]
    other = [[(1, 4)], [(2, 6)]]
    words = {"plural": ["saw", "these"], "singular": ["is"]}
    shown, marks = suppression.word_changes(held, condition, words, {"random": other})
    assert {group: list(some) for group, some in shown.items()} == words

    def mean(word, sets):
        found = []
        for some in sets:
            with suppress(asking.LM, some):
                logp = [asking.log_probabilities(held.queries[p])[asking.token(word)] for p in condition.prompts]
                found.append(torch.stack(logp).exp().mean())
        return float(torch.stack(found).mean())

    for word in ("saw", "is"):
        before = float(
            np.mean([asking.log_probabilities(held.queries[p])[asking.token(word)].exp() for p in condition.prompts])
        )
        own, drawn = mean(word, [condition.neurons]), mean(word, other)
        group = "plural" if word == "saw" else "singular"
        assert shown[group][word][0].value == pytest.approx((own - before) / min(own, before), rel=1e-3)
        assert marks["random"][word] == pytest.approx((drawn - before) / min(drawn, before), rel=1e-3)
        assert not shown[group][word][1]  # two lemmas cannot be significant


def test_examples_show_a_fact_and_a_sentence_before_and_after(held_groups):
    held, facts, conditions = held_groups
    rows = suppression.examples(held, facts, conditions)
    assert [row[""] for row in rows] == ["before", "after", "before", "after"]
    tested = [p for group in conditions.values() for p in group.prompts]
    best = max(tested, key=lambda p: float(held.logp[p, 0]))
    query = held.queries[best]
    assert rows[2]["prompt"] == query.prompt and rows[1]["prompt"] == ""
    logp = asking.log_probabilities(query)
    right, wrong = (float(logp[asking.token(word)].exp()) for word in (query.target, query.foil))
    assert rows[2]["right, wrong"] == f"{query.target} {right:.3f}, {query.foil} {wrong:.3f}"


def test_title_names_the_condition_and_its_neurons(held_groups):
    _, _, conditions = held_groups
    group = conditions["noun", "plural"]
    assert suppression.title(group).startswith(f"neurons of noun, plural: {group.neurons[0].block}·")


def test_compare_replays_conditions_as_the_whole_model_runs(held_groups):
    held, _, conditions = held_groups
    table = suppression.compare(held, conditions.values(), 1)
    own = suppression.own_edits(table)
    for group in conditions.values():
        for p in group.prompts:
            assert own.loss[p] == pytest.approx(loss(held, p, group.neurons), abs=1e-4)


def test_unspecific_damage_costs_an_answer_about_as_much_as_its_own_neurons(held_groups):
    held, facts, _ = held_groups
    own = suppression.own_edits(suppression.compare(held, facts, 1, neighbours=True))
    damaged = suppression.unspecific(held, facts, own)
    assert sorted(damaged.index) == sorted(own.index)
    fact = facts[0]
    want = own[own.item == fact.name].loss.mean()
    sizes = fact.sizes.clone()
    sizes[0] = 0  # block 0 is left alone
    order = [divmod(i, sizes.shape[1]) for i in sizes.flatten().argsort(descending=True).tolist()]
    order = [at for at in order if at[0]]
    means = [np.mean([loss(held, p, order[:k]) for p in fact.prompts]) for k in suppression.DAMAGE if k <= len(order)]
    nearest = min(means, key=lambda mean: abs(mean - want))
    assert damaged[damaged.item == fact.name].loss.mean() == pytest.approx(nearest, abs=1e-4)


def test_gains_of_odds_are_those_of_the_probabilities_and_end_at_the_surest():
    p = np.array([[0.5, 0.8], [0.9, 0.1], [1.0, 0.5]])
    table = pd.DataFrame(np.log(p), columns=["logp_before", "logp_after"])
    expected = [np.log(4), np.log(1 / 9 / 9), -np.log((1 - 1e-6) / 1e-6)]
    assert np.allclose(suppression.odds_gains(table), expected)


def test_enhanced_neurons_are_the_facts_own_and_another_facts(held_groups):
    held, facts, _ = held_groups
    table = suppression.enhanced(held, facts, 3.0).set_index(["prompt", "label"])
    p, query = facts[1].prompts[0], held.queries[facts[1].prompts[0]]
    before = asking.log_probabilities(query)[asking.token(query.target)]
    for label, some in ((suppression.OWN, facts[1].neurons), (suppression.ANOTHER, None)):
        some = some or facts[0].ranked(len(facts[1].neurons))
        with enhance(asking.LM, some, 3.0):
            after = asking.log_probabilities(query)[asking.token(query.target)]
        assert table.loss[p, label] == pytest.approx(float(before - after), abs=1e-4)


def test_a_condition_counts_once_however_many_sentences_it_has():
    edits = pd.DataFrame({"task": ["a", "a", "a", "b"], "value": ["x", "x", "y", "x"]})
    found = suppression.by_condition(pd.Series([1.0, 0.0, 1.0, 0.0]), edits)
    assert (found.value, found.n) == (0.5, 3)
    assert found.sample.groups[0].tolist() == [0.5, 1.0, 0.0]
