"""Groups of prompts and how alike they are, against tables written by hand."""

import math

import numpy as np
import pytest
import torch

from kncore import neurons
from kncore.neurons import Found, Neuron
from knpaper import likeness
from knpaper.stimuli import Selection

TABLES = [np.arange(6).reshape(3, 2), np.arange(6, 10).reshape(2, 2)]


def test_places_stand_one_group_after_the_other():
    assert [group.tolist() for group in likeness.places([2, 3, 1])] == [[0, 1], [2, 3, 4], [5]]


def test_one_template_takes_as_many_facts_as_there_are_templates():
    assert [group.tolist() for group in likeness.one_template(TABLES[0])] == [[0, 2], [3, 5]]
    assert likeness.one_template(np.arange(4).reshape(1, 4)) == []


def test_shuffled_keeps_every_place_in_its_template_and_relation():
    rows = np.array(likeness.shuffled(TABLES, np.random.default_rng(0)))
    assert sorted(rows[:3, 0]) == [0, 2, 4] and sorted(rows[:3, 1]) == [1, 3, 5]
    assert sorted(rows[3:, 0]) == [6, 8] and sorted(rows[3:, 1]) == [7, 9]


def test_sizes_say_how_the_search_ends():
    scores = torch.zeros(4, 2, 6)
    scores[:2, 0, :3] = 1.0  # three neurons in both prompts: found at once
    scores[2:, 1, 0] = 1.0  # a single one: p goes down to 0 and finds no second
    found = likeness.sizes(scores, [[0, 1], [2, 3]])
    assert found["found 2 to 5 [95 %]"].startswith("0.50 [")
    assert found["refined, mean"] == "2.00"
    assert found["p reached, mean [95 %]"].startswith("0.35 [")  # 0.7 and 0


def test_by_chance_finds_facts_that_are_alike():
    facts = torch.eye(5)
    vectors = facts.repeat_interleave(2, 0) + 0.01 * torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    tables = [np.arange(10).reshape(5, 2)]
    cosines = neurons.gram(vectors)
    found = likeness.by_chance(cosines, tables, np.random.default_rng(0), times=200)
    pairs = [float(cosines[2 * i, 2 * i + 1].abs()) for i in range(5)]  # R₁² of two is |cos|
    assert found["R₁² of one fact"] == f"{np.mean(pairs):.3f}"
    assert float(found["shuffled, mean"]) < 0.5 and float(found["p"]) < 0.05
    assert list(found)[2] == "shuffled, largest of 200"


def test_known_facts_are_the_first_of_relations_with_five():
    relations = [Selection([None] * 35, 9, 6), Selection([None] * 35, 9, 4), Selection([None] * 25, 5, 5)]
    tables = likeness.known_facts(relations)
    assert [table.shape for table in tables] == [(6, 5), (5, 5)]
    assert tables[0][0].tolist() == [0, 1, 2, 3, 4] and tables[1][0, 0] == 70
    assert [table.shape for table in likeness.known_facts([Selection([None] * 35, 9, 0)])] == [(7, 5)]


def test_a_mixed_group_has_five_facts_in_five_templates_and_uses_every_prompt_once():
    table = np.arange(35).reshape(7, 5)
    groups = np.array(likeness.mixed(table))
    assert sorted(groups.flatten()) == list(range(35))
    assert (groups % 5 == np.arange(5)).all() and all(len(set(row // 5)) == 5 for row in groups)
    assert likeness.mixed(table[:4]) == []


def test_groups_across_spans_take_five_of_them():
    spans = [np.arange(10 * i, 10 * i + 7) for i in range(8)]
    assert [group.tolist() for group in likeness.split(spans[0])] == [[0, 1, 2, 3, 4]]
    groups = likeness.across(spans, np.random.default_rng(0))
    assert [len(some) for some in groups] == [1] * 8
    for own, (group,) in enumerate(groups):
        assert group[0] // 10 == own and len({x // 10 for x in group}) == 5
    (few,) = likeness.across(spans[:2], np.random.default_rng(0))[0]
    assert [x // 10 for x in few] == [0, 1, 0, 1, 0]


def test_a_search_succeeds_with_the_neurons_it_seeks_in_half_of_the_prompts():
    found = [Found([], [], p, done) for p, done in ((0.7, True), (0.5, True), (0.45, True), (0.7, False))]
    assert likeness.successes(found) == [True, True, False, False]


def test_a_leader_is_alone_in_small_company_more_often_than_in_large():
    a, b, c = (Neuron(0, i) for i in range(3))
    leaders = [a, a, b, c, None]
    assert likeness.alone(leaders, 4) == [0, 0, 1, 1, 0]  # all four others
    assert likeness.alone(leaders, 1) == [0.75, 0.75, 1, 1, 0]  # one of the four others shares it
    assert likeness.alone(leaders, 2) == [0.5, 0.5, 1, 1, 0]  # C(3, 2) / C(4, 2)
    assert likeness.alone(leaders, 99) == likeness.alone(leaders, 4)
    each, mean = likeness.owners([[Found([a], [1.0], 0.7, True)] * 2, [Found([b], [1.0], 0.7, True)] * 1])
    assert each == [0, 0, 1] and mean.value == 1 / 3


def test_localisation_is_the_mean_over_groups():
    scores = torch.zeros(4, 1, 6)
    scores[:, 0, 0] = 1.0  # in all four prompts
    scores[:2, 0, 1] = 0.5  # in the first two
    scores[2:, 0, 2:5] = 0.5  # in the others
    cosines = neurons.gram(scores.flatten(1))
    found = likeness.localisation(scores, cosines, {"r": [[0, 1], [2, 3]], "mixed": [[0, 2]]}).set_index("of")
    # Two neurons in both prompts of the first group, four in those of the second: both found at once, at p = 0.7.
    assert found.loc["r", ["groups", "|KN|", "p", "found", "R1²"]].tolist() == [2, 3.0, 0.7, 1.0, 1.0]
    # Only the first is in both; the others are in half, so that p falls below 0.5, where all five count.
    cosine = 1 / math.sqrt(1.25 * 1.75)
    assert found.loc["mixed", ["groups", "|KN|", "p", "found"]].tolist() == [1, 5.0, 0.45, 1.0]
    assert found.loc["mixed", "R1²"] == pytest.approx(cosine, abs=1e-3)
