"""Causal tracing: which states carry a prediction (Meng et al. 2022, section 2; Niu et al. 2024, section 4).

The subject is corrupted, so that the model no longer gives its answer; then one state of the clean run is put back, at
one token and one block, and what comes back of the answer is that state's indirect effect. A cell restored at token t
changes nothing before t and nothing below its block: it is a row that continues the corrupted run from there. All cells
of a token travel up as one batch.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kncore import arch, cache, checks, grammar, predictions, state, tasks, tokens
from kncore.models import LM
from kncore.replay import Capture, Change, capture, expect_numbers, replay
from kncore.tasks import Query

TRIES = 8  # sentences asked for each that is wanted


class Restore(NamedTuple):
    """What is put back: the state of `site` ("residual": what enters a block; "mlp", "attention": what they add).

    `window` is the number of neighbouring blocks restored together, centred on the cell's block and cut off at the
    ends. `sever` ("mlp" or "attention") freezes the output of these at the corrupted run's, at the cell's token, in
    all blocks from the first restored one on: what comes back then came another way (Meng et al. 2022, appendix B).
    """

    site: str = "residual"
    window: int = 1
    sever: str = ""


@dataclass(frozen=True)
class Trace:
    """One prompt traced. The last axis is (probability of the target's first token, log-odds of it against the foil's).

    `tokens` of the prompt, `subject` the positions of its first and last token; `clean` and `corrupted` (the mean over
    samples) without restoring; `restored[r, t, l]` with restore r at token t and block `blocks[l]`, the mean over
    samples. Tokens before the subject cannot change and have the corrupted run's numbers; those not asked for have nan.
    """

    query: Query
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    blocks: tuple[int, ...]
    clean: Float[Tensor, " readings"]
    corrupted: Float[Tensor, " readings"]
    restored: Float[Tensor, "restore token block 2"]

    @property
    def effects(self) -> Float[Tensor, "restore token block 2"]:
        """Indirect effects: restored minus corrupted."""
        return self.restored - self.corrupted


@state.computes(grad=False)
def trace(
    lm: LM,
    queries: Sequence[Query],
    restores: Sequence[Restore] = (Restore(),),
    *,
    noise: float | None = 3.0,
    samples: int = 3,
    others: Sequence[Query] | None = None,
    where: str = "all",
    stride: int = 1,
    seed: int = 0,
    budget: int = 1024,
    store: bool = True,
    progress: bool = False,
) -> list[Trace]:
    """Trace each query at every token from its subject on (`where` "ends": at the last token of the subject and where
    the target is predicted), and every block (or every `stride`-th from 0 on).

    The corruption adds normal noise to the embeddings of the subject's tokens: `noise` times the standard deviation of
    the embedding matrix, `samples` times, drawn from `seed` and the prompt. With `others`, one query per query, it puts
    the other subject in its place instead (symmetric token replacement): the same number of tokens, one run.

    Queries need a subject and a foil. Finished traces are stored, and found again after an interrupt. Raises ValueError
    for a query without subject or foil or whose foil begins as its target, others that differ in more than the subject
    or have another number of tokens there, an unknown site, nonsensical numbers, and where what the model computes is
    no number; TypeError for what is no list of queries or restores.
    """
    queries = checks.items(queries, Query, "queries")
    restores = [_restore(lm, restore) for restore in checks.items(restores, Restore, "restores")]
    others = None if others is None else checks.items(others, Query, "others")
    noise = noise if noise is None else float(checks.reals([noise], "noise")[0])
    samples, stride = checks.whole(samples, "samples"), checks.whole(stride, "stride")
    seed, budget = checks.whole(seed, "seed"), checks.whole(budget, "budget", 1)
    _check(lm, queries, restores, noise, samples, others, where, stride)
    blocks = tuple(range(0, len(lm.blocks), stride))
    settings = {
        "where": [where, stride],
        "restores": [list(r) for r in restores],
        "corruption": [noise, samples, seed] if others is None else "replacement",
    }
    kept = cache.store(lm, _trace) if store else None
    out = []
    for i, query in enumerate(tqdm(queries, desc="trace", unit="prompt", leave=False, disable=not progress)):
        encoded = tokens.encode(lm, query)
        foil = tokens.encode(lm, query, query.foil)
        span = tokens.span(lm, query)
        other = None if others is None else tokens.encode(lm, others[i], query.target)
        if other is not None and _frame(lm, others[i], query.target) != _frame(lm, query):
            raise ValueError(
                f"{others[i].prompt!r} cannot replace {query.prompt!r}: their subjects lie at other tokens, or "
                "other tokens stand around them; choose others with `replacements`"
            )
        ends = encoded.target[0], foil.target[0]
        if ends[0] == ends[1]:
            raise ValueError(
                f"{query.prompt!r}: {query.target!r} and its foil {query.foil!r} begin with the same token, so their "
                "log-odds is always 0; choose another foil"
            )
        prompt = [encoded.ids, encoded.position, ends, span, other and other.ids]
        name = kept.name({**settings, "query": prompt}) if kept else ""
        found = kept.read(name) if kept else None
        if found is None:
            found = _trace(lm, encoded, other, span, ends, restores, noise, samples, where, blocks, seed, budget)
            if kept:
                kept.write({name: found})
        words = tuple(lm.tokenizer.decode([token]) for token in encoded.ids)
        out.append(Trace(query, words, span, blocks, **found))
    return out


def facts(lm: LM, relation: str, n: int, seed: int = 0) -> list[tuple[Query, Query]]:
    """The first `n` facts (in the order of `seed`) that can be traced, each with a partner to replace its subject.

    Asked in the relation's first template that does not begin with the subject. The subject has 2 to 6 tokens, the
    model prefers the answer to every other of the relation, and the partner is another fact in the same template,
    its subject at the same tokens, its answer the foil. Fewer where the relation has no more. Raises ValueError for an
    unknown relation and an `n` below 1.
    """
    n = checks.whole(n, "n", 1)
    known = tasks.describe(relation)
    template = next(text for text in known.templates if not text.startswith("{}"))
    pool = tasks.facts(relation, seed=seed, templates=[template])
    places = [tokens.span(lm, query) for query in pool]
    pool = [query for query, (first, last) in zip(pool, places, strict=True) if 1 <= last - first <= 5]
    pairs = []
    partners = replacements(lm, pool, seed)
    prefers = predictions.predict(lm, pool, tasks.candidates(relation))["prefers"]
    for query, partner, right in zip(pool, partners, prefers, strict=True):
        if right and partner is not None:
            pairs.append((replace(query, foil=partner.target), partner))
    return pairs[:n]


def agreement(lm: LM, phenomenon: str, n: int, seed: int = 0, then: str = "") -> list[tuple[Query, Query]]:
    """`n` sentences of a phenomenon that can be traced, each with its partner of the other number.

    The subject is the phrase from "the" to its noun, or for agreement of subject and verb to the end of the prompt;
    `then` is what follows the prompt before the word that agrees. The model prefers that word to its foil, and the
    partner is the other sentence of the minimal pair, its phrase at the same tokens. No lemma comes twice, and the two
    conditions take turns. Raises ValueError for an unknown phenomenon and an `n` below 1.
    """
    n = checks.whole(n, "n", 1)
    queries = [_phrase(query, then) for query in grammar.minimal_pairs(phenomenon, seed=seed)]
    pairs = [(query, queries[i ^ 1]) for i, query in enumerate(queries) if query and queries[i ^ 1]]
    asked = pairs[: TRIES * n]
    prefers = predictions.predict(lm, [query for query, _ in asked])["prefers"] if asked else []
    found: dict[str, tuple[Query, Query]] = {}
    last = ""
    for (query, partner), right in zip(asked, prefers, strict=True):
        if right and query.item not in found and query.value != last and _fit(lm, query, partner):
            found[query.item], last = (query, partner), query.value
    return list(found.values())[:n]


def _phrase(query: Query, then: str) -> Query | None:
    noun = tasks.subject_start(query)
    before, article, rest = query.prompt[:noun].rpartition("the ")
    if not article or rest or before[-1:].isalnum():
        return None
    end = len(query.prompt) if query.task.startswith("subject_verb") else noun + len(query.subject)
    phrase, prompt = query.prompt[len(before) : end], query.prompt + then
    return replace(query, prompt=prompt, subject=phrase, template=f"{before}{{}}{prompt[end:]}")


def _fit(lm: LM, query: Query, other: Query) -> bool:
    """Whether another subject lies at the same tokens of an otherwise equal prompt, and has another target."""
    same = _frame(lm, query) == _frame(lm, other)
    return same and tokens.encode(lm, query).target[0] != tokens.encode(lm, other).target[0]


def _frame(lm: LM, query: Query, target: str | None = None) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]:
    """Where the subject lies, and the tokens before and after it."""
    ids, (first, last) = tokens.encode(lm, query, target).ids, tokens.span(lm, query, target)
    return (first, last), ids[:first], ids[last + 1 :]


def replacements(lm: LM, queries: Sequence[Query], seed: int = 0) -> list[Query | None]:
    """For each query another one of the same template whose subject lies at the same tokens, and has another target.

    Drawn from `seed`; None where there is none.
    """
    places = [(query.template, *_frame(lm, query)) for query in queries]
    first = [tokens.encode(lm, query).target[0] for query in queries]
    rng = random.Random(f"replacements {checks.whole(seed, 'seed')}")
    out = []
    for place, target in zip(places, first, strict=True):
        there = zip(queries, places, first, strict=True)
        fit = [other for other, its_place, its_target in there if its_place == place and its_target != target]
        out.append(rng.choice(fit) if fit else None)
    return out


def _restore(lm: LM, restore: Restore) -> Restore:
    """A restore with a Python number, after all checks."""
    known = {"residual", "mlp", "attention"}
    if restore.site not in known or restore.sever not in {"", "mlp", "attention"} - {restore.site}:
        raise ValueError(f"{restore}: the site is one of {', '.join(sorted(known))}, and only another can be severed")
    window = checks.whole(restore.window, f"{restore}: the window")
    if not 1 <= window <= len(lm.blocks):
        raise ValueError(f"{restore}: the window is a number of blocks, 1 to {len(lm.blocks)}")
    return restore._replace(window=window)


def _check(lm: LM, queries, restores, noise, samples, others, where, stride) -> None:
    if not queries or not restores:
        raise ValueError("nothing to trace; give at least one query and one restore")
    if others is not None and len(others) != len(queries):
        raise ValueError(f"{len(queries)} queries but {len(others)} others; give one for each")
    if others is None and (noise is None or not 0 < noise < math.inf or samples < 1):
        raise ValueError(f"noise must be positive and finite, and samples at least 1, got {noise} and {samples}")
    if where not in ("all", "ends"):
        raise ValueError(f"unknown tokens {where!r} to restore at; choose 'all' or 'ends'")
    if not 1 <= stride <= len(lm.blocks):
        raise ValueError(f"stride is a number of blocks, 1 to {len(lm.blocks)}, got {stride}")
    for query in queries:
        if not query.subject or not query.foil:
            raise ValueError(f"{query.prompt!r}: tracing needs a subject to corrupt and a foil for the log-odds")


def _trace(lm, encoded, other, span, ends, restores, noise, samples, where, blocks, seed, budget) -> dict[str, Tensor]:
    sites = sorted({name for restore in restores for name in (restore.site, restore.sever) if name})
    length, first = len(encoded.ids), 0 if lm.spec.masked else span[0]
    clean_logits, clean = _run(lm, encoded, sites)
    if other is None:
        rng = torch.Generator().manual_seed(_number(encoded.ids, seed))
        table = lm.model.get_input_embeddings().weight
        size = samples, span[1] - span[0] + 1, table.shape[1]
        added = (noise * float(table.float().std()) * torch.randn(size, generator=rng)).to(lm.device, lm.dtype)
        corrupt, shown = partial(_noised, lm, span, added), [encoded] * samples
    else:
        corrupt, shown = contextlib.nullcontext, [other]
    with corrupt():
        wrong_logits, wrong = _run(lm, shown, sites)
        base = _read(wrong_logits, ends).mean(0)
        restored = base.expand(len(restores), length, len(blocks), 2).clone()
        captured = None
        reached = range(first, length if lm.spec.masked else encoded.position + 1)
        if where == "ends":
            reached = sorted({span[1], encoded.position})
            restored[:, first:] = torch.nan
        for t in reached:
            if captured is None or not lm.spec.masked:
                captured = capture(lm, shown, sites=(), start=[t] * len(shown))
            restored[:, t] = _cells(captured, restores, t, blocks, clean, wrong, ends, budget)
            expect_numbers(lm, restored[:, t].reshape(1, -1), [encoded.ids], "predictions")
    return {"clean": _read(clean_logits, ends)[0].cpu(), "corrupted": base.cpu(), "restored": restored.cpu()}


def _number(ids: Sequence[int], seed: int) -> int:
    return random.Random(f"{seed} {ids}").getrandbits(63)


@contextlib.contextmanager
def _noised(lm: LM, span: tuple[int, int], added: Float[Tensor, "sample token hidden"]) -> Iterator[None]:
    def add(module, args, out):
        return torch.cat([out[:, : span[0]], out[:, span[0] : span[1] + 1] + added, out[:, span[1] + 1 :]], 1)

    hook = lm.model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _run(lm: LM, encoded, sites: Sequence[str]) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Logits at the target position `[row, vocab]`, and the states of the sites `[row, token, hidden]` by block."""
    batch = encoded if isinstance(encoded, list) else [encoded]
    ids, _ = tokens.pad(lm, batch)
    kept: dict[str, list[Tensor]] = {name: [] for name in sites}
    with contextlib.ExitStack() as hooks:
        for block in lm.blocks:
            for name in sites:
                hooks.enter_context(arch.at_site(block, lm.spec.sites[name], lambda x, n=name: kept[n].append(x)))
        states = lm.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    logits = lm.readout(states[:, batch[0].position], normed=True).float()
    expect_numbers(lm, logits, [e.ids for e in batch], "predictions")
    return logits, kept


