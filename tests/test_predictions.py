"""Predictions and losses of text against plain forward passes, preferences by hand, and which items count as known."""

import random
import re

import naive
import pandas as pd
import pytest
import tiny
import torch

from kncore import Query, predictions, suppress, tokens
from kncore.predictions import log_probabilities, predict, text_loss
from knpaper import grammar, stimuli, tasks
from knpaper.datasets import blimp
from knpaper.datasets import pararel as public_facts
from knpaper.stimuli import known_facts, known_pairs

FACTS = [
    Query("the capital of France is", "Paris", "France", item="capital:France", template="the capital of {} is"),
    Query("the capital of Spain is", "Madrid", "Spain", item="capital:Spain", template="the capital of {} is"),
    Query("Paris is in", "France", "Paris", item="country:Paris", template="{} is in"),
    Query("a", "red cat"),
    Query("Anna saw these red books in the capital of", "Spain"),
]
PAIRS = [
    Query("Anna saw these", "books", "these", foil="book", task="determiner_noun", value="plural"),
    Query("Anna saw this", "book", "this", foil="books", task="determiner_noun", value="singular"),
    Query("Anna saw these red", "cats", "these", foil="cat", value="plural"),
    Query("Anna saw this red", "cats", "this", foil="cat", value="plural"),
]
MASKED = [
    Query("Anna saw [MASK] books .", "these", "books", foil="this", value="plural"),
    Query("[MASK] is the capital of France", "Paris", "France", foil="Madrid"),
    Query("the capital of [MASK] is in France .", "red cat", foil="Spain"),
]


def forward(lm, query):
    """Probabilities of all tokens at the place of the first target token: one plain pass of one prompt."""
    with torch.no_grad():
        logits, _ = naive.forward(lm, tokens.encode(lm, query), 0, "neuron")
    return logits.double().softmax(-1)


