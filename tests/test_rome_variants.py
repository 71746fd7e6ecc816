"""Variants of ROME against numbers worked out by hand and against models changed by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import whole
from test_criteria import by_hand
from test_tokens import GPT2_BYTES

from kncore import rome, tokens
from kncore.editors import Edit, write_searches
from kncore.interventions import Delta
from kncore.query import Query
from knpaper import cases, criteria, rome_variants, stats
from knpaper.cases import Case

LM = tiny.lm("gpt2")
REQUESTS = [
    Query("the capital of France is", "Paris", "France", "Madrid", item="a", template="the capital of {} is"),
    Query("Anna saw the red Spain in", "Madrid", "Spain", "Paris", item="b", template="Anna saw the red {} in"),
]
SETTINGS = rome.HParams(1, steps=4, prefixes=2, stop=0.0, clamp=20.0)
SEARCHED = rome.search(LM, REQUESTS, SETTINGS)
MOMENT = torch.eye(24, dtype=torch.float64) + torch.outer(*[torch.arange(24, dtype=torch.float64) / 24] * 2)


@pytest.fixture(autouse=True)
def the_model_stays_as_it_was():
    yield
    assert not LM.is_modified


def flipped(request: Query) -> Query:
    return replace(request, target=request.foil, foil=request.target)


def some_cases() -> list[Case]:
    return [Case(r, {"reliability": (flipped(r),), "locality": (REQUESTS[1 - i],)}) for i, r in enumerate(REQUESTS)]


def key_at(query: Query, block: int) -> torch.Tensor:
    """The neurons at the last token of the subject, as a hook on the whole model reads them."""
    with torch.no_grad():
        return whole.run(LM, whole.ask(LM, query, "Paris"), block)[1]


def found(change, value=(3.0, 4.0), steps=5, failed="") -> rome.Search:
    """A search with so much change of the value, whose length is 5."""
    states = (torch.tensor(x) for x in ([1.0, 2.0], [2.0, 1.0], list(value), list(change)))
    return rome.Search(*states, steps, 0.1, 0.5, failed)


# The equation


def test_the_worked_example_is_that_of_pencil_and_paper():
    W, key, value, text = (np.array(x) for x in ([[1, 0], [1, 1]], [1, 2], [8, -8], [[2, 1], [0, 1]]))
    rows = rome_variants.worked_example(W, key, value, text)
    without, covariance = (
        {row["covariance"]: row[name] for row in rows} for name in ("none (the identity)", "of the text")
    )
    same = {"v = Wᵀk": "[3, 2]", "δ = v* − v": "[5, -10]", "(W + Δ)ᵀk": "[8, -8]", "rome.delta gives this Δ": "yes"}
    moves = ("first token moves by δ times", "second token", "sum of the squares")
    assert without == same | {
        "C": "[[1, 0], [0, 1]]", "u = C⁻¹k": "[1, 2]", "kᵀu": "5", "Δ = u δᵀ / kᵀu": "[[1, -2], [2, -4]]",
        **dict(zip(moves, ("0.8", "0.4", "0.8"), strict=True)),
    }  # fmt: skip
    assert covariance == same | {
        "C": "[[2, 1], [1, 1]]", "u = C⁻¹k": "[-1, 3]", "kᵀu": "5", "Δ = u δᵀ / kᵀu": "[[-1, 2], [3, -6]]",
        **dict(zip(moves, ("0.2", "0.6", "0.4"), strict=True)),
    }  # fmt: skip


@pytest.mark.parametrize("moment", [None, MOMENT])
def test_an_edit_checks_out_and_one_that_is_not_the_equations_does_not(moment):
    request, right = REQUESTS[0], SEARCHED[0]
    told = rome_variants.check_edit(LM, request, right, moment, 1)
    assert list(told.values())[-3:] == ["yes"] * 3 and told["rank of Δ"] == 1
    assert told["the capital of France is Madrid"] == f"4 steps, P = {right.probability:.2f}"
    assert told["‖δ‖ / ‖v‖"] == f"{float(right.change.norm() / right.value.norm()):.2f}"
    u = np.linalg.solve(np.eye(24) if moment is None else moment.numpy(), right.key.double().numpy())
    size = np.linalg.norm(u) * float(right.change.norm()) / float(right.key.double().numpy() @ u)
    assert told["‖Δ‖ / ‖W‖"] == f"{abs(size) / float(whole.vectors(LM, 1).norm()):.4f}"
    wrong = rome_variants.check_edit(LM, request, replace(right, value=right.value + 1), moment, 1)
    assert list(wrong.values())[-3:] == ["yes", "yes", "no"]


# Keys, and how far an edit reaches


def test_keys_are_what_a_hook_reads_at_the_subject_or_at_the_end_of_the_prompt():
    bare = Query("the cats of Anna", "books")
    got = rome_variants.keys(LM, [*REQUESTS, bare], 1)
    end = replace(bare, subject="Anna")
    for key, query in zip(got, [*REQUESTS, end], strict=True):
        torch.testing.assert_close(key, key_at(query, 1), atol=1e-5, rtol=1e-4)


def test_the_reach_of_a_token_is_its_key_times_u():
    delta = rome.delta(SEARCHED[0], MOMENT, 1)
    words, shares = rome_variants.token_reaches(LM, REQUESTS[0], delta)
    assert words == REQUESTS[0].prompt.split()
    u = np.linalg.solve(MOMENT.numpy(), SEARCHED[0].key.double().numpy())
    u = u / (SEARCHED[0].key.double().numpy() @ u)
    for word, share in zip(words, shares, strict=True):
        key = key_at(replace(REQUESTS[0], subject=word, template=""), 1)
        assert share == pytest.approx(float(key.double().numpy() @ u), abs=1e-4)
    assert shares[words.index("France")] == pytest.approx(1, abs=1e-4)


def test_the_mean_reach_worked_out_by_hand():
    edits = [Edit((Delta(0, torch.tensor([u]), torch.ones(1, 2)),)) for u in ([1.0, 0.0], [0.0, 2.0])]
    others = [torch.tensor([[1.0, 9.0], [-3.0, 9.0]]), torch.tensor([[9.0, 0.5]])]
    assert rome_variants.reach(edits, others) == stats.mean([2.0, 1.0])
    kept = rome_variants.reach([edits[0], Edit(failed="diverged"), edits[1]], [others[0], others[0], others[1]])
    assert (kept.value, kept.n) == (1.5, 2)


# Searches


def test_the_ends_of_searches_worked_out_by_hand():
    settings = rome.HParams(0, steps=5, decay=0.5, stop=0.05, clamp=2.0)
    searches = [found((10.0, 0.0)), found((1.0, 0.0), steps=3), found((2.6, 0.0), steps=4)]
    table = rome_variants.ends(searches, settings)
    assert table["steps"].tolist() == [5, 3, 4] and table["all_steps"].tolist() == [True, False, False]
    assert table["decayed"].tolist() == [True, False, True]  # .5 · 10 / 25 = .2, .02, .052
    assert table["clamped"].tolist() == [True, False, False]


def test_without_its_space_an_answer_has_the_tokens_of_the_bare_word():
    request = Query("The capital of France is", "Paris", "France", "Madrid")
    usual = rome.prompts(GPT2_BYTES, request, SETTINGS)
    changed = rome_variants.without_space(GPT2_BYTES, request, SETTINGS)
    bare = tuple(GPT2_BYTES.tokenizer("Madrid")["input_ids"])
    spaced = tuple(GPT2_BYTES.tokenizer(" Madrid")["input_ids"])
    assert bare != spaced and all(e.target == spaced for e, _ in usual)
    assert [(replace(e, target=bare), at) for e, at in usual] == changed
    assert rome_variants.first_tokens(GPT2_BYTES, request, SETTINGS) == (spaced[0], bare[0])


def test_the_kl_term_is_read_at_the_subject_and_nothing_else_changes():
    for request in REQUESTS:
        *usual, (essence, at) = rome.prompts(LM, request, SETTINGS)
        *changed, (read, again) = rome_variants.kl_at_the_subject(LM, request, SETTINGS)
        assert changed == usual and (read.ids, read.target, again) == (essence.ids, essence.target, at)
        assert LM.tokenizer.decode([read.ids[read.position]]) == request.subject
        assert read.position != essence.position
    moved = rome.search(LM, REQUESTS, replace(SETTINGS, kl=5.0), read=rome_variants.kl_at_the_subject)
    for one, other in zip(moved, rome.search(LM, REQUESTS, replace(SETTINGS, kl=5.0)), strict=True):
        assert torch.equal(one.key, other.key) and not torch.allclose(one.change, other.change)


def test_the_drift_is_a_divergence_of_two_plain_passes():
    edit = Edit((rome.delta(SEARCHED[0], None, 1),))
    ids = torch.tensor([LM.tokenizer("France is a")["input_ids"]])
    with torch.no_grad():
        before, after = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (LM.model, by_hand(LM, edit)))
    want = float(sum(p.exp() * (p - q) for p, q in zip(after, before, strict=True)))
    assert rome_variants.drift(LM, REQUESTS[0], edit) == pytest.approx(want, abs=1e-5) and want > 1e-3


def test_a_row_for_each_way_to_read_the_kl_term():
    edits = write_searches(SEARCHED, None, 1)
    failed = [replace(SEARCHED[0], failed="diverged"), replace(SEARCHED[1], change=-SEARCHED[1].change)]
    table = rome_variants.kl_table(LM, REQUESTS, {"here": (SEARCHED, edits), "there": (failed, edits)})
    assert table["the term is read"].tolist() == ["here", "there"] and table["n"].tolist() == [2, 1]
    assert table["cosine of δ to that of the first row"].tolist() == ["1.00", "-1.00"]
    drifts = [rome_variants.drift(LM, *pair) for pair in zip(REQUESTS, edits, strict=True)]
    assert table["drift, nats"].tolist() == [f"{sum(drifts) / 2:.2f}", f"{drifts[1]:.2f}"]
    assert table["P"].tolist()[1] == f"{SEARCHED[1].probability:.2f}"


# Variants


def test_variants_are_measured_as_each_alone():
    drawn, edits = some_cases(), write_searches(SEARCHED, None, 1)
    variants = {"as here": edits, "nothing": [Edit()] * 2, "failed": [Edit(failed="singular")] * 2}
    table = rome_variants.measure(LM, drawn, variants)
    assert list(dict.fromkeys(table["variant"])) == list(variants)
    for name, some in variants.items():
        mine = table[table["variant"] == name].drop(columns="variant").reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, criteria.measure(LM, drawn, some))


def outcomes(variant: str, *rows) -> pd.DataFrame:
    """Rows of `measure`: case, criterion, failed, says before and after, and the log-probability after."""
    columns = ["case", "criterion", "failed", "says_before", "says_after", "logp_after"]
    table = pd.DataFrame(rows, columns=columns).astype({"says_before": "boolean", "says_after": "boolean"})
    return table.assign(variant=variant, margin_before=0.0, margin_after=0.0)


MEASURED = pd.concat(
    [
        outcomes("base", *((i, "reliability", "", False, False, math.log(0.2)) for i in range(9))),
        outcomes("same", *((i, "reliability", "", False, False, math.log(0.2)) for i in range(9))),
        outcomes("better", *((i, "reliability", "", False, i > 0, math.log(0.5)) for i in range(9))),
        outcomes("failed", *((i, "reliability", "singular", False, pd.NA, math.nan) for i in range(9))),
        outcomes("wrong", *((i, "locality", "", False, True, math.nan) for i in range(9))),
    ]
)


def test_the_table_of_variants_worked_out_by_hand():
    table = rome_variants.variant_table(MEASURED).set_index("")
    given = stats.share([False] + [True] * 8)
    assert table.loc["better", "reliability"] == f"0.89 [{given.low:.2f}, {given.high:.2f}], n = 9"
    assert table.loc["failed", "reliability"] == "no edit, 9 of 9"
    assert table.loc["wrong", "locality"] == "no such answer was right"
    assert table["P of the new answer"].tolist() == ["0.20", "0.20", "0.50", "", ""]


def test_differences_are_of_pairs_of_requests():
    bases = {"same": "base", "better": "base"}
    gaps = rome_variants.differences(MEASURED[MEASURED["variant"].isin(["base", *bases])], bases)
    assert list(gaps) == ["same", "better"] and gaps["same"]["reliability"][:3] == (0, 0, 0)
    gap = gaps["better"]["reliability"]
    assert gap.value == pytest.approx(8 / 9) and gap.n == 9 and gap.low > 0
    only = MEASURED[MEASURED["variant"].isin(["base", "failed"])]
    assert rome_variants.differences(only, {"failed": "base"}) == {}


# Two keys


def test_a_reworded_request_leaves_paraphrases_and_neighbours():
    (case,) = cases.bijective("capital", 1)
    moved = rome_variants.reworded(case, "{} has its capital in")
    assert (
        moved.request.prompt == f"{case.request.subject} has its capital in" == moved.queries["reliability"][0].prompt
    )
    assert (moved.request.target, moved.request.foil) == (case.request.target, case.request.foil)
    assert moved.queries["reliability"][0].target == case.request.foil
    others = [name for name in case.queries if name != "reliability"]
    assert list(moved.queries) == list(case.queries) and all(
        moved.queries[name] == case.queries[name] for name in others
    )
    assert tokens.span(GPT2_BYTES, moved.request)[0] == 0


def test_the_row_of_the_two_keys_worked_out_by_hand():
    searches = [found((1.0, 0.0)), found((9.0, 9.0), failed="diverged")]
    edits = [Edit((Delta(0, torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])),)), Edit(failed="diverged")]
    row = rome_variants.key_row(searches, None, {"mean key": edits})
    assert row == {  # the keys are (1, 2) and (2, 1)
        "n": 1,
        "P, searched": "0.50",
        "cosine of the keys": "0.80",
        "kᵀu, bare / mean": "0.80",
        "‖Δ‖, mean key": "10.0",
    }


# Fields of scholars


def test_fields_from_a_set_are_those_before_the_old_ones_in_a_ring():
    old = list(cases.scholars().values())
    one, again, other = (rome_variants.fields_from_a_set(number) for number in (1, 1, 2))
    assert one == again != other
    for new in (one, other):
        before = dict(zip(old, new, strict=True))
        assert [before[field] for field in old] == new and Counter(before.values()) == Counter(set(old))
        ring, field = [], old[0]
        while field not in ring:
            ring.append(field)
            field = before[field]
        assert len(ring) == len(set(old))


def test_fields_from_a_seed_are_the_same_in_every_process():
    here = rome_variants.fields_from_a_seed(3)
    assert here == [case.request.foil for case in cases.synonymy(seed=3)] != rome_variants.fields_from_a_seed(4)
    assert here == rome_variants.fields_from_a_seed(3, 1) == rome_variants.fields_from_a_seed(3, 2)
