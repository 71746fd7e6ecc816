"""What a model says before anything is done to it: probabilities, preferences, and which items it knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kncore import checks, tokens
from kncore.models import LM
from kncore.query import Query
from kncore.replay import capture, expect_numbers
from kncore.store import state
from kncore.store.results import Result, stored

BATCH = 32  # prompts that are run together; of texts half as many
STORED = 256  # prompts between two writes to the store


@state.computes(grad=False)
def log_probabilities(lm: LM, queries: Sequence[Query]) -> Float[Tensor, "query vocab"]:
    """Return the log-probabilities of all tokens where the first target token is predicted.

    Raises ValueError where there are no queries, one cannot be asked, or a log-probability is not a finite number.
    """
    queries = checks.items(queries, Query, "queries", 1)
    rows = dict(_rows(lm, [tokens.encode(lm, query) for query in queries]))
    return torch.stack([rows[i] for i in range(len(queries))])


def _rows(lm: LM, encoded: Sequence[tokens.Encoded]) -> Iterator[tuple[int, Float[Tensor, " vocab"]]]:
    """Yield the index and the log-probabilities of each prompt, the shortest first."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    for i in range(0, len(order), BATCH):
        part = order[i : i + BATCH]
        logits = capture(lm, [encoded[j] for j in part], sites=()).logits
        yield from zip(part, logits.log_softmax(-1).cpu(), strict=True)


@state.computes(grad=False)
def predict(lm: LM, queries: Sequence[Query], candidates: Sequence[str] = (), store: bool = True) -> pd.DataFrame:
    """Return, per query, `probability` and `rank` of the target's first token, and whether it is preferred (`prefers`).

    It is preferred if it is more probable than the foil and than every candidate with another first token; `margin` is
    the difference of log-probability to the best of those. Without foil and candidates: if it is the model's
    prediction. A foil that starts with the target's first token cannot be told from it: margin 0, no preference.
    Candidates are tokenised as targets of each prompt, once for all that end alike. `store` as in `attribute`. Raises
    ValueError where there are no queries, one cannot be asked, a candidate is no word, or a probability is not a finite
    number.
    """
    queries = checks.items(queries, Query, "queries", 1)
    candidates = [tokens.expect_word(word, "candidate") for word in checks.items(candidates, str, "candidates")]
    questions = _questions(lm, queries, candidates)
    todo = sorted(set(questions), key=lambda question: len(question.prompt.ids))
    settings = [{"predict": [asdict(question.prompt), question.rivals]} for question in todo]

    def compute(part: list[int]) -> list[Result]:
        return _answers(lm, [todo[i] for i in part])

    found = stored(lm, (_answers,), settings, compute, batch=STORED, store=store)
    answers = {question: answer["numbers"].tolist() for question, answer in zip(todo, found, strict=True)}
    rows = []
    for query, question in zip(queries, questions, strict=True):
        probability, rank, margin = answers[question]
        rows.append(
            {
                **{name: getattr(query, name) for name in ("task", "item", "value", "template")},
                "probability": probability,
                "rank": int(rank),
                "margin": margin,
                "prefers": rank == 0 if question.rivals is None else margin > 0,
            }
        )
    return pd.DataFrame(rows)


class _Question(NamedTuple):
    """A prompt with the first token of its target, and the tokens that compete with it; None for all tokens."""

    prompt: tokens.Encoded
    rivals: tuple[int, ...] | None


def _questions(lm: LM, queries: Sequence[Query], candidates: Sequence[str]) -> list[_Question]:
    known: dict[tuple, set[int]] = {}
    questions = []
    for query in queries:
        encoded = tokens.encode(lm, query)
        rivals = {tokens.encode(lm, query, query.foil).target[0]} if query.foil else set()
        if candidates:
            ending = tokens.ending(query)
            if ending not in known:
                known[ending] = {tokens.encode(lm, query, word).target[0] for word in candidates}
            rivals |= known[ending]
        others = tuple(sorted(rivals - {encoded.target[0]})) if rivals else None
        questions.append(_Question(replace(encoded, target=encoded.target[:1]), others))
    return questions


def _answers(lm: LM, questions: Sequence[_Question]) -> list[Result]:
    """Return the probability, the rank and the margin of each target as `numbers`."""
    answers: list[Result] = [{}] * len(questions)
    for i, row in _rows(lm, [question.prompt for question in questions]):
        target, rivals = questions[i].prompt.target[0], questions[i].rivals
        best = row.max() if rivals is None else row[list(rivals)].max() if rivals else row[target]
        numbers = [float(row[target].exp()), int((row > row[target]).sum()), float(row[target] - best)]
        answers[i] = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
    return answers


@state.computes(grad=False)
def text_loss(lm: LM, texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Return the mean negative log-likelihood per token of each text, in nats; its exponential is the perplexity.

    Causal models predict every token from those before it. Of masked models every sixth token from the first on is
    masked, the same ones each time, and predicted from the rest; special tokens are neither masked nor counted. Text is
    read as `tokens.read` does. Raises ValueError for no texts, a text of fewer than two tokens that are not special or
    longer than the context, and a loss that is not a finite number.
    """
    texts = checks.items(texts, str, "texts", 1)
    special = torch.tensor(lm.tokenizer.all_special_ids, dtype=torch.long, device=lm.device)
    losses = []
    for i in range(0, len(texts), BATCH // 2):
        part = texts[i : i + BATCH // 2]
        ids, lengths = tokens.pad_texts(lm, part)
        real = tokens.real_tokens(ids, lengths)
        ordinary = real & ~torch.isin(ids, special)
        for text, count in zip(part, ordinary.sum(1).tolist(), strict=True):
            if count < 2:
                raise ValueError(f"text {text[:40]!r} has fewer than two tokens for {lm.name}; give a longer one")
        chosen, shown = real, ids
        if lm.spec.masked:
            chosen = ordinary & (ordinary.cumsum(1) % 6 == 1)
            shown = ids.masked_fill(chosen, lm.tokenizer.mask_token_id)
        with torch.no_grad():
            logp = lm.model(input_ids=shown, attention_mask=real.long()).logits.float().log_softmax(-1)
        if not lm.spec.masked:
            logp, ids, chosen = logp[:, :-1], ids[:, 1:], real[:, 1:]
        loss = -logp.gather(2, ids[..., None])[..., 0].masked_fill(~chosen, 0)
        losses.append((loss.sum(1) / chosen.sum(1)).cpu())
        expect_numbers(lm, losses[-1][:, None], ids.tolist(), "loss")
    return torch.cat(losses)
