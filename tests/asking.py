"""Facts and minimal pairs to ask tiny models, as the chapters ask theirs, and attribution drawn at random."""

from __future__ import annotations

import tiny
import torch

from kncore.query import Query
from kncore.tokens import encode
from knpaper import groups
from knpaper.stimuli import Selection

LM = tiny.lm("gpt2")
TEMPLATES = (
    "the capital of {} is",
    "{} is in",
    "the cat of {} saw",
    "Anna saw the capital of {}",
    "in {} the capital is",
)
OBJECTS = {
    "capital": {"France": "Paris", "Spain": "Madrid"},
    "likes": {"Anna": "cats", "cat": "books"},
}


def _facts(relation: str) -> Selection:
    objects = OBJECTS[relation]
    queries = [
        Query(template.format(subject), answer, subject=subject, task=relation, item=subject, template=template)
        for subject, answer in objects.items()
        for template in TEMPLATES
    ]
    return Selection(queries, 2, 2, [*objects.values(), "red"])


def _pairs(phenomenon: str, value: str, prompts: list[str], good: str, foil: str) -> Selection:
    queries = [
        Query(prompt, good, foil=foil, task=phenomenon, item=prompt.split()[0], value=value) for prompt in prompts
    ]
    return Selection(queries, len(queries), len(queries))


FACTS = {relation: _facts(relation) for relation in OBJECTS}
PAIRS = {
    ("noun", "singular"): _pairs(
        "noun", "singular", ["Anna saw this", "this", "the cat saw this", "a cat in this"], "book", "books"
    ),
    ("noun", "plural"): _pairs(
        "noun", "plural", ["Anna saw these", "these", "the cat saw these", "a cat in these"], "books", "book"
    ),
    ("verb", "singular"): _pairs("verb", "singular", ["the cat", "this book", "a red cat", "Anna"], "is", "saw"),
    ("verb", "plural"): _pairs("verb", "plural", ["the cats", "these books", "these red cats", "cats"], "saw", "is"),
}


def scores() -> torch.Tensor:
    """Return attribution at random: of 20 prompts about facts and of the first two pairs of four conditions."""
    return torch.randn(28, 3, 24, generator=torch.Generator().manual_seed(0)).exp()


def held_groups():
    """Return what `groups.hold` makes of all this."""
    return groups.capture(LM, FACTS, PAIRS, 2, scores())


def token(word: str) -> int:
    """Return the token of a word: the tiny tokenizer's tokens are words."""
    return LM.tokenizer.get_vocab()[word]


def rivals(query: Query) -> list[str]:
    """Return the words that compete for a prompt."""
    return [query.target, query.foil] if query.foil else list(FACTS[query.task].candidates)


def log_probabilities(query: Query) -> torch.Tensor:
    """Return the log-probabilities after a prompt by the model run as a whole."""
    encoded = encode(LM, query)
    with torch.no_grad():
        return LM.model(torch.tensor([encoded.ids])).logits[0, encoded.position].double().log_softmax(-1)
