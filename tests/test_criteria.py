"""Criteria against whole forward passes of models whose weights are changed by hand, one question at a time."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kncore import arch, models, zoo
from kncore.editors import Edit
from kncore.interventions import Delta, edited
from kncore.query import Query
from knpaper import criteria, stats
from knpaper.cases import Case
from knpaper.criteria import entropy, generations, measure, success, summary

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
on_all_families = pytest.mark.parametrize("family", tiny.FAMILIES)

# Prompt, target, foil: of one token and of several, with the same beginning, and without a foil.
ASKED = [
    ("the capital of France is", "Paris", "Madrid"),
    ("Anna saw", "these red cats", "this"),
    ("the capital of", "Spain", "Spain is red"),
    ("these", "books", ""),
    ("Anna saw these", "red cat in", "red book"),
]


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    assert not any(lm.is_modified for lm in MODELS.values())


def queries(masked: bool) -> list[Query]:
    return [Query(prompt + (" [MASK] ." if masked else ""), target, foil=foil) for prompt, target, foil in ASKED]


def delta(block: int, rank: int, seed: int, size: float = 0.5) -> Delta:
    rng = torch.Generator().manual_seed(seed)
    return Delta(block, *(size * torch.randn(rank, width, generator=rng) for width in (24, 16)))


def some_edits() -> list[Edit]:
    """Low and high rank, several blocks, a context, a context with a delta, nothing at all, a failure, one twice."""
    both = Edit((delta(0, 1, 1), delta(2, 2, 2), delta(0, 1, 3)))
    return [
        Edit((delta(1, 1, 0),)),
        both,
        Edit((delta(1, 20, 4, 0.2),)),
        Edit(context="the cat is in Paris . "),
        Edit((delta(2, 1, 5),), context="Anna saw Spain . "),
        Edit(),
        Edit(failed="the search diverged"),
        both,
    ]


def some_cases(masked: bool) -> list[Case]:
    asked = queries(masked)
    forms = [
        {"reliability": asked[:1], "generality": asked[1:3]},
        {"locality": asked[2:5], "symmetry": asked[:2]},
        {"reliability": asked[4:], "symmetry_old": asked[3:4]},
        {"generality": asked},
        {"synonymy": asked[1:], "reliability": asked[:1]},
        {"locality": asked[:3]},
        {"reliability": asked[:1], "locality": asked[1:2]},
        {"generality": asked[1:4]},
    ]
    return [
        Case(replace(asked[0], item=f"fact {i}"), {name: tuple(some) for name, some in form.items()})
        for i, form in enumerate(forms)
    ]


def by_hand(lm, edit: Edit):
    """A copy of the model with the value vectors written anew."""
    model = copy.deepcopy(lm.model)
    for one in edit.deltas:
        module = arch.projection(model, lm.spec, one.block)
        change = sum(torch.outer(a, b) for a, b in zip(one.neurons, one.hidden, strict=True))
        module.weight += change.T if isinstance(module, torch.nn.Linear) else change
    return model


def word_alone(lm, model, prompt: str, word: str) -> dict:
    """What a model gives one word: every token in a forward pass of its own, over unpadded text."""
    table = lm.tokenizer.get_vocab()
    wanted = [table[one] for one in word.split()]
    rows = []
    for k in range(len(wanted)):
        if lm.spec.masked:
            ids = lm.tokenizer(prompt.replace("[MASK]", " ".join(["[MASK]"] * len(wanted))))["input_ids"]
            at = ids.index(table["[MASK]"]) + k
        else:
            ids = [table[one] for one in prompt.split()] + wanted[:k]
            at = -1
        with torch.no_grad():
            rows.append(model(torch.tensor([ids])).logits[0, at].double().log_softmax(-1))
    return {
        "logp": float(np.mean([float(row[token]) for row, token in zip(rows, wanted, strict=True)])),
        "says": all(int(row.argmax()) == token for row, token in zip(rows, wanted, strict=True)),
        "rank": sorted(rows[0].tolist(), reverse=True).index(float(rows[0][wanted[0]])),
        "top": int(rows[0].argmax()),
        # What stands within a rounding error of another value may be ranked either way.
        "clear": all(float(row.sort().values.diff().min()) > 1e-4 for row in rows),
    }


@on_all_families
def test_the_table_is_what_models_changed_by_hand_say(family):
    lm = MODELS[family]
    cases, edits = some_cases(lm.spec.masked), some_edits()
    table = measure(lm, cases, edits, budget=40)
    rows = iter(table.itertuples())
    changed, clear = 0, []
    for i, (case, edit) in enumerate(zip(cases, edits, strict=True)):
        model = by_hand(lm, edit)
        for criterion, asked in case.queries.items():
            for query in asked:
                row = next(rows)
                told = (row.case, row.item, row.criterion, row.prompt, row.target, row.foil, row.failed)
                assert told == (i, f"fact {i}", criterion, query.prompt, query.target, query.foil, edit.failed)
                seen = {}
                for when, one, context in (("before", lm.model, ""), ("after", model, edit.context)):
                    if when == "after" and edit.failed:
                        continue
                    seen[when] = target = word_alone(lm, one, context + query.prompt, query.target)
                    assert getattr(row, f"logp_{when}") == pytest.approx(target["logp"], abs=5e-5)
                    clear.append(target["clear"])
                    if target["clear"]:
                        assert getattr(row, f"says_{when}") == target["says"]
                        assert getattr(row, f"rank_{when}") == target["rank"]
                    margin = math.nan
                    if query.foil:
                        margin = target["logp"] - word_alone(lm, one, context + query.prompt, query.foil)["logp"]
                    assert getattr(row, f"margin_{when}") == pytest.approx(margin, abs=1e-4, nan_ok=True)
                if not edit.failed and seen["before"]["clear"] and seen["after"]["clear"]:
                    assert row.kept == (seen["before"]["top"] == seen["after"]["top"])
                    changed += not row.kept
    assert next(rows, None) is None and changed and np.mean(clear) > 0.8


def said(lm, prompt: str) -> str:
    """The two words that the model says after the prompt, or at its two masks."""
    found = []
    for k in range(2):
        if lm.spec.masked:
            ids = lm.tokenizer(prompt.replace("[MASK]", "[MASK] [MASK]"))["input_ids"]
            at = ids.index(lm.tokenizer.mask_token_id) + k
        else:
            ids, at = lm.tokenizer(" ".join([prompt, *found]))["input_ids"], -1
        with torch.no_grad():
            found.append(lm.tokenizer.decode([int(lm.model(torch.tensor([ids])).logits[0, at].argmax())]))
    return " ".join(found)


@on_all_families
def test_a_target_of_two_tokens_is_said_if_both_are(family):
    lm = MODELS[family]
    prompts = [f"{a} {b} {c}" for a in ("the", "Anna", "Spain") for b in tiny.WORDS for c in ("is", "red", "cats")]
    prompts = [prompt + (" [MASK] ." if lm.spec.masked else "") for prompt in prompts]
    prompt, both = next((p, two) for p in prompts if set((two := said(lm, p)).split()) <= set(tiny.WORDS))
    one, other = both.split()
    wrong = next(word for word in tiny.WORDS if word not in (one, other))
    asked = [Query(prompt, target) for target in (both, f"{one} {wrong}", f"{wrong} {other}")]
    table = measure(lm, [Case(asked[0], {"reliability": tuple(asked)})], [Edit()])
    assert table["says_before"].tolist() == table["says_after"].tolist() == [True, False, False]
    assert (table["rank_after"] == 0).tolist() == [True, True, False]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 400), st.permutations(range(8)))
@on_all_families
def test_neither_the_budget_nor_the_order_of_cases_matters(family, budget, order):
    lm = MODELS[family]
    cases, edits = some_cases(lm.spec.masked), some_edits()
    want = measure(lm, cases, edits)
    got = measure(lm, [cases[i] for i in order], [edits[i] for i in order], budget, store=False)
    got = got.assign(case=[order[i] for i in got["case"]]).sort_values("case", kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(got, want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_question_is_run_once_in_batches_within_the_budget(monkeypatch, family):
    lm = MODELS[family]
    cases, edits = some_cases(lm.spec.masked), some_edits()
    shapes = []
    run = criteria._states
    monkeypatch.setattr(criteria, "_states", lambda *x, **y: shapes.append(tuple(y["input_ids"].shape)) or run(*x, **y))
    measure(lm, cases[1:2] * 3, [Edit()] * 3)
    prompts = [shape for shape in shapes if shape[1] > 3 or lm.spec.masked]
    assert sum(rows for rows, _ in prompts) == (8 if lm.spec.masked else 5)  # masks of two numbers: two prompts
    shapes.clear()
    measure(lm, cases, edits, budget=30)
    assert all(rows == 1 or rows * width <= 30 for rows, width in shapes) and max(shapes)[0] > 1


def test_edits_row_by_row_and_one_at_a_time_give_the_same_numbers(monkeypatch):
    lm = MODELS["gpt2"]
    cases, edits = some_cases(False), some_edits()
    want, run = measure(lm, cases, edits), criteria._states
    for limit, highest in ((0, 0), (criteria.LOW_RANK, 4), (1000, 20)):
        ranks = []

        def watch(lm, deltas, ranks=ranks, **batch):
            ranks += [sum(len(delta.neurons) for delta in some) for some in deltas]
            return run(lm, deltas, **batch)

        monkeypatch.setattr(criteria, "_states", watch)
        monkeypatch.setattr(criteria, "LOW_RANK", limit)
        pd.testing.assert_frame_equal(measure(lm, cases, edits, store=False), want, rtol=0, atol=5e-5)
        assert max(ranks) == highest  # what goes row by row


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_was_asked_is_read_from_the_store_and_what_is_new_is_asked(monkeypatch, family):
    lm = MODELS[family]
    cases, edits = some_cases(lm.spec.masked), some_edits()
    shapes, run = [], criteria._states
    monkeypatch.setattr(criteria, "_states", lambda *x, **y: shapes.append(tuple(y["input_ids"].shape)) or run(*x, **y))
    want = measure(lm, cases, edits)
    assert shapes
    shapes.clear()
    pd.testing.assert_frame_equal(measure(lm, cases, edits), want, rtol=0, atol=0)
    assert not shapes
    other = Edit((delta(1, 1, 5),))
    alone = measure(lm, cases[1:2], [other], store=False)
    shapes.clear()
    got = measure(lm, cases[1:2], [other])
    pd.testing.assert_frame_equal(got, alone, rtol=0, atol=5e-5)
    assert shapes and not got["logp_after"].equals(want.loc[want["case"] == 1, "logp_after"].reset_index(drop=True))


# What is missing stays missing


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_after_a_failed_edit_there_are_no_numbers(family):
    lm = MODELS[family]
    cases, edits = some_cases(lm.spec.masked), some_edits()
    table = measure(lm, cases, edits)
    failed = table["failed"] != ""
    assert set(table.loc[failed, "case"]) == {6} and set(table.loc[failed, "failed"]) == {"the search diverged"}
    after = [name for name in table if name.endswith("_after")] + ["kept"]
    assert table.loc[failed, after].isna().all(axis=None)
    before = ["says_before", "logp_before", "rank_before"]
    assert table[before].notna().all(axis=None) and table.loc[~failed, [*before, "kept"]].notna().all(axis=None)
    for by in criteria.FORMS:
        assert success(table, by)[failed].isna().all()


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_an_edit_that_leaves_no_numbers_is_a_failure_of_its_own_rows(family):
    lm = MODELS[family]
    case = some_cases(lm.spec.masked)[1]
    broken = Edit((Delta(1, torch.full((1, 24), 1e30), torch.full((1, 16), 1e30)),))
    table = measure(lm, [case, case], [broken, Edit((delta(1, 1, 0),))])
    assert set(table.loc[table["case"] == 0, "failed"]) == {"after the edit the probabilities are not numbers"}
    assert table.loc[table["case"] == 0, ["says_after", "logp_after", "rank_after", "kept"]].isna().all(axis=None)
    alone = measure(lm, [case], [Edit((delta(1, 1, 0),))])
    rest = table[table["case"] == 1].assign(case=0).reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, alone, rtol=0, atol=5e-5)


def test_a_model_without_probabilities_is_refused():
    lm = tiny.lm("llama")
    with torch.no_grad():
        lm.model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="probabilities of tiny-llama for 'the capital of France is' are not numbers"):
        measure(lm, some_cases(False)[:1], [Edit()])


def test_bad_input_is_refused():
    lm = MODELS["gpt2"]
    with pytest.raises(ValueError, match="8 cases but 7 edits"):
        measure(lm, some_cases(False), some_edits()[:7])
    with pytest.raises(ValueError, match="mask must come last"):
        measure(lm, [Case(queries(False)[0], {"locality": (Query("the [MASK] is red", "cat"),)})], [Edit()])
    with pytest.raises(ValueError, match="block 9 does not exist"):
        measure(lm, some_cases(False)[:1], [Edit((replace(delta(1, 1, 0), block=9),))])
    with pytest.raises(ValueError, match="unknown form of success 'say'.*Did you mean 'says'"):
        success(measure(lm, some_cases(False)[:1], [Edit()]), "say")


def test_no_cases_make_an_empty_table_with_the_same_columns():
    lm = MODELS["gpt2"]
    empty = measure(lm, [], [])
    assert len(empty) == 0 and (empty.dtypes == measure(lm, some_cases(False)[:1], [Edit()]).dtypes).all()
    assert len(success(empty)) == 0 and len(summary(empty)) == 0


# Success


def rows(*told) -> pd.DataFrame:
    """A table of: case, criterion, failed, then says, margin and rank before and after."""
    columns = ["case", "criterion", "failed"]
    columns += [f"{name}_{when}" for when in ("before", "after") for name in ("says", "margin", "rank")]
    kinds = {name: {"s": "boolean", "m": float, "r": "Int64"}[name[0]] for name in columns[3:]}
    return pd.DataFrame(told, columns=columns).astype(kinds)


NONE = (pd.NA, math.nan, pd.NA)
TOLD = rows(
    (0, "reliability", "", False, -2.0, 7, True, 1.0, 0),
    (1, "reliability", "", False, -1.0, 1, False, -0.5, 0),
    (2, "reliability", "diverged", False, -1.0, 1, *NONE),
    (0, "generality", "", True, 0.5, 0, True, 0.5, 0),
    (0, "generality", "", False, -0.5, 3, False, 0.5, 3),
    (1, "generality", "", False, -0.5, 3, True, 2.5, 0),
    (0, "locality", "", True, 3.0, 0, True, 2.0, 0),
    (0, "locality", "", True, 3.0, 0, False, -1.0, 4),
    (0, "locality", "", False, 3.0, 0, True, 2.0, 0),
    (1, "locality", "", False, -3.0, 5, True, 2.0, 0),
    (2, "locality", "diverged", True, 3.0, 0, *NONE),
    (0, "symmetry_old", "", True, math.nan, 0, False, math.nan, 1),
    (1, "symmetry_old", "", False, math.nan, 1, True, math.nan, 0),
)


@pytest.mark.parametrize(
    ("by", "want"),
    [
        ("says", [1, 0, None, 1, 0, 1, 1, 0, None, None, None, 0, None]),
        ("margin", [1, 0, None, 1, 1, 1, 1, 0, 1, None, None, None, None]),
        ("rank", [1, 1, None, 1, 0, 1, 1, 0, 1, None, None, 0, None]),
    ],
)
def test_success_worked_out_by_hand(by, want):
    found = success(TOLD, by)
    assert found.dtype == "boolean"
    assert [None if pd.isna(one) else int(one) for one in found] == want


def test_the_summary_worked_out_by_hand():
    found = summary(TOLD).set_index("criterion")
    assert list(found.index) == ["reliability", "generality", "locality", "symmetry_old"]
    assert found["cases"].tolist() == [2, 2, 1, 1] and found["failed"].tolist() == [1, 0, 1, 0]
    assert found["before"].tolist() == pytest.approx([0, 0.25, 1 / 3, 0.5])
    assert found["after"].tolist() == pytest.approx([0.5, 0.75, 0.5, 0])
    assert found["margin_before"].tolist() == pytest.approx([-1.5, -0.25, 0, math.nan], nan_ok=True)
    assert found["margin_after"].tolist() == pytest.approx([0.25, 1.5, 1.5, math.nan], nan_ok=True)
    wilson = scipy.stats.binomtest(1, 2).proportion_ci(method="wilson")
    assert found.loc["reliability", ["low", "high"]].tolist() == pytest.approx([wilson.low, wilson.high])
    nothing = summary(TOLD, "margin").set_index("criterion").loc["symmetry_old"]
    assert nothing["cases"] == 0 and math.isnan(nothing["after"]) and math.isnan(nothing["low"])


def test_shares_of_one_criterion_worked_out_by_hand():
    table = TOLD.assign(item=[f"item {case}" for case in TOLD["case"]])
    assert criteria.share(table, "reliability") == stats.share([True, False])
    assert criteria.share(table, "generality") == stats.share([True, False, True], [0, 0, 1])
    assert criteria.share(table, "locality", "margin").value == pytest.approx((2 / 3 + 0) / 1)
    assert criteria.share(table, "generality", "margin").value == 1
    found = criteria.item_shares(table, "generality")
    assert found.to_dict() == {"item 0": 0.5, "item 1": 1}
    assert criteria.item_shares(table, "reliability").to_dict() == {"item 0": 1, "item 1": 0}
    assert criteria.item_shares(table, "symmetry_old").to_dict() == {"item 0": 0}


def test_what_an_edit_gains_worked_out_by_hand():
    table = TOLD.assign(item=[f"item {case}" for case in TOLD["case"]])
    found = criteria.item_gains(table)
    assert found.index.tolist() == ["item 0", "item 1"]  # the edit of item 2 failed
    assert found["reliability"].tolist() == [3.0, 0.5] and found["generality"].tolist() == [0.5, 3.0]
    assert found["locality"].tolist() == [-2.0, 5.0] and found["symmetry_old"].isna().all()
    said = criteria.item_changes(table, "generality")
    assert said.to_dict() == {"item 0": 0, "item 1": 1}
    assert criteria.item_changes(table, "locality").to_dict() == {"item 0": 0, "item 1": 1}
    assert criteria.item_changes(table, "locality", "margin").to_dict() == pytest.approx(
        {"item 0": -1 / 3, "item 1": 1}
    )


def test_what_is_lost_is_the_rest():
    table = TOLD.assign(item=[f"item {case}" for case in TOLD["case"]])
    kept, lost = (criteria.share(table, "generality", lost=lost) for lost in (False, True))
    assert (lost.value, lost.low, lost.high, lost.n) == pytest.approx((0.25, 1 - kept.high, 1 - kept.low, 2))


def test_the_best_is_the_most_probable_of_all_that_a_prompt_is_asked():
    """Three words and a foil compete in one prompt of case 0, two words in another; case 1 has its own."""
    told = [
        (0, "synonymy", "p", "", -2.0, 1.0, -1.0, 0.5),  # before: foil at −3; after −1.0, foil at −1.5
        (0, "occupations", "p", "", -1.0, math.nan, -1.2, math.nan),
        (0, "decoy", "p", "", -4.0, -1.0, -2.0, -0.5),
        (0, "synonymy", "q", "", -2.0, -0.5, -1.0, -0.1),  # its foil is better, before and after
        (0, "occupations", "q", "", -9.0, math.nan, -9.0, math.nan),
        (1, "synonymy", "p", "", -9.0, 1.0, -9.0, 1.0),
        (2, "synonymy", "p", "diverged", -1.0, 1.0, math.nan, math.nan),
    ]
    columns = ["case", "criterion", "prompt", "failed", "logp_before", "margin_before", "logp_after", "margin_after"]
    table = pd.DataFrame(told, columns=columns).assign(item=lambda t: t["case"])
    found = success(table, "best")
    assert [None if pd.isna(one) else int(one) for one in found] == [1, 0, 0, 0, 0, 1, None]
    assert criteria.item_changes(table, "synonymy", "best").to_dict() == {0: 0.5, 1: 0}
    short = summary(table, "best").set_index("criterion")
    assert list(short.index) == ["synonymy", "decoy"]  # those that only compete have no row
    assert short["after"].tolist() == [0.75, 0] and short["before"].tolist() == [0.5, 0]
    assert criteria.share(table, "synonymy", "best").n == 2


def test_an_edit_that_changes_nothing_keeps_everything():
    lm = MODELS["mistral"]
    asked = tuple(queries(False))
    table = measure(lm, [Case(asked[0], {"locality": asked})], [Edit()])
    assert table["kept"].all()
    for name in ("says", "margin", "logp", "rank"):
        pd.testing.assert_series_equal(table[f"{name}_before"], table[f"{name}_after"], check_names=False)
    for by in criteria.FORMS:
        assert success(table, by).dropna().all()


# Generated text


def greedy(lm, model, prompt: str, length: int) -> str:
    ids = [lm.tokenizer.get_vocab()[word] for word in prompt.split()]
    n = len(ids)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text, start = (lm.tokenizer.decode(some, skip_special_tokens=True) for some in (ids, ids[:n]))
    return text.removeprefix(start)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_greedy_texts_are_those_of_a_loop_over_models_changed_by_hand(family):
    lm = MODELS[family]
    prompts = [prompt for prompt, *_ in ASKED]
    assert generations(lm, prompts, length=8, seed=None) == [greedy(lm, lm.model, p, 8) for p in prompts]
    edits = some_edits()[:5]
    want = [greedy(lm, by_hand(lm, e), e.context + p, 8) for p, e in zip(prompts, edits, strict=True)]
    assert generations(lm, prompts, edits, 8, None) == want
    assert want != generations(lm, prompts, length=8, seed=None)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_sampled_texts_are_the_same_for_the_same_seed_and_leave_the_global_state(family):
    lm = MODELS[family]
    prompts = ["Anna saw", "the capital of France is"] * 3
    state = torch.get_rng_state(), random.getstate()
    first = generations(lm, prompts, length=12, seed=3)
    torch.rand(1)
    torch.set_rng_state(state[0])
    assert generations(lm, prompts, length=12, seed=3) == first
    assert generations(lm, prompts, [Edit()] * 6, 12, 3) == first
    assert generations(lm, prompts, length=12, seed=4) != first and len(set(first)) > 2
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


def test_sampled_tokens_come_as_often_as_the_model_says():
    lm = MODELS["llama"]
    with torch.no_grad():
        chances = lm.model(torch.tensor([lm.tokenizer("Anna saw")["input_ids"]])).logits[0, -1].double().softmax(-1)
    n, word = 2000, lm.tokenizer.decode(int(chances[len(tiny.SPECIAL) :].argmax()) + len(tiny.SPECIAL))
    p = float(chances[lm.tokenizer.get_vocab()[word]])
    drawn = generations(lm, ["Anna saw", "the book is in"] * n, length=1)[::2]
    count = sum(text.split() == [word] for text in drawn)
    assert 1e-4 < scipy.stats.binomtest(count, n, p).pvalue and 0.02 < p < 0.98


def test_texts_that_cannot_be_generated_are_refused():
    with pytest.raises(ValueError, match="masked model"):
        generations(MODELS["bert"], ["Anna saw"])
    with pytest.raises(ValueError, match="2 prompts but 1 edits"):
        generations(MODELS["gpt2"], ["Anna saw", "these"], [Edit()])
    with pytest.raises(ValueError, match="no edit to go on under: diverged"):
        generations(MODELS["gpt2"], ["Anna saw"], [Edit(failed="diverged")])


# Fluency


def naive_entropy(words) -> float:
    """Weights 2/3 and 4/3, then the mean of the two, as published."""
    parts = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [" ".join(map(str, words[i : i + n])) for i in range(len(words) - n + 1)]
        _, counts = np.unique(grams, return_counts=True)
        parts.append(weight * scipy.stats.entropy(counts, base=2))
    return float(np.mean(parts))


@given(st.lists(st.sampled_from("a b c d".split()), min_size=3, max_size=40))
def test_entropy_equals_that_of_counted_n_grams(words):
    assert entropy("  ".join(words)) == pytest.approx(naive_entropy(words), abs=1e-9)
    assert entropy(words) == entropy(" ".join(words)) == entropy([ord(word) for word in words])


def test_entropy_of_known_texts():
    assert entropy("a b c d e f g h i") == pytest.approx((2 / 3 * 3 + 4 / 3 * math.log2(7)) / 2)
    assert entropy("la la la la la") == 0
    assert entropy("a b c") == pytest.approx(1 / 3)
    assert math.isnan(entropy("a b")) and math.isnan(entropy(""))


# The default model


@pytest.mark.model
def test_on_the_default_model_batches_equal_questions_asked_alone():
    entry = zoo.REGISTRY[zoo.DEFAULT]
    if not (zoo.cache_folder() / "models" / f"{zoo.DEFAULT}-{entry.sha256[:16]}").is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    lm = models.load()
    asked = (
        Query("The capital of Mali is a city called", "Bamako", "Mali", "Ouagadougou"),
        Query("Oslo is the capital of", "Norway", "Oslo", "Burkina Faso"),
    )
    rng = torch.Generator().manual_seed(0)
    one = Delta(3, *(torch.randn(1, width, generator=rng) for width in (lm.n_neurons, 576)))
    edits = [Edit((one,)), Edit(context="Oslo is the capital of Mali. ")]
    table = measure(lm, [Case(asked[0], {"reliability": asked})] * 2, edits)
    for row in table.itertuples():
        edit = edits[row.case]
        for when, context, deltas in (("before", "", ()), ("after", edit.context, edit.deltas)):
            logp = []
            for word in (row.target, row.foil):
                start, whole = (
                    lm.tokenizer(context + text)["input_ids"] for text in (row.prompt, f"{row.prompt} {word}")
                )
                with edited(lm, *deltas) if deltas else contextlib.nullcontext():
                    found = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
                steps = range(len(start) - 1, len(whole) - 1)
                logp.append(float(found[steps, whole[len(start) :]].mean()))
                if word == row.target:
                    said = all(int(found[k].argmax()) == whole[k + 1] for k in steps)
                    assert getattr(row, f"says_{when}") == said
            assert getattr(row, f"logp_{when}") == pytest.approx(logp[0], abs=1e-3)
            assert getattr(row, f"margin_{when}") == pytest.approx(logp[0] - logp[1], abs=1e-3)
    assert (table["logp_after"] - table["logp_before"]).abs().min() > 0.01
    assert not lm.is_modified
