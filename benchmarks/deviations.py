"""Measure points in which the published code departs from this book: what a few prompts get by either way.

Prints a table in Markdown: the effect of each point on one model. Facts are capitals that the model knows, minimal
pairs are of verbs after plural subjects; the targets of several tokens are those that the tokenizer splits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from report import parser, show, table
from scipy.stats import ttest_ind

import kncore
from kncore import attribution, editors, neurons, predictions, rome, tokens
from kncore.covariance import covariance
from kncore.interventions import suppress
from kncore.store import state
from knpaper import cases, criteria, grammar, stats, stimuli, tasks

COLUMNS = ("point", "prompts", "published against ours")


@state.computes(grad=True)
def scores(lm, encoded) -> torch.Tensor:
    """Return the scores of prompts as token ids, for the first token of the target of each."""
    return torch.stack(
        [found["scores"] for found in attribution._attributed(lm, encoded, "neuron", False, None, 3e-3, 1024)]
    )


def alike(theirs: torch.Tensor, ours: torch.Tensor) -> str:
    """Return in words how alike two attributions of the same prompts are."""
    cosine = torch.nn.functional.cosine_similarity(theirs.flatten(1).double(), ours.flatten(1).double())
    a, b = neurons.coarse(theirs).flatten(1), neurons.coarse(ours).flatten(1)
    common = ((a & b).sum(1) / (a | b).sum(1).clamp_min(1)).double()
    first = theirs.flatten(1).argmax(1) == ours.flatten(1).argmax(1)
    return (
        f"cosine of the scores {stats.mean(cosine.tolist())}; of the two coarse sets {common.mean():.2f} is common; "
        f"the first neuron is the same in {int(first.sum())}"
    )


def after_guess(lm, encoded: list[tokens.Encoded]) -> torch.Tensor:
    """Return the mean of the scores of all target tokens, each after the model's own best guesses (as for LLaMA)."""
    total = []
    for prompt in encoded:
        ids, parts = prompt.ids, []
        for token in prompt.target:
            parts.append(scores(lm, [tokens.Encoded(ids, len(ids) - 1, (token,))])[0])
            with torch.no_grad():
                ids = (*ids, int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        total.append(torch.stack(parts).mean(0))
    return torch.stack(total)


def attributions(lm, n: int) -> list[list]:
    """Return the rows on attribution."""
    facts = [query for query in stimuli.known_facts(lm, "capital", n).queries[:: stimuli.TEMPLATES]]
    pairs = stimuli.known_pairs(lm, "subject_verb", n)["plural"].queries
    both = [*facts, *pairs]
    ours = kncore.attribute(lm, both).scores
    rows = [["neuron site", len(both), alike(kncore.attribute(lm, both, site="published").scores, ours)]]
    encoded = [tokens.encode(lm, query) for query in facts]
    bos = lm.tokenizer.bos_token_id
    started = [replace(e, target=(bos, e.target[0])) for e in encoded]
    if bos is not None:
        rows.append(["start token in targets", n, alike(after_guess(lm, started), ours[:n])])
    bare = [tuple(lm.tokenizer(query.target, add_special_tokens=False)["input_ids"][:1]) for query in pairs]
    spaceless = scores(lm, [replace(tokens.encode(lm, q), target=first) for q, first in zip(pairs, bare, strict=True)])
    rows.append(["space before the target", len(pairs), alike(spaceless, ours[len(facts) :])])
    queries = [query for name in stimuli.RELATIONS["own"] for query in tasks.facts(name)[:: stimuli.TEMPLATES]]
    split = [query for query in queries if len(tokens.encode(lm, query).target) > 1][:n]
    encoded = [tokens.encode(lm, query) for query in split]
    ours = kncore.attribute(lm, split).scores
    same_place = torch.stack([scores(lm, [replace(e, target=(token,)) for token in e.target]).mean(0) for e in encoded])
    rows.append(["targets of several tokens, all at one position (GPT-2)", len(split), alike(same_place, ours)])
    rows.append(
        ["targets of several tokens, after best guesses (LLaMA)", len(split), alike(after_guess(lm, encoded), ours)]
    )
    return rows


def shrinking(lm, n: int) -> list:
    """Return the row on the coarse threshold that shrinks from prompt to prompt."""
    found = stimuli.known_facts(lm, "capital", n)
    parts = kncore.attribute(lm, found.queries).scores.split(stimuli.TEMPLATES)
    counts, refined = [], []
    for part in parts:
        threshold, inside = 0.2, []
        for prompt in part:
            threshold *= float(prompt.max())
            inside.append(prompt > threshold)
        counts.append([int(x.sum()) for x in inside])
        refined.append(
            [int((torch.stack(list(some)).float().mean(0) > 0.7).sum()) for some in (inside, neurons.coarse(part))]
        )
    last = np.median([row[-1] for row in counts])
    theirs, ours = np.median(refined, axis=0)
    words = (
        f"coarse set of the fifth prompt, median: {last:,.0f} neurons; in more than 0.7 of the prompts {theirs:,.0f} "
        f"against {ours:.0f}"
    )
    return ["coarse threshold", len(found.queries), words]


def tests(lm, n: int) -> list:
    """Return the row on tests: how many words of number are said to change when the plural's neurons are suppressed."""
    queries = stimuli.known_pairs(lm, "subject_verb", 2 * n)["plural"].queries
    chosen = neurons.find_neurons(kncore.attribute(lm, queries[:n]).scores).neurons
    words = [word for some in grammar.number_words("causal").values() for word in some]
    ids = [tokens.encode(lm, queries[0], word).target[0] for word in words]
    tested, items = queries[n:], [query.item for query in queries[n:]]
    before = predictions.log_probabilities(lm, tested)[:, ids].double().numpy()
    with suppress(lm, chosen):
        after = predictions.log_probabilities(lm, tested)[:, ids].double().numpy()
    apart = [ttest_ind(np.exp(b), np.exp(a)).pvalue < 0.05 for b, a in zip(before.T, after.T, strict=True)]
    together = [stats.paired(b, a, items).p_wilcoxon for b, a in zip(before.T, after.T, strict=True)]
    corrected = [p < 0.05 for p in stats.holm(together)]
    words = (
        f"of {len(words)} words {sum(apart)} change by a two-sample t test at 0.05, {sum(corrected)} by a paired test "
        "of Wilcoxon with Holm's correction"
    )
    return ["significance", len(tested), words]


def prefixes(lm, n: int, count: int = 20, draws: int = 2) -> list[list]:
    """Return the rows on ROME: prefixes sampled from the model, a space too many, and partial credit."""
    drawn = [
        cases.shorten(case, {"reliability": None, "generality": 4, "locality": 5}) for case in stimuli.capitals(lm, n)
    ]
    requests, own = [case.request for case in drawn], rome.hparams_for(lm)
    moment = covariance(lm, own.block, own.covariance)

    def sampled(seed: int) -> list:
        starts = ["The", "Therefore", "Because", "I", "You"] * (count // 5)
        texts = criteria.generations(lm, starts, length=9, seed=seed)
        heads = [f"{start}{text}. ".replace("\n", " ") for start, text in zip(starts, texts, strict=True)]

        def read(lm, request, settings, seed=0):
            *_, essence = rome.prompts(lm, request, settings, seed)
            asked = [replace(request, prompt=head + request.prompt) for head in ["", *heads]]
            return [(tokens.encode(lm, q, q.foil), tokens.span(lm, q, q.foil)[1]) for q in asked] + [essence]

        return rome.search(lm, requests, replace(own, prefixes=0), read=read)

    def spaced(lm, request, settings, seed=0):
        space = tuple(lm.tokenizer(" ", add_special_tokens=False)["input_ids"])
        return [(replace(e, target=space + e.target), at) for e, at in rome.prompts(lm, request, settings, seed)]

    searches = {"book": rome.search(lm, requests, own), "space": rome.search(lm, requests, own, read=spaced)}
    searches |= {seed: sampled(seed) for seed in range(draws)}
    edits = {name: editors.write_searches(some, moment, own.block) for name, some in searches.items()}
    measured = {name: criteria.measure(lm, drawn, some) for name, some in edits.items()}

    def shown(name) -> str:
        return ", ".join(
            f"{kind} {criteria.share(measured[name], kind).value:.2f}"
            for kind in ("reliability", "generality", "locality")
        )

    changes = [
        torch.nn.functional.cosine_similarity(a.change, b.change, 0)
        for a, b in zip(searches[0], searches[1], strict=True)
    ]
    words = (
        f"{shown(0)} and, drawn again, {shown(1)}; ours {shown('book')}. Cosine of the changes of two draws "
        f"{np.mean(changes):.2f}"
    )
    first = f"{shown('space')}; ours {shown('book')}"
    return [["prefixes in ROME, twenty sampled", n, words], ["space before the new answer, one too many", n, first]]


def main() -> None:
    given = parser(
        __doc__, model=("smollm2-135m", "as for kncore.load"), n=(8, "prompts or edits of each point")
    ).parse_args()
    lm = kncore.load(given.model)
    rows = [*attributions(lm, given.n), shrinking(lm, given.n), tests(lm, 2 * given.n), *prefixes(lm, given.n)]
    show(f"*{lm.name}*\n\n{table(COLUMNS, rows, left=3)}", given.out)


if __name__ == "__main__":
    main()