def _read(logits: Float[Tensor, "row vocab"], ends: tuple[int, int]) -> Float[Tensor, "row 2"]:
    target, foil = ends
    return torch.stack([logits.softmax(-1)[:, target], logits[:, target] - logits[:, foil]], 1)


@torch.no_grad()
def _cells(
    captured: Capture, restores: Sequence[Restore], t: int, blocks, clean, wrong, ends: tuple[int, int], budget: int
) -> Float[Tensor, "restore block 2"]:
    """The mean over samples of every restore's cell of every block at token t."""
    samples, n = len(captured.target), len(captured.lm.blocks)
    rows = []
    for r, restore in enumerate(restores):
        for b in blocks:
            low = b - restore.window // 2
            rows += [_Row(max(0, low), r, min(n, low + restore.window), b, s) for s in range(samples)]
    rows.sort()
    room = max(1, budget // captured.row_cost)
    logits = [_replayed(captured, restores, t, rows[i : i + room], clean, wrong) for i in range(0, len(rows), room)]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].restore, rows[i].block, rows[i].sample))
    return _read(torch.cat(logits), ends)[order].unflatten(0, (len(restores), len(blocks), samples)).mean(2)


class _Row(NamedTuple):
    """A cell of one sample: from block `low` on, up to but not with `high`, the clean state is put back."""

    low: int
    restore: int
    high: int
    block: int
    sample: int


