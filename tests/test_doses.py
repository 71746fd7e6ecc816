"""Neurons suppressed in order of attribution on a tiny model, and the curves of what stays, against counts by hand."""

import asking
import numpy as np
import pandas as pd
import pytest

from kncore.interventions import enhance, suppress
from knpaper import doses


@pytest.fixture(scope="module")
def held_groups():
    return asking.held_groups()


def prefers(held, p, change) -> bool:
    """Whether the right word is the best of those that compete, in the model run as a whole under a change."""
    with change:
        logp = asking.log_probabilities(held.queries[p])
    words = asking.rivals(held.queries[p])
    return max(words, key=lambda word: logp[asking.token(word)]) == held.queries[p].target


def test_doses_end_at_a_twentieth_of_the_neurons():
    assert doses.doses(asking.LM) == [1, 2, 3]  # 72 neurons


def test_of_facts_suppresses_and_enhances_the_first_neurons_in_order(held_groups):
    held, facts, conditions = held_groups
    table = doses.of_facts(held, facts, conditions, np.random.default_rng(0))
    right = {i: fact.right for i, fact in enumerate(facts) if fact.right}
    assert right and set(table.unit) == set(right)
    for i, prompts in right.items():
        mine = table[table.unit == i]
        for dose in (1, 2, 3):
            order = facts[i].ranked(3)[:dose]
            rows = mine[mine.dose == dose].set_index("label")
            own = rows.loc[["the fact"]]
            assert own.prompt.tolist() == prompts[:2]
            assert own.prefers_after.tolist() == [prefers(held, p, suppress(asking.LM, order)) for p in prompts[:2]]
            assert rows.prefers_after["enhanced ×4"] == prefers(held, prompts[0], enhance(asking.LM, order, 4.0))
            assert len(rows.loc[["random neurons"]]) == 2
        beside = mine.drop_duplicates("label").set_index("label")
        for label, others in (
            ("a fact of the relation", [fact for fact in facts if fact.task == facts[i].task and fact is not facts[i]]),
            ("an unrelated fact", [fact for fact in facts if fact.task != facts[i].task]),
            ("a minimal pair", list(conditions.values())),
        ):
            pool = [p for other in others for p in other.right]
            assert beside.prompt[label] in pool if pool else label not in beside.index


def test_of_conditions_asks_unseen_sentences_other_phenomena_and_known_facts(held_groups):
    held, facts, conditions = held_groups
    table = doses.of_conditions(held, facts, conditions, np.random.default_rng(0))
    tasks = {"the condition's pairs", "another phenomenon", "a known fact", "random neurons", "most active neurons"}
    assert set(table.label) <= tasks
    assert table.prefers_before.all() and (table.unit == table.prompt).all()
    assert set(table[table.label == "a known fact"].task) <= {"capital", "likes"}
    right = sorted(p for group in conditions.values() for p in group.right)
    assert sorted(set(table[table.label == "the condition's pairs"].prompt)) == right


TABLE = pd.DataFrame(
    [
        ("the fact", 1, 0, True),
        ("the fact", 1, 0, False),
        ("the fact", 5, 0, False),
        ("the fact", 5, 0, False),
        ("an unrelated fact", 1, 0, True),
        ("an unrelated fact", 5, 0, False),
        ("the fact", 1, 3, False),
        ("the fact", 5, 3, False),
        ("an unrelated fact", 1, 3, False),
        ("an unrelated fact", 5, 3, True),
        ("the fact", 1, 4, True),
        ("the fact", 5, 4, True),
    ],
    columns=["label", "dose", "unit", "prefers_after"],
)


def test_curves_are_shares_at_each_dose_over_units():
    found = doses.curves(TABLE, ["the fact", "an unrelated fact"])
    assert {dose: estimate.value for dose, estimate in found["the fact"].items()} == {1: pytest.approx(0.5), 5: 1 / 3}
    assert found["the fact"][1].n == 3 and found["an unrelated fact"][5].n == 2


def test_falls_says_at_which_dose_and_whether_alone():
    found = doses.falls(TABLE)
    assert found.dose.dropna().to_dict() == {0: 5, 3: 1}  # half of the prompts is not fewer than half
    assert found.alone[found.dose.notna()].to_dict() == {0: False, 3: True}
    assert not found[found.dose.isna()].alone.any()  # a fact that never falls does not fall alone


def test_a_fact_falls_in_company_where_three_of_four_neighbours_stand():
    rows = [("the fact", 1, 0, stands) for stands in (False, False)]
    rows += [("a fact of the relation", 1, 0, stands) for stands in (True, True, True, False)]
    rows += [("the fact", 1, 1, False)]
    rows += [("a fact of the relation", 1, 1, stands) for stands in (True, True, False, False)]
    found = doses.falls(pd.DataFrame(rows, columns=["label", "dose", "unit", "prefers_after"]))
    assert found.in_company.to_dict() == {0: True, 1: False}
    assert found.alone.to_dict() == {0: False, 1: False}  # no unrelated fact was asked
