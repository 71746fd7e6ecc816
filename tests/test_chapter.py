"""What chapters share, on tiny models and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from html import escape

import asking
import pandas as pd
import pytest
import tiny
import torch
from test_criteria import TOLD, by_hand, delta, greedy

import kncore
from kncore.editors import Edit
from kncore.neurons import Neuron
from kncore.query import Query
from knpaper import chapter, claims, criteria, figures, stats, stimuli
from knpaper.cases import Case


def test_header_names_the_model_and_its_size():
    text = figures.header(asking.LM, "And more.").data
    assert text == "Model: **tiny-gpt2** (revision `seed0`, float32), 3 blocks of 24 neurons. And more."


def test_rules_show_the_claims_of_the_chapter_and_no_other():
    html = figures.rules("06").data
    mine = [claim for claim in claims.CLAIMS.values() if claim.chapter == "06"]
    assert html.count('<div class="rule">') == len(mine)
    assert all(escape(claim.statement) in html and escape(claim.metric) in html for claim in mine)


def test_known_facts_and_known_pairs_ask_every_relation_and_condition(monkeypatch):
    monkeypatch.setattr(stimuli, "known_facts", lambda *asked: asked)
    monkeypatch.setattr(stimuli, "known_pairs", lambda *asked: {"singular": asked})
    assert chapter.known_facts("lm", 3, 1) == {name: ("lm", name, 3, 1, "own") for name in stimuli.relations()}
    expected = {(name, "singular"): ("lm", name, 4, 0, "public") for name in stimuli.phenomena("public")}
    assert chapter.known_pairs("lm", 4, source="public") == expected


def test_refined_stands_in_with_the_best_neuron_where_the_search_finds_none():
    scores = -torch.ones(2, 2, 3)
    scores[:, 1, 2] = -0.5
    assert chapter.refined(scores) == [Neuron(1, 2)]
    scores[:, 0, :2] = 1.0
    assert sorted(chapter.refined(scores)) == [Neuron(0, 0), Neuron(0, 1)]


def test_most_probable_gives_the_next_tokens_with_their_probabilities():
    query = asking.FACTS["capital"].queries[0]
    best = asking.log_probabilities(query).exp().topk(2)
    words = [asking.LM.tokenizer.decode([i]) for i in best.indices.tolist()]
    assert chapter.most_probable(asking.LM, [query], 2) == [
        f"{words[0]} {best.values[0]:.2f}, {words[1]} {best.values[1]:.2f}"
    ]


def test_neuron_names_and_spaced_write_names_for_readers():
    assert chapter.neuron_names([(3, 141), (5, 92)]) == "3·141, 5·92"
    assert chapter.neuron_names([(0, 1)] * 3, most=2) == "0·1, 0·1 …"
    assert chapter.spaced("country_of_capital") == "country of capital"


LM = tiny.lm("gpt2")


QUERIES = (
    Query("the capital of France is", "Paris", "France", "Madrid"),
    Query("Anna saw these", "books", "these", "book"),
)


CASE = Case(QUERIES[0], {"reliability": QUERIES[:1], "symmetry": QUERIES[1:]})


@pytest.fixture(autouse=True)
def the_model_stays_as_it_was():
    yield
    assert not LM.is_modified


def three_words(model, prompt: str) -> str:
    """The three most probable next words, from one plain pass of one prompt."""
    table = LM.tokenizer.get_vocab()
    with torch.no_grad():
        p = model(torch.tensor([[table[word] for word in prompt.split()]])).logits[0, -1].softmax(-1)
    words = {i: word for word, i in table.items()}
    best = sorted(range(len(p)), key=lambda i: -float(p[i]))[:3]
    return ", ".join(f"{words[i]} {float(p[i]):.2f}" for i in best)


def test_most_probable_are_the_words_of_a_plain_pass():
    want = [three_words(LM.model, query.prompt) for query in QUERIES]
    assert chapter.most_probable(LM, QUERIES) == want
    assert chapter.most_probable(LM, QUERIES, 1) == [text.split(",")[0] for text in want]


def test_most_probable_shows_a_blank(monkeypatch):
    monkeypatch.setattr(LM.tokenizer, "decode", lambda ids, **_: " ")
    assert chapter.most_probable(LM, QUERIES[:1], 2)[0].count("␣ ") == 2


def test_before_and_after_are_of_the_model_and_of_one_changed_by_hand():
    edit = Edit((delta(1, 1, 0),))
    table = chapter.before_and_after(LM, CASE, edit)
    changed = by_hand(LM, edit)
    assert table["asked"].tolist() == ["the request", "reversed"]
    assert table["prompt"].tolist() == [query.prompt for query in QUERIES]
    assert table["should say"].tolist() == ["Paris", "books"]
    assert table["before"].tolist() == [three_words(LM.model, query.prompt) for query in QUERIES]
    assert table["after"].tolist() == [three_words(changed, query.prompt) for query in QUERIES]
    assert (table["before"] != table["after"]).any()


def test_edit_and_measure_lets_some_editors_write_a_few_cases():
    names = {"in context": "context", "stated": "context"}
    edits, tables = chapter.edit_and_measure(LM, [CASE] * 3, names, few=2, whole=["stated"])
    stated = Edit(context="the capital of France is Madrid. ")
    assert edits == {"in context": [stated] * 2, "stated": [stated] * 3}
    for label, n in (("in context", 2), ("stated", 3)):
        pd.testing.assert_frame_equal(tables[label], criteria.measure(LM, [CASE] * n, [stated] * n))
    assert len(chapter.edit_and_measure(LM, [CASE] * 3, {"in context": "context"})[0]["in context"]) == 3


def test_two_edits_are_made_together_unless_one_failed():
    first, second = Edit((delta(1, 1, 0),)), Edit((delta(2, 1, 0),))
    failed = Edit(failed="diverged")
    made, *rest = chapter.both([first, failed, first], [second, second, failed])
    assert made == Edit(first.deltas + second.deltas)
    assert [edit.failed for edit in rest] == ["diverged"] * 2
    with kncore.edited(LM, *made.deltas):
        together = chapter.most_probable(LM, QUERIES)
    changed = by_hand(replace(LM, model=by_hand(LM, first)), second)  # one after the other
    assert together == [three_words(changed, query.prompt) for query in QUERIES]


def test_statements_are_the_fact_another_answer_and_a_sentence_that_says_neither():
    requests = [
        Query("the capital of France is", "Paris", "France", "Madrid"),
        Query("the capital of Spain is", "Madrid", "Spain", "Paris"),
        Query("the capital of France is", "Paris", "France", "red"),
    ]
    found = chapter.statements(LM, [Case(request, {}) for request in requests])
    assert [edit.context for edit in found["the fact"]] == [
        "the capital of France is Madrid. ",
        "the capital of Spain is Paris. ",
        "the capital of France is red. ",
    ]
    # That of the next case, if it is neither the old answer nor the new one.
    assert [edit.context for edit in found["another answer"]] == [
        "the capital of France is red. ",
        "the capital of Spain is red. ",
        "the capital of France is Madrid. ",
    ]
    assert found["both names"][1].context == "Anna visited Spain in the winter and Paris in the summer. "
    assert all(not edit.deltas and not edit.failed for some in found.values() for edit in some)


def test_shares_worked_out_by_hand():
    found = chapter.shares({"one": TOLD, "other": TOLD})
    assert list(found) == ["reliability", "generality", "locality", "symmetry old"]
    for row in found.values():
        assert list(row) == ["one", "other"] and row["one"] == row["other"]
    assert found["reliability"]["one"] == stats.share([True, False])
    assert found["generality"]["one"].value == 0.75 and found["locality"]["one"].n == 1
    assert chapter.shares({"one": TOLD}, few=1)["reliability"]["one"] == stats.share([True])


def test_shares_leave_out_a_criterion_that_cannot_be_told():
    assert "symmetry old" not in chapter.shares({"one": TOLD}, "margin")
    assert chapter.shares({"failed": TOLD[TOLD["failed"] != ""]}) == {}


def test_the_table_of_edits_worked_out_by_hand():
    table = chapter.edit_table({"ROME": TOLD, "other": TOLD})
    assert table["editor"].tolist() == ["ROME"] * 4 + ["other"] * 4
    given = stats.share([True, False])
    assert table.loc[0].tolist() == [
        "ROME", "reliability", 2, 1, "0.00", f"0.50 [{given.low:.2f}, {given.high:.2f}]", "0.50", "-1.5", "+0.2",
    ]  # fmt: skip
    assert table["criterion"].tolist()[3] == "symmetry old"
    kept = TOLD.assign(prompt=range(len(TOLD)), logp_before=-9.0, logp_after=-9.0)
    best = chapter.edit_table({"ROME": kept}, "best")
    assert best["best of all asked, after"].tolist()[:3] == table["preferred, after"].tolist()[:3]


def test_continuations_are_those_of_a_loop_over_models_changed_by_hand():
    edits = {"unedited": Edit(), "failed": Edit(failed="diverged"), "edited": Edit((delta(1, 1, 0),))}
    prompts = [query.prompt for query in QUERIES]
    table = chapter.continuations(LM, prompts, edits, 5)
    assert table["editor"].tolist() == ["unedited", "", "edited", ""]
    assert table["prompt"].tolist() == [f"{prompt} …" for prompt in prompts] * 2
    changed = [LM.model, by_hand(LM, edits["edited"])]
    want = [" ".join(greedy(LM, model, prompt, 5).split()) for model in changed for prompt in prompts]
    assert table["it goes on"].tolist() == want and want[:2] != want[2:]
    assert chapter.continuations(tiny.lm("bert"), prompts, edits).empty


def test_fluency_changes_by_what_the_sampled_texts_have():
    prompts = [query.prompt for query in QUERIES] * 2
    edit = Edit((delta(1, 1, 0),))
    editors = {"none": [Edit()] * 4, "edited": [edit] * 9, "failed": [edit, Edit(failed="diverged"), edit, edit]}
    found = chapter.fluency_changes(LM, prompts, editors, 20, seed=3)
    assert list(found) == ["none", "edited"]
    assert (found["none"].value, found["none"].n) == (0, 4)
    texts = [criteria.generations(LM, prompts, some, 20, 3) for some in ([Edit()] * 4, [edit] * 4)]
    before, after = ([criteria.entropy(text) for text in some] for some in texts)
    assert found["edited"].value == pytest.approx(sum(after) / 4 - sum(before) / 4)
    assert (
        not math.isclose(found["edited"].value, 0) and chapter.fluency_changes(tiny.lm("bert"), prompts, editors) == {}
    )


def test_promoted_joins_the_words_of_a_causal_model_and_is_empty_for_a_masked_one():
    lm = tiny.lm("gpt2")
    vector = lm.model.transformer.h[1].mlp.c_proj.weight[3]
    logits = lm.model.lm_head.weight @ ((vector - vector.mean()) * lm.model.transformer.ln_f.weight)
    best = [lm.tokenizer.decode([i]) for i in logits.argsort(descending=True).tolist()]
    assert chapter.promoted(lm, kncore.Neuron(1, 3), 4) == ", ".join(best[:4])
    assert chapter.promoted(tiny.lm("bert"), kncore.Neuron(1, 3)) == ""


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_condition_scores_are_those_of_each_condition_attributed_alone(family, monkeypatch):
    lm = tiny.lm(family)
    queries = {
        "singular": [Query("Anna saw this", "book"), Query("Anna saw a red", "cat")],
        "plural": [Query("Anna saw these", "books"), Query("these", "cats"), Query("Anna saw these red", "cats")],
    }

    def known_pairs(lm, phenomenon, n, seed, source):
        assert (n, seed, source) == (3, 5, "own")
        return {value: stimuli.Selection(some, 3, 3) for value, some in queries.items()}

    monkeypatch.setattr(stimuli, "known_pairs", known_pairs)
    scores = chapter.condition_scores(lm, ["determiner_noun", "other"], 3, 5, steps=4, store=False)
    assert list(scores) == [(name, value) for name in ("determiner_noun", "other") for value in queries]
    for (_, value), found in scores.items():
        alone = torch.cat([kncore.attribute(lm, [query], steps=4, store=False).scores for query in queries[value]])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_grouped_estimates_each_part_in_the_order_of_categories_and_leaves_out_what_is_not_there():
    table = pd.DataFrame(
        {
            "animal": pd.Categorical(["dog", "cat", "cat", "dog", "cat"], ["dog", "cat", "cow"]),
            "size": ["small", "large", "small", "small", "small"],
            "value": [1.0, 2.0, 3.0, 5.0, 7.0],
        }
    )
    found = chapter.grouped(table, "animal", "size", lambda part: stats.mean(part["value"]))
    means = {row: {column: estimate.value for column, estimate in cells.items()} for row, cells in found.items()}
    assert means == {"dog": {"small": 3.0}, "cat": {"large": 2.0, "small": 5.0}}
    assert list(found) == ["dog", "cat"] and found["cat"]["small"].n == 2
