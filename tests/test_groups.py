"""Facts and conditions with their neurons and prompts, on tiny models, against what they are made of."""

import asking
import numpy as np
import pytest
import torch

from kncore import ablation
from knpaper import groups


@pytest.fixture(scope="module")
def held_groups():
    return asking.held_groups()


def test_hold_gives_every_fact_its_scores_and_its_five_prompts(held_groups):
    held, facts, _ = held_groups
    scores = asking.scores()
    assert [fact.name for fact in facts] == ["France", "Spain", "Anna", "cat"]
    assert [fact.task for fact in facts] == ["capital", "capital", "likes", "likes"]
    for i, fact in enumerate(facts):
        assert fact.prompts == list(range(5 * i, 5 * i + 5))
        assert torch.equal(fact.scores, scores[5 * i : 5 * i + 5])
        assert {held.queries[p].item for p in fact.prompts} == {fact.name}


def test_hold_gives_every_condition_the_scores_of_its_first_pairs_and_the_prompts_of_the_others(held_groups):
    held, facts, conditions = held_groups
    assert list(conditions) == list(asking.PAIRS)
    for i, (condition, group) in enumerate(conditions.items()):
        assert (group.task, group.name) == condition
        assert torch.equal(group.scores, asking.scores()[20 + 2 * i : 22 + 2 * i])
        assert [held.queries[p] for p in group.prompts] == asking.PAIRS[condition].queries[2:]


def test_hold_measures_sizes_and_what_is_right_before_any_edit(held_groups):
    held, facts, conditions = held_groups
    for group in [*facts, *conditions.values()]:
        states = held.activations(group.prompts)
        assert torch.allclose(group.sizes, states.abs().sum(0) / len(group.prompts))
        for p in group.prompts:
            logp = asking.log_probabilities(held.queries[p])
            words = asking.rivals(held.queries[p])
            best = max(words, key=lambda word: logp[asking.token(word)])
            assert (p in group.right) == (best == held.queries[p].target)


def test_hold_refuses_a_relation_with_a_single_fact():
    asked = asking.FACTS["capital"]
    alone = {"capital": asked._replace(queries=asked.queries[:5])}
    with pytest.raises(ValueError, match="at least two facts"):
        groups.capture(asking.LM, alone, {}, 2, asking.scores())


def test_whole_answers_are_those_of_one_token_or_all_where_nearly_all_are_split():
    asked = asking.FACTS["capital"]
    split = asked._replace(candidates=["Paris", "Madrid", "Paris cat"])
    assert groups.whole_answers(asking.LM, split) == ["Paris", "Madrid"]
    few = asked._replace(candidates=["Paris", "Madrid cat", "Paris cat"])
    assert groups.whole_answers(asking.LM, few) == ["Paris", "Madrid cat", "Paris cat"]
    other = asked._replace(candidates=["red", "book", "Paris cat"])  # no fact has one of the whole words
    assert groups.whole_answers(asking.LM, other) == ["red", "book", "Paris cat"]


def test_join_holds_what_its_parts_hold(held_groups):
    queries = [query for asked in asking.FACTS.values() for query in asked.queries]
    words = [["Paris", "Madrid"]] * 7 + [["cat"]] * 3
    first, second = (
        ablation.capture_prompts(asking.LM, queries[:7], words[:7]),
        ablation.capture_prompts(asking.LM, queries[7:10], words[7:]),
    )
    both = groups.join([first, second])
    assert list(both.queries) == queries[:10]
    expected = torch.cat([first.activations(range(7)), second.activations(range(3))])
    assert torch.equal(both.activations(range(10)), expected)
    trials = [ablation.Ablation(p, [(0, p), (2, 3)]) for p in range(10)]
    moved = [trial._replace(prompt=trial.prompt - 7) for trial in trials[7:]]
    parts = [ablation.measure(first, trials[:7]), ablation.measure(second, moved)]
    for column in ("loss", "loss_mass", "logp_before", "margin_after"):
        apart = np.concatenate([part[column] for part in parts])
        assert np.allclose(ablation.measure(both, trials)[column], apart, atol=1e-5)


def test_ranked_and_alike_give_neurons_by_attribution_and_others_of_the_same_blocks(held_groups):
    _, facts, _ = held_groups
    fact = facts[0]
    mean = fact.scores.mean(0)
    best = [(block, index) for block in range(3) for index in range(24)]
    best.sort(key=lambda at: -float(mean[at]))
    assert list(map(tuple, fact.ranked(6))) == best[:6]
    for drawn in fact.alike(3):
        assert sorted(block for block, _ in drawn) == sorted(block for block, _ in fact.neurons)
        assert not set(drawn) & set(map(tuple, fact.neurons))


def test_mates_are_the_other_facts_of_the_relation(held_groups):
    _, facts, _ = held_groups
    assert [groups.mates(facts, i) for i in range(4)] == [[1], [0], [3], [2]]


def test_describe_counts_facts_conditions_neurons_and_prompts(held_groups):
    _, facts, conditions = held_groups
    each = sum(len(fact.neurons) for fact in facts) / 4
    assert groups.describe(facts, conditions).startswith(
        f"4 facts with {each:.1f} neurons each on average, tested on 20"
    )
    assert groups.describe(facts, conditions).endswith("tested on 8 sentences.")
