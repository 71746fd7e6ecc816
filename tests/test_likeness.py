"""Groups of prompts and how alike they are, against tables written by hand."""

import numpy as np
import torch

from kncore import neurons
from knpaper import likeness

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
