"""Causal tracing: which states carry a prediction (Meng et al. 2022, section 2; Niu et al. 2024, section 4).

The subject is corrupted, so that the model no longer gives its answer; then one state of the clean run is put back, at
one token and one block, and what comes back of the answer is that state's indirect effect. Such a cell changes nothing
before its token and nothing below its block: it is a row that continues the corrupted run from there, and all cells of
a token travel up as one batch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kncore import arch, checks, tokens
from kncore.models import LM
from kncore.query import Query
from kncore.replay import Capture, Change, capture, expect_numbers, later, record, replay
from kncore.store import state
from kncore.store.results import Result, stored

States = dict[tuple[int, str], Float[Tensor, "row token hidden"]]  # by block and site


class Restore(NamedTuple):
    """What is put back: the state of `site` ("residual": what enters a block; "mlp", "attention": what they add).

    `window` neighbouring blocks are restored together, centred on the cell's block and cut off at the ends. `sever`
    ("mlp" or "attention") freezes their output at the corrupted run's, at the cell's token, in all blocks from the
    first restored one on: what comes back then came another way (Meng et al. 2022, appendix B).
    """

    site: str = "residual"
    window: int = 1
    sever: str = ""


@dataclass(frozen=True)
class Trace:
    """One prompt traced. The last axis is (probability of the target's first token, log-odds of it against the foil's).

    `tokens` of the prompt, `subject` the positions of its first and last token; `clean` and `corrupted` (the mean over
    samples) without restoring; `restored[r, t, l]` with restore r at token t and block `blocks[l]`, the mean over
    samples: the corrupted run's before the subject, where nothing can change, and nan where no cell was computed.
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


class _Prompt(NamedTuple):
    """A query as token ids, and with the `other` subject if that replaces its own.

    `span` has the positions of the subject's first and last token, `ends` the first tokens of target and foil.
    """

    encoded: tokens.Encoded
    other: tokens.Encoded | None
    span: tuple[int, int]
    ends: tuple[int, int]


class _Plan(NamedTuple):
    """What is done to each prompt; without `samples` of noise, its subject is replaced."""

    restores: Sequence[Restore]
    blocks: tuple[int, ...]
    where: str
    noise: float
    samples: int
    seed: int
    budget: int


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

    Finished traces are stored, and found again after an interrupt. Raises ValueError for a query without subject or
    foil or whose foil begins as its target, others that differ in more than the subject or have another number of
    tokens there, an unknown site, nonsensical numbers, and where what the model computes is no number; TypeError for
    what is no list of queries or restores.
    """
    queries = checks.items(queries, Query, "queries", 1)
    others = [None] * len(queries) if others is None else checks.items(others, Query, "others")
    if len(others) != len(queries):
        raise ValueError(f"{len(queries)} queries but {len(others)} others; give one for each")
    plan = _plan(lm, restores, stride, where, None if others[0] else (noise, samples), seed, budget)
    prompts = [_prompt(lm, query, other) for query, other in zip(queries, others, strict=True)]
    shared = {
        "where": [where, list(plan.blocks)],
        "restores": [list(restore) for restore in plan.restores],
        "corruption": [plan.noise, plan.samples, plan.seed] if plan.samples else "replacement",
    }
    read = [[p.encoded.ids, p.encoded.position, p.ends, p.span, p.other and p.other.ids] for p in prompts]
    results = stored(
        lm,
        (_trace,),
        [{**shared, "query": of_prompt} for of_prompt in read],
        lambda part: [_trace(lm, prompts[i], plan) for i in part],
        store=store,
        progress="trace" if progress else "",
    )
    return [
        Trace(query, tuple(lm.tokenizer.decode([i]) for i in p.encoded.ids), p.span, plan.blocks, **result)
        for query, p, result in zip(queries, prompts, results, strict=True)
    ]


def frame(lm: LM, query: Query, target: str | None = None) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]]:
    """Return the positions of the subject's first and last token, and the tokens before and after the subject."""
    ids, (first, last) = tokens.encode(lm, query, target).ids, tokens.span(lm, query, target)
    return (first, last), ids[:first], ids[last + 1 :]


