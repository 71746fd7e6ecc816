import pytest
import tiny
import torch
from traces import MODELS, ask, on_all_families

from kncore.models import LM
from kncore.tracing import trace
from knpaper import grammar, tasks, traceable
from knpaper.traceable import replacements


@on_all_families
def test_replacements_lie_at_the_same_tokens_of_the_same_template_with_another_target(family):
    lm = MODELS[family]
    other_place = "Anna saw {} , the capital of"
    queries = [
        ask(lm, "France", "Paris"),
        ask(lm, "Spain", "Madrid", "Paris"),
        ask(lm, "cat", "Paris"),  # the target of the first
        ask(lm, "red cats", "book"),  # two tokens
        ask(lm, "books", "red", text=other_place),
        ask(lm, "book", "Paris", text=other_place),
    ]
    for seed in range(5):
        found = replacements(lm, queries, seed)
        assert found == replacements(lm, queries, seed)
        assert found[0] == found[2] == queries[1] and found[1] in (queries[0], queries[2])
        assert found[3] is None and (found[4], found[5]) == (queries[5], queries[4])
    assert {replacements(lm, queries, seed)[1] for seed in range(20)} == {queries[0], queries[2]}
    both = [query for query, other in zip(queries, found, strict=True) if other]
    traced = trace(lm, both, others=[other for other in found if other], store=False)
    assert all(torch.isfinite(one.restored).all() for one in traced)


# Prompts to trace


def reader(words) -> LM:
    """A tiny model whose tokens are these words."""
    lm = MODELS["gpt2"]
    table = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *dict.fromkeys(words)])}
    tokenizer = tiny.tokenizer(False)
    core = type(tokenizer.backend_tokenizer)(tiny.models.WordLevel(table, unk_token="[UNK]"))
    core.pre_tokenizer = tiny.pre_tokenizers.Whitespace()
    tokenizer = tiny.transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = tiny.transformers.GPT2Config(vocab_size=len(table), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    built = tiny.transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LM("tiny-reader", "seed0", built, tokenizer, lm.spec)


def words_of(queries):
    text = " ".join(f"{query.prompt} {query.target} {query.foil}" for query in queries)
    return [word for word, _ in tiny.pre_tokenizers.Whitespace().pre_tokenize_str(text)]


def preferring(monkeypatch, right):
    monkeypatch.setattr(
        traceable.predictions, "predict", lambda lm, queries, *_: {"prefers": [right(query) for query in queries]}
    )


def test_facts_to_trace_are_known_have_subjects_of_several_tokens_and_a_partner_at_the_same_tokens(monkeypatch):
    lm = reader(words_of(tasks.facts("capital")))
    preferring(monkeypatch, lambda query: query.target != "Wellington")
    every = traceable.facts(lm, "capital", 1000)
    assert len(every) > 5 and traceable.facts(lm, "capital", 3) == every[:3]
    assert traceable.facts(lm, "capital", 3, seed=1) != every[:3]
    known = dict(tasks.describe("capital").pairs)
    assert "Wellington" in known.values() and "Wellington" not in {query.target for query, _ in every}
    for query, other in every:
        assert not query.template.startswith("{}") and query.template == other.template
        assert 2 <= len(query.subject.split()) <= 6 and len(query.subject.split()) == len(other.subject.split())
        assert (known[query.subject], known[other.subject]) == (query.target, other.target)
        assert query.foil == other.target != query.target
    got = trace(lm, [query for query, _ in every[:2]], others=[other for _, other in every[:2]])
    assert [one.query for one in got] == [query for query, _ in every[:2]]


@pytest.mark.parametrize("phenomenon", [name for name in grammar.phenomena() if name.startswith("subject_verb")])
@pytest.mark.parametrize("then", ["", " really"])
def test_sentences_to_trace_come_with_their_partner_of_the_other_number(phenomenon, then, monkeypatch):
    pairs = grammar.minimal_pairs(phenomenon)
    lm = reader([*words_of(pairs), "really"])
    refused = pairs[0].target
    preferring(monkeypatch, lambda query: query.target != refused)
    got = traceable.agreement(lm, phenomenon, 4, then=then)
    assert len(got) == 4
    for query, other in got:
        assert query.target != refused and (query.target, query.foil) == (other.foil, other.target)
        assert query.subject.startswith("the ") and query.prompt.endswith(query.subject + then)
        assert query.value != other.value and query.item == other.item
    traced = trace(lm, [query for query, _ in got], others=[other for _, other in got])
    assert all(one.tokens[one.subject[0]] == "the" for one in traced)
