"""Claims across models, on records small enough to count by hand."""

from __future__ import annotations

import pytest

from knpaper import across
from knpaper.rules import Claim

TRAINED, MASKED = across.KINDS
YES, NO, OPEN = "supported", "contradicted", "inconclusive"
FAMILIES = {"g": "gpt2", "l": "llama", "controlled-gpt2": "gpt2", "b": "bert", "controlled-bert": "bert"}


def claim_of(name: str, thesis: str = YES, paper: str = NO, **fields) -> Claim:
    return Claim(name, "01", "s", "2", "m", "above", 0.5, 3, thesis=thesis, paper=paper, **fields)


def found(monkeypatch, **verdicts: dict[str, str]) -> across.Records:
    """Records of claims by column; every claim is one for the thesis if it is supported."""
    declared = {name: claim_of(name, fixed="" if name == "a" else "abc", check=name == "check") for name in verdicts}
    monkeypatch.setattr(across, "CLAIMS", declared)
    return {
        (name, column): {
            "claim": name,
            "model": column.partition(",")[0],
            "family": FAMILIES[column.partition(",")[0]],
            "verdict": verdict,
            "side": declared[name].side(verdict),
        }
        for name, by_column in verdicts.items()
        for column, verdict in by_column.items()
    }


def test_claims_are_ordered_from_those_that_agree_to_those_that_flip(monkeypatch):
    records = found(
        monkeypatch,
        flips={"g": YES, "l": YES, "b": YES, "controlled-gpt2": NO},
        open={"g": OPEN, "l": OPEN},
        half={"g": YES, "l": OPEN},
        same={"g": NO, "l": NO},
        check={"g": YES},
    )
    rows = across.across(records)
    assert [(row.claim.id, row.agreement, row.verdict) for row in rows] == [
        ("same", 1, NO),
        ("half", 0.5, YES),
        ("open", 0, ""),
        ("flips", 0.5, ""),
    ]
    assert rows[-1].decided == ["g", "l", "b", "controlled-gpt2"] and rows[1].decided == ["g"]


def test_public_data_are_a_column_and_no_model(monkeypatch):
    records = found(monkeypatch, a={"g": YES, "g, public data": NO})
    assert [row.flips for row in across.across(records)] == [True]
    assert [row.flips for row in across.across(across.own(records))] == [False]


def test_verdicts_are_counted_by_side_and_by_when_their_rule_was_chosen(monkeypatch):
    records = found(monkeypatch, a={"g": YES, "l": NO}, b={"g": NO, "l, public data": OPEN}, check={"b": YES})
    assert across.tally(records) == {
        "the thesis": 1,
        "the paper": 2,
        "neither": 1,
        "verdicts": 4,
        "inconclusive": 1,
        "fixed": 2,
        "models": 2,
    }


def test_evidence_is_what_most_models_say_net_of_those_that_say_the_opposite(monkeypatch):
    records = found(
        monkeypatch,
        one_more={"g": YES, "l": YES, "b": NO},
        all_of_two={"g": YES, "l": YES},
        even={"g": YES, "l": NO},
        against={"g": NO},
    )
    rows = across.across(records)
    named = [(row.claim.id, verdict, columns) for row, verdict, columns in across.evidence(rows, "the thesis")]
    assert named == [("all_of_two", YES, ["g", "l"]), ("one_more", YES, ["g", "l"])]
    assert [row.claim.id for row, *_ in across.evidence(rows, "the paper")] == ["against"]
    assert len(across.evidence(rows, "the thesis", most=1)) == 1


@pytest.mark.parametrize(
    ("verdicts", "kind", "expected"),
    [
        ({"g": YES, "l": YES, "b": NO}, MASKED, (1, 1)),
        ({"g": YES, "l": NO, "b": NO}, MASKED, (1, 0)),
        ({"g": YES, "l": NO, "b": OPEN}, MASKED, (0, 0)),
        ({"g": YES, "l": YES, "b": YES}, MASKED, (0, 0)),
        (
            {"controlled-bert": NO, "controlled-gpt2": NO, "b": YES},
            "models trained here, on sentences of our own",
            (1, 1),
        ),
    ],
)
def test_a_flip_goes_by_a_kind_of_models_that_parts_its_sides(monkeypatch, verdicts, kind, expected):
    assert across.split_by(across.across(found(monkeypatch, a=verdicts)), kind) == expected


def test_pairs_count_only_what_both_decide_and_flips_name_who_stands_alone(monkeypatch):
    records = found(monkeypatch, a={"g": YES, "l": NO, "b": NO}, b={"g": YES, "l": YES, "b": OPEN})
    rows = across.across(records)
    assert set(across.pairs(rows)) == {("g", "b", 1, 1), ("g", "l", 2, 1), ("l", "b", 1, 0)}
    assert across.pairs(rows)[0] == ("g", "b", 1, 1) and across.pairs(rows)[-1] == ("l", "b", 1, 0)
    assert {column: [row.claim.id for row in alone] for column, alone in across.alone(rows).items()} == {"g": ["a"]}
    assert across.leaning(rows) == {"g": (1, 0), "l": (0, 1), "b": (0, 1)}


def test_pretrained_causal_models_are_compared_on_what_all_of_them_decide(monkeypatch):
    records = found(
        monkeypatch,
        a={"g": YES, "l": YES, "b": NO, "controlled-gpt2": NO},
        b={"g": YES, "l": NO},
        c={"g": YES, "l": OPEN},
        d={"g": NO},
    )
    columns, alike, opposite = across.pretrained(across.across(records))
    assert sorted(columns) == ["g", "l"]
    assert ([row.claim.id for row in alike], [row.claim.id for row in opposite]) == (["a"], ["b"])
    lone = {key: record for key, record in records.items() if key[1] != "l"}
    assert across.pretrained(across.across(lone)) == (["g"], [], [])