def _plan(
    lm: LM, restores: Iterable[Restore], stride: int, where: str, noise: tuple | None, seed: int, budget: int
) -> _Plan:
    """Return what is done to each prompt, after all checks; `noise` is its factor and the number of samples, if any."""
    known, checked = {"residual", "mlp", "attention"}, []
    for restore in checks.items(restores, Restore, "restores", 1):
        if restore.site not in known or restore.sever not in {"", "mlp", "attention"} - {restore.site}:
            names = ", ".join(sorted(known))
            raise ValueError(f"{restore}: the site is one of {names}, and only another can be severed")
        window = checks.whole(restore.window, f"{restore}: the window", 1, len(lm.blocks))
        checked.append(restore._replace(window=window))
    if where not in ("all", "ends"):
        raise ValueError(f"unknown tokens {where!r} to restore at; choose 'all' or 'ends'")
    factor, samples = noise or (0.0, 0)
    if noise:
        factor, samples = checks.setting(factor, "noise", above=True), checks.whole(samples, "samples", 1)
    blocks = tuple(range(0, len(lm.blocks), checks.whole(stride, "stride", 1, len(lm.blocks))))
    seed, budget = checks.whole(seed, "seed"), checks.whole(budget, "budget", 1)
    return _Plan(checked, blocks, where, factor, samples, seed, budget)


def _prompt(lm: LM, query: Query, other: Query | None) -> _Prompt:
    if not query.subject or not query.foil:
        raise ValueError(f"{query.prompt!r}: tracing needs a subject to corrupt and a foil for the log-odds")
    encoded, foil = tokens.encode(lm, query), tokens.encode(lm, query, query.foil)
    if other is not None and frame(lm, other, query.target) != frame(lm, query):
        raise ValueError(
            f"{other.prompt!r} cannot replace {query.prompt!r}: their subjects lie at other tokens, or other tokens "
            "stand around them; choose others with `replacements`"
        )
    ends = encoded.target[0], foil.target[0]
    if ends[0] == ends[1]:
        raise ValueError(
            f"{query.prompt!r}: {query.target!r} and its foil {query.foil!r} begin with the same token, so their "
            "log-odds is always 0; choose another foil"
        )
    replacement = None if other is None else tokens.encode(lm, other, query.target)
    return _Prompt(encoded, replacement, tokens.span(lm, query), ends)


def _trace(lm: LM, prompt: _Prompt, plan: _Plan) -> Result:
    encoded, other, span, ends = prompt
    sites = {name for restore in plan.restores for name in (restore.site, restore.sever) if name}
    first, end = (0, len(encoded.ids)) if lm.spec.masked else (span[0], encoded.position + 1)
    clean_logits, clean = _run(lm, [encoded], sites)
    corrupt, corrupted = contextlib.nullcontext(), [other]
    if other is None:
        corrupt, corrupted = _noised(lm, span, _noise(lm, prompt, plan)), [encoded] * plan.samples
    with corrupt:
        corrupted_logits, states = _run(lm, corrupted, sites)
        base = _read(corrupted_logits, ends).mean(0)
        restored = base.expand(len(plan.restores), len(encoded.ids), len(plan.blocks), 2).clone()
        positions = range(first, end)
        if plan.where == "ends":
            positions = sorted({span[1], encoded.position})
            restored[:, first:] = torch.nan
        captured = capture(lm, corrupted, sites=(), start=[positions[0]] * len(corrupted))
        for position in positions:
            restored[:, position] = _cells(later(captured, position), plan, position, clean, states, ends)
            expect_numbers(lm, restored[:, position].reshape(1, -1), [encoded.ids], "predictions")
    return {"clean": _read(clean_logits, ends)[0].cpu(), "corrupted": base.cpu(), "restored": restored.cpu()}


def _noise(lm: LM, prompt: _Prompt, plan: _Plan) -> Float[Tensor, "sample token hidden"]:
    number = random.Random(f"{plan.seed} {prompt.encoded.ids}").getrandbits(63)
    table = lm.model.get_input_embeddings().weight
    size = plan.samples, prompt.span[1] - prompt.span[0] + 1, table.shape[1]
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(number))
    return (plan.noise * float(table.float().std()) * drawn).to(lm.device, lm.dtype)