def first(lm, query, word):
    return tokens.encode(lm, query, word).target[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_probabilities_ranks_and_preferences_equal_plain_forward_passes(family):
    lm = tiny.lm(family)
    queries = FACTS + PAIRS + (MASKED if lm.spec.masked else [])
    told = predict(lm, queries)
    assert len(told) == len(queries)
    for query, row in zip(queries, told.itertuples(), strict=True):
        p = forward(lm, query)
        target = first(lm, query, query.target)
        assert row.probability == pytest.approx(float(p[target]), rel=1e-4, abs=1e-9)
        assert row.rank == int((p > p[target]).sum())
        rival = p[first(lm, query, query.foil)] if query.foil else p.max()
        assert row.margin == pytest.approx(float((p[target] / rival).log()), abs=1e-4)
        assert row.prefers == (p[target] > rival if query.foil else p.argmax() == target)
        assert (row.task, row.item, row.value) == (query.task, query.item, query.value)
        assert row.template == query.template
    assert told["prefers"].dtype == bool


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_candidates_are_the_rivals(family):
    lm = tiny.lm(family)
    candidates = ["Paris", "Madrid", "France", "Spain", "Anna"]
    told = predict(lm, FACTS, candidates)
    free = predict(lm, FACTS)
    for query, row in zip(FACTS, told.itertuples(), strict=True):
        p = forward(lm, query)
        target = first(lm, query, query.target)
        others = {first(lm, query, word) for word in candidates} - {target}
        best = max(p[other] for other in others)
        assert row.margin == pytest.approx(float((p[target] / best).log()), abs=1e-4)
        assert row.prefers == (p[target] > best)
    assert told["rank"].tolist() == free["rank"].tolist()
    closed = [Query(FACTS[0].prompt, word, template="t") for word in candidates]
    p = forward(lm, FACTS[0])
    best = max(candidates, key=lambda word: p[first(lm, FACTS[0], word)])
    assert [
        word for word, right in zip(candidates, predict(lm, closed, candidates)["prefers"], strict=True) if right
    ] == [best]


def test_preference_by_hand(monkeypatch):
    """Set log-probabilities: what is preferred follows from them alone."""
    lm = tiny.lm("llama")
    row = torch.full((tiny.VOCAB,), 0.001)
    for word, p in (("Paris", 0.3), ("Madrid", 0.2), ("France", 0.4), ("Spain", 0.05)):
        row[first(lm, FACTS[0], word)] = p
    monkeypatch.setattr(predictions, "_rows", lambda lm, prompts: ((i, row.log()) for i in range(len(prompts))))

    def ask(target, foil="", candidates=()):
        (told,) = predict(lm, [Query("the capital of Spain is", target, foil=foil)], candidates).itertuples()
        return told.prefers, told.rank, told.margin

    near = pytest.approx
    assert ask("France") == (True, 0, 0.0)
    assert ask("Paris") == (False, 1, near(torch.tensor(0.3 / 0.4).log().item()))
    assert ask("Paris", foil="Madrid") == (True, 1, near(torch.tensor(0.3 / 0.2).log().item()))
    assert ask("Madrid", foil="Paris") == (False, 2, near(torch.tensor(0.2 / 0.3).log().item()))
    assert ask("Paris", candidates=["Madrid", "Paris", "Spain"])[0] is True
    assert ask("Paris", candidates=["Madrid", "Paris", "France"])[0] is False
    assert ask("Paris", foil="France", candidates=["Madrid"])[0] is False
    assert ask("Paris", foil="Madrid", candidates=["France"])[0] is False
    assert ask("France", foil="France is") == (False, 0, 0.0)  # one first token: they cannot be told apart
    assert ask("France", candidates=["France"]) == (False, 0, 0.0)
    assert ask("the", foil="a") == (False, 4, 0.0)  # a tie is no preference


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_log_probabilities_keep_the_order_of_the_queries_whatever_the_batch(family, monkeypatch):
    lm = tiny.lm(family)
    queries = FACTS + PAIRS
    whole = log_probabilities(lm, queries)
    assert whole.shape == (len(queries), tiny.VOCAB)
    for got, query in zip(whole, queries, strict=True):
        torch.testing.assert_close(got.double().exp(), forward(lm, query), atol=1e-6, rtol=1e-4)
    for batch in (1, 2, 4):
        monkeypatch.setattr(predictions, "BATCH", batch)
        torch.testing.assert_close(log_probabilities(lm, queries), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_predict_reads_from_the_store_what_was_asked_of_the_same_model(family, monkeypatch):
    lm, runs, capture = tiny.lm(family), [], predictions.capture
    monkeypatch.setattr(predictions, "capture", lambda lm, part, **y: runs.append(len(part)) or capture(lm, part, **y))
    first = predict(lm, FACTS)
    assert sum(runs) == len(FACTS)
    pd.testing.assert_frame_equal(predict(lm, [*FACTS, FACTS[0]])[:-1], first, rtol=0, atol=0)
    assert sum(runs) == len(FACTS)
    predict(lm, FACTS, ["Madrid"])
    assert sum(runs) == 2 * len(FACTS)  # asked with other candidates
    with torch.no_grad():
        lm.model.get_output_embeddings().weight *= 2
    changed = predict(lm, FACTS)
    assert sum(runs) == 3 * len(FACTS) and not changed["probability"].equals(first["probability"])
    pd.testing.assert_frame_equal(predict(lm, FACTS, store=False), changed, rtol=1e-5, atol=1e-6)


# Losses of text

TEXTS = [
    "Anna saw these red books in the capital of Spain .",
    "Paris is",
    "the capital of France is Paris , the capital of Spain is Madrid .",
    "zzz cats saw",  # the first token is [UNK]
    "a red book",
    "a cat zzz Anna zzz red zzz book zzz cats of Madrid saw these books , this cat saw the a of",
]


def naive_text_loss(lm, text):
    """Mean of −log P, token after token, from one plain pass of the unpadded text; masked: tokens 1, 7, 13 … masked."""
    ids = lm.tokenizer(text)["input_ids"]
    if lm.spec.masked:
        predicted = [i for i, token in enumerate(ids) if token >= len(tiny.SPECIAL)][::6]
        shown = [lm.tokenizer.mask_token_id if i in predicted else token for i, token in enumerate(ids)]
    else:
        predicted, shown = range(1, len(ids)), ids
    with torch.no_grad():
        logp = lm.model(torch.tensor([shown])).logits[0].double().log_softmax(-1)
    if not lm.spec.masked:
        logp = logp.roll(1, 0)  # the row before a token predicts it
    return -sum(float(logp[i, ids[i]]) for i in predicted) / len(predicted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loss_of_a_text_is_that_of_its_tokens_one_after_the_other_whatever_the_batch(family, monkeypatch):
    lm = tiny.lm(family)
    want = [naive_text_loss(lm, text) for text in TEXTS]
    assert max(want) - min(want) > 0.1
    for batch in (2, 4, 32):
        monkeypatch.setattr(predictions, "BATCH", batch)
        assert text_loss(lm, TEXTS).tolist() == pytest.approx(want, rel=1e-4)


def test_every_sixth_token_of_a_masked_text_is_masked_and_predicted(monkeypatch):
    """By hand: 13 tokens and [UNK] between [CLS] and [SEP]; a model that knows no word gives log 26 for each."""
    lm = tiny.lm("bert")
    shown = []

    def plain(input_ids, attention_mask):
        shown.extend(lm.tokenizer.convert_ids_to_tokens(row) for row in input_ids)
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, tiny.VOCAB)})

    monkeypatch.setattr(lm.model, "forward", plain)
    text = "zzz the capital of France is Paris , the capital of Spain is Madrid"
    assert text_loss(lm, [text]).tolist() == pytest.approx([torch.tensor(float(tiny.VOCAB)).log().item()])
    assert " ".join(shown[0]) == (
        "[CLS] [UNK] [MASK] capital of France is Paris [MASK] the capital of Spain is [MASK] [SEP]"
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_loss_of_text_is_that_of_the_model_as_it_is_changed(family):
    lm = tiny.lm(family)
    before = text_loss(lm, TEXTS)
    with suppress(lm, [(0, 3), (1, 0), (2, 7)], position="all"):
        during = text_loss(lm, TEXTS)
        want = [naive_text_loss(lm, text) for text in TEXTS]
    assert during.tolist() == pytest.approx(want, rel=1e-4)
    assert ((during - before).abs() > 1e-3).all()
    assert torch.equal(text_loss(lm, TEXTS), before)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
@pytest.mark.parametrize("short", ["Anna", "", "zzz", "Anna [MASK]"])
def test_a_text_of_fewer_than_two_tokens_is_an_error_that_names_it(family, short):
    lm = tiny.lm(family)
    for texts in ([short], [*TEXTS, short]):
        with pytest.raises(ValueError, match=f"text '{re.escape(short)}' has fewer than two tokens for tiny-{family}"):
            text_loss(lm, texts)


# Which items a model knows, with the model's answers set by hand


def oracle(monkeypatch, prefers):
    """`predict` answers by a rule; gives back the list of queries it was asked."""
    asked = []

    def predict(lm, queries, candidates=()):
        asked.extend(queries)
        return pd.DataFrame({"prefers": [bool(prefers(query)) for query in queries]})

    monkeypatch.setattr(stimuli, "predict", predict)
    return asked


def number(text):
    return sum(map(ord, text))


def by_item(queries):
    """The first five queries of every item, item after item."""
    items = {}
    for query in queries:
        items.setdefault(query.item, []).append(query)
    return [asked[:5] for asked in items.values()]


@pytest.mark.parametrize("right, known", [(0, False), (2, False), (3, True), (5, True)])
def test_a_fact_is_known_if_it_is_preferred_in_at_least_half_of_its_five_templates(right, known, monkeypatch):
    queries = tasks.facts("capital", seed=4)
    places = {query: i for item in by_item(queries) for i, query in enumerate(item)}
    oracle(monkeypatch, lambda query: places[query] < right)
    found = known_facts(tiny.lm("gpt2"), "capital", 3, seed=4)
    assert found.known == (3 if known else 0)
    assert found.queries == [query for item in by_item(queries)[:3] for query in item]


@pytest.mark.parametrize("n, seed", [(1, 0), (4, 1), (12, 1)])
def test_the_first_known_facts_come_back_in_order_with_how_many_were_tried(n, seed, monkeypatch):
    items = by_item(tasks.facts("capital", seed=seed))
    knows = [number(item[0].item) % 3 == 0 for item in items]
    asked = oracle(monkeypatch, lambda query: number(query.item) % 3 == 0)
    found = known_facts(tiny.lm("gpt2"), "capital", n, seed=seed)
    tried = [i for i, right in enumerate(knows) if right][n - 1] + 1
    want = [item for item, right in zip(items[:tried], knows, strict=False) if right]
    assert len(want) == n
    assert found == ([query for item in want for query in item], tried, n, tasks.candidates("capital"))
    assert {query.item for query in found.queries} <= {query.item for query in asked}
    assert all(len({q.template for q in item}) == 5 for item in want)


def test_unknown_facts_fill_up_and_are_not_called_known(monkeypatch):
    items = by_item(tasks.facts("official_language", seed=2))
    fact = items[7][0].item
    oracle(monkeypatch, lambda query: query.item == fact)
    found = known_facts(tiny.lm("gpt2"), "official_language", 3, seed=2)
    want = [items[7], items[0], items[1]]
    assert found.queries == [query for item in want for query in item]
    assert (found.tried, found.known) == (min(len(items), stimuli.TRIES), 1)


def test_facts_are_judged_among_the_objects_of_their_relation(monkeypatch):
    seen = []

    def predict(lm, queries, candidates=()):
        seen.append(list(candidates))
        return pd.DataFrame({"prefers": [True] * len(queries)})

    monkeypatch.setattr(stimuli, "predict", predict)
    found = known_facts(tiny.lm("gpt2"), "capital", 2)
    assert seen == [tasks.candidates("capital")] and "Paris" in seen[0]
    assert list(found.candidates) == seen[0] == sorted({query.target for query in tasks.facts("capital")})


@pytest.mark.parametrize("relation", stimuli.RELATIONS["own"])
def test_every_relation_of_the_chapters_has_five_templates(relation):
    assert len(tasks.describe(relation).templates) >= stimuli.TEMPLATES
    assert stimuli.relations("own") == list(stimuli.RELATIONS["own"])


def test_public_facts_with_two_answers_or_few_templates_are_left_out(monkeypatch):
    def queries(subject, target, templates):
        return [
            Query(f"{subject} {i}", target, subject, item=f"P36:{subject}", template=f"{{}} {i}")
            for i in range(templates)
        ]

    whole = [queries(f"S{k}", f"T{k}", 6) for k in range(9)]
    data = [
        query
        for bag in [*whole, queries("few", "T", 4), queries("two", "T1", 6), queries("two", "T2", 6)]
        for query in bag
    ]
    calls = []

    def pararel(relation, path, form):
        calls.append((relation, path, form))
        return list(data)

    monkeypatch.setattr(public_facts, "read", pararel)
    oracle(monkeypatch, lambda query: True)
    found = known_facts(tiny.lm("gpt2"), "P36", 20, source="somewhere")
    assert found.known == found.tried == 9
    assert sorted(query.prompt for query in found.queries) == sorted(f"S{k} {i}" for k in range(9) for i in range(5))
    assert found.candidates == sorted({*(f"T{k}" for k in range(9)), "T", "T1", "T2"})  # what is left out is a rival
    again, other = (known_facts(tiny.lm("gpt2"), "P36", 20, seed=s, source="somewhere") for s in (0, 1))
    assert again == found and other.queries != found.queries
    known_facts(tiny.lm("bert"), "P36", 2, source="public")
    assert calls[0] == ("P36", "somewhere", "causal") and calls[-1] == ("P36", None, "masked")


@pytest.mark.parametrize("family, form", [("gpt2", "causal"), ("bert", "masked")])
@pytest.mark.parametrize("n", [1, 25])
def test_known_pairs_of_each_condition_in_the_models_form(family, form, n, monkeypatch):
    queries = grammar.minimal_pairs("determiner_noun", seed=5, form=form)
    oracle(monkeypatch, lambda query: number(query.prompt) % 2)
    found = known_pairs(tiny.lm(family), "determiner_noun", n, seed=5)
    assert set(found) == {"singular", "plural"}
    for value, asked in found.items():
        mine = [query for query in queries if query.value == value]
        knows = [i for i, query in enumerate(mine) if number(query.prompt) % 2]
        assert asked == ([mine[i] for i in knows[:n]], knows[n - 1] + 1, n, ())
        assert all(query.masked == (form == "masked") for query in asked.queries)


def test_one_condition_can_be_known_where_the_other_is_not(monkeypatch):
    queries = grammar.minimal_pairs("anaphor_gender", seed=0)
    oracle(monkeypatch, lambda query: query.value == "masculine")
    found = known_pairs(tiny.lm("gpt2"), "anaphor_gender", 4)
    for value, known, tried in (("masculine", 4, 4), ("feminine", 0, stimuli.TRIES)):
        mine = [query for query in queries if query.value == value]
        assert found[value] == (mine[:4], tried, known, ())


def test_public_pairs_are_shuffled_by_the_seed_and_only_conditions_are_kept(monkeypatch):
    data = [Query(f"p{i}", "good", foil="bad", value=("singular", "plural", "")[i % 3]) for i in range(60)]
    monkeypatch.setattr(blimp, "read", lambda paradigm, path, form: list(data))
    oracle(monkeypatch, lambda query: True)
    found = known_pairs(tiny.lm("gpt2"), "anaphor_number_agreement", 20, seed=3, source="somewhere")
    shuffled = list(data)
    random.Random(3).shuffle(shuffled)
    assert found == {v: ([q for q in shuffled if q.value == v], 20, 20, ()) for v in ("singular", "plural")}