def _replayed(
    captured: Capture, restores: Sequence[Restore], t: int, rows: Sequence[_Row], clean, wrong
) -> Float[Tensor, "row vocab"]:
    """Logits of some cells at token t, which rise in block and, within a block, in restore."""
    lm = captured.lm
    low, which, high, _, sample = torch.tensor(rows, device=lm.device).T
    changes = []
    for (depth, r), group in groupby(rows, key=lambda row: row[:2]):
        prompts = torch.tensor([row.sample for row in group], device=lm.device)
        values = clean[restores[r].site][depth][0, t].expand(len(prompts), -1)
        changes.append(Change(depth, prompts, values, restores[r].site, torch.full_like(prompts, t)))
    at = t - int(captured.start[0])

    def put(x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
        return x.index_put((chosen, torch.full_like(chosen, at)), values.to(x.dtype))

    with contextlib.ExitStack() as hooks:
        for depth in range(rows[0].low, len(lm.blocks)):
            for r, restore in enumerate(restores):
                inside = ((which == r) & (low < depth) & (depth < high)).nonzero()[:, 0]
                below = ((which == r) & (low <= depth)).nonzero()[:, 0]
                todo = []
                if len(inside):
                    todo.append((restore.site, inside, clean[restore.site][depth][0, t].expand(len(inside), -1)))
                if restore.sever and len(below):
                    todo.append((restore.sever, below, wrong[restore.sever][depth][sample[below], t]))
                for site, chosen, values in todo:
                    change = partial(put, chosen=chosen, values=values)
                    hooks.enter_context(arch.at_site(lm.blocks[depth], lm.spec.sites[site], change))
        return replay(captured, changes)
