"""The playground: what is recorded is what the model says, and the stored record is that of today's code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

import kncore
from kncore import editors, interventions, predictions, tokens
from kncore.neurons import Neuron
from kncore.query import Query
from knpaper import playground, stimuli
from knpaper.groups import Group

STORED = Path(__file__).parent.parent / "results" / playground.FILE
FACT = Query("the capital of France is", "Paris", "France")
PAIR = Query("Anna saw these", "books", foil="book")


def group(lm, chosen: list[Neuron], name: str = "France") -> Group:
    """A group whose neurons have the highest scores, in their order."""
    scores = torch.zeros(1, len(lm.blocks), lm.n_neurons)
    for i, neuron in enumerate(chosen):
        scores[0, neuron.block, neuron.index] = 1 - i / 10
    return Group("capital", name, scores, chosen, scores[0], [0], [0])


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_a_dose_is_what_the_model_says_with_so_many_neurons_suppressed(family):
    lm = tiny.lm(family)
    chosen = [Neuron(1, 3), Neuron(0, 5), Neuron(2, 7)]
    dose = playground.doses_of(lm, group(lm, chosen), {"own": FACT, "pair": PAIR})
    assert dose["sizes"] == [0, 1, 2, 3]
    assert dose["neurons"] == ["1·3", "0·5", "2·7"] + dose["neurons"][3:]
    assert [prompt["forms"] for prompt in dose["prompts"]] == [["Paris"], ["books", "book"]]
    for size, says in zip(dose["sizes"], dose["says"], strict=True):
        for query, said in zip((FACT, PAIR), says, strict=True):
            ids = torch.tensor([tokens.encode(lm, query).ids])
            with interventions.suppress(lm, chosen[:size]) if size else torch.no_grad():
                p = lm.model(input_ids=ids).logits[0, -1].softmax(-1)
            forms = [query.target, *([query.foil] if query.foil else [])]
            expected = [float(p[lm.tokenizer.convert_tokens_to_ids(word)]) for word in forms]
            assert said["p"] == pytest.approx(expected, rel=6e-3, abs=1e-12)
            assert said["words"][0][0] == lm.tokenizer.decode([int(p.argmax())])
            assert [p for _, p in said["words"]] == sorted((p for _, p in said["words"]), reverse=True)
    assert not lm.is_modified


def test_a_neuron_is_listed_once_with_all_that_it_was_found_for():
    lm = tiny.lm("gpt2")
    both, one = Neuron(1, 3), Neuron(0, 5)
    named = {"capital: France": group(lm, [both, one]), "capital: Spain": group(lm, [both])}
    shared, own = playground.neurons_of(lm, named)
    assert (shared["neuron"], own["neuron"]) == ("1·3", "0·5")
    assert shared["found"] == [("capital: France", 1), ("capital: Spain", 1)]
    assert own["found"] == [("capital: France", 2)]
    sizes = [abs(activation) for _, _, activation in shared["active"]]
    assert len(sizes) == playground.PLACES and sizes == sorted(sizes, reverse=True)
    assert not {*shared["raises"]} & {*shared["lowers"]}


def test_answers_are_greedy_continuations_of_the_edited_model(monkeypatch):
    monkeypatch.setattr(playground, "FEW", 1)
    lm = kncore.load("controlled-gpt2")
    drawn = stimuli.capitals(lm, 2, 0)
    first, second = playground.edits_of(lm, drawn, {"ROME": "rome", "MEMIT": "memit"}, "capital")
    assert {*first["says"]} == {"unedited", "ROME", "MEMIT"} and {*second["says"]} == {"unedited", "ROME"}
    assert (first["subject"], first["old"], first["new"]) == (
        drawn[0].request.subject,
        drawn[0].request.target,
        drawn[0].request.foil,
    )
    (edit,) = editors.edit(lm, [drawn[0].request], "rome")
    for question, unedited, rome in zip(
        first["questions"], first["says"]["unedited"], first["says"]["ROME"], strict=True
    ):
        query = Query(question["prompt"], question["word"])
        best = predictions.log_probabilities(lm, [query]).argmax(1).tolist()
        assert unedited.startswith(lm.tokenizer.decode(best).strip())
        with interventions.edited(lm, *edit.deltas):
            best = predictions.log_probabilities(lm, [query]).argmax(1).tolist()
        assert rome.startswith(lm.tokenizer.decode(best).strip())
    assert not lm.is_modified


def test_a_masked_model_is_refused():
    with pytest.raises(ValueError, match="controlled-bert is a masked model and goes on with no text"):
        playground.record("controlled-bert")


def test_the_stored_record_is_of_the_code_and_the_model_of_today():
    record = json.loads(STORED.read_text(encoding="utf-8"))
    assert record["code"] == playground.code(), (
        "make it anew: python -m knpaper.playground --out results/playground.json"
    )
    assert record["revision"] == kncore.load(record["model"]).revision
    assert STORED.stat().st_size < 1_000_000
    doses = {f"{dose['task']}: {dose['name']}" for dose in record["doses"]}
    for edit in record["edits"]:
        assert all(len(says) == len(edit["questions"]) for says in edit["says"].values())
        assert {*edit["says"]} - {"unedited"}
    for dose in record["doses"]:
        assert len(dose["says"]) == len(dose["sizes"]) and dose["sizes"][0] == 0
    assert {name for neuron in record["neurons"] for name, _ in neuron["found"]} <= doses