def _noised(lm: LM, span: tuple[int, int], added: Float[Tensor, "sample token hidden"]):
    """Return a context in which `added` goes to the embeddings of the subject's tokens."""
    first, end = span[0], span[1] + 1

    def add(x: Tensor) -> Tensor:
        return torch.cat([x[:, :first], x[:, first:end] + added, x[:, end:]], 1)

    return arch.at_site(lm.model.get_input_embeddings(), arch.Site("", "output"), add)


@torch.no_grad()
def _run(lm: LM, batch: list[tokens.Encoded], sites: Iterable[str]) -> tuple[Float[Tensor, "row vocab"], States]:
    """Return the logits at the target position, and the states of the sites at all tokens."""
    places = [(block, site) for block in range(len(lm.blocks)) for site in sites]
    states, hidden = record(lm, *tokens.pad(lm, batch), places, whole=True)
    logits = lm.readout(hidden[:, batch[0].position], normed=True).float()
    expect_numbers(lm, logits, [e.ids for e in batch], "predictions")
    return logits, states


def _read(logits: Float[Tensor, "row vocab"], ends: tuple[int, int]) -> Float[Tensor, "row 2"]:
    target, foil = ends
    return torch.stack([logits.softmax(-1)[:, target], logits[:, target] - logits[:, foil]], 1)


class _Row(NamedTuple):
    """A cell of one sample: from block `low` on, up to but not with `high`, the clean state is put back."""

    low: int
    restore: int
    high: int
    block: int
    sample: int


@torch.no_grad()
def _cells(
    captured: Capture, plan: _Plan, position: int, clean: States, corrupted: States, ends: tuple[int, int]
) -> Float[Tensor, "restore block 2"]:
    """Return the mean over samples of every restore's cell of every block at one position."""
    samples, n_blocks = len(captured.target), len(captured.lm.blocks)
    rows = []
    for r, restore in enumerate(plan.restores):
        for block in plan.blocks:
            low = block - restore.window // 2
            high = min(n_blocks, low + restore.window)
            rows += [_Row(max(0, low), r, high, block, sample) for sample in range(samples)]
    rows.sort()
    parts = captured.parts(rows, plan.budget)
    logits = [_replayed(captured, plan.restores, position, part, clean, corrupted) for part in parts]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].restore, rows[i].block, rows[i].sample))
    cells = _read(torch.cat(logits), ends)[order]
    return cells.unflatten(0, (len(plan.restores), len(plan.blocks), samples)).mean(2)


def _replayed(
    captured: Capture,
    restores: Sequence[Restore],
    position: int,
    rows: Sequence[_Row],
    clean: States,
    corrupted: States,
) -> Float[Tensor, "row vocab"]:
    """Return the logits of some cells at one position, which rise in block and, within a block, in restore."""
    lm = captured.lm
    low, which, high, _, sample = torch.tensor(rows, device=lm.device).T
    changes = []
    for (block, r), group in groupby(rows, key=lambda row: row[:2]):
        prompts = torch.tensor([row.sample for row in group], device=lm.device)
        values = clean[block, restores[r].site][0, position].expand(len(prompts), -1)
        changes.append(Change(block, prompts, values, restores[r].site, torch.full_like(prompts, position)))

    def put(block: int, site: str, chosen: Tensor, values: Tensor) -> None:
        at = chosen, torch.full_like(chosen, position - int(captured.start[0]))
        see = partial(torch.index_put, indices=at, values=values)
        hooks.enter_context(arch.at_site(lm.blocks[block], lm.spec.sites[site], see))

    with contextlib.ExitStack() as hooks:
        for block in range(rows[0].low, len(lm.blocks)):
            for r, restore in enumerate(restores):
                inside = ((which == r) & (low < block) & (block < high)).nonzero()[:, 0]
                above = ((which == r) & (low <= block)).nonzero()[:, 0]
                if len(inside):
                    put(block, restore.site, inside, clean[block, restore.site][0, position])
                if restore.sever and len(above):
                    put(block, restore.sever, above, corrupted[block, restore.sever][sample[above], position])
        return replay(captured, changes)
