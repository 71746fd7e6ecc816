"""Criteria of an edit: what the model says before and after, and whether that is what it should say then.

Every query of every case is asked of the model as it is and under the case's edit. Equal questions are asked once, and
questions under different edits share batches, each row run with its own edit.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kncore import checks, tokens
from kncore.checks import unknown
from kncore.editors import Edit
from kncore.generation import generate
from kncore.interventions import Delta, edited, edited_rows
from kncore.models import LM
from kncore.query import Query
from kncore.store import state
from kncore.store.results import Result, stored
from kncore.tokens import Encoded
from knpaper import stats
from knpaper.cases import Case

CONTROLS = ("locality", "symmetry_old", "largest_city")  # criteria that ask whether an answer stays
RIVALS = ("occupations",)  # criteria that are there to compete, and have no success of their own
FORMS = ("says", "margin", "rank", "best")
STORED = 256  # prompts between two writes to the store
LOW_RANK = 16  # up to here edits share a batch, row by row; the weights of an edit above are exchanged once

Key = tuple[int, Encoded]  # an edit by its number, counted from 1 (0: none), and a word after its prompt
Row = tuple[int, tuple[int, ...]]  # an edit and the tokens of a prompt


class _Read(NamedTuple):
    """What is read for a word; `top` is the most probable token in the place of its first one."""

    logp: float
    says: bool
    rank: int
    top: int


@state.computes(grad=False)
def measure(
    lm: LM, cases: Sequence[Case], edits: Sequence[Edit], budget: int = 512, store: bool = True, progress: bool = False
) -> pd.DataFrame:
    """Return one row per case, criterion and query: `case` (its place), `item` of the request, `criterion`, `prompt`,
    `target`, `foil`, `failed` (why there is nothing after the edit, or ""), and, `_before` and `_after` the edit:

    `says`, whether every token of the target is the most probable one given those before it (the accuracy of Niu et al.
    2024); `logp`, the mean log-probability per token of the target, in nats; `margin`, the same minus that of the foil
    (nan without one); `rank` of the target's first token, 0 for the most probable. `kept`: whether the most probable
    token in that place is the same as before.

    Causal models read a target token by token, masked models at as many masks, all at once; a foil with another number
    of tokens has its own masks. An edit's `context` is put before the prompt as it is. Where an edit failed, or leaves
    probabilities that are not numbers, all that is after it is missing (nan, <NA>).

    `budget`: how many positions are run at once; `store` as in `kncore.attribute`. Raises ValueError for another number
    of edits than of cases, a query that the model cannot be asked, and a model whose probabilities are not numbers
    before any edit.
    """
    if len(cases) != len(edits):
        raise ValueError(f"{len(cases)} cases but {len(edits)} edits; give one edit per case")

    @cache
    def words(query: Query, context: str) -> list[Encoded]:
        query = replace(query, prompt=context + query.prompt)
        return [tokens.encode(lm, query, word) for word in (query.target, query.foil) if word]

    numbers: dict[int, int] = {}
    deltas: dict[int, Sequence[Delta]] = {0: ()}
    entries = []
    for i, (case, edit) in enumerate(zip(cases, edits, strict=True)):
        number = numbers.setdefault(id(edit), i + 1) if edit.deltas else 0
        deltas[number] = () if edit.failed else edit.deltas
        for criterion, queries in case.queries.items():
            for query in queries:
                before = [(0, word) for word in words(query, "")]
                after = [] if edit.failed else [(number, word) for word in words(query, edit.context)]
                entries.append((i, criterion, query, before, after))
    keys = dict.fromkeys(key for *_, before, after in entries for key in before + after)
    read = _read(lm, keys, deltas, budget, store, progress)

    rows = []
    for i, criterion, query, *keys in entries:
        failed = edits[i].failed
        before, after = ([read[key] for key in some] for some in keys)
        if None in before:
            raise ValueError(f"the probabilities of {lm.name} for {query.prompt!r} are not numbers; use a wider dtype")
        if None in after:
            failed, after = "after the edit the probabilities are not numbers", []
        kept = after[0].top == before[0].top if after else pd.NA
        fields = i, cases[i].request.item, criterion, query.prompt, query.target, query.foil, failed
        rows.append((*fields, *_columns(before), *_columns(after), kept))
    kinds = {"says": "boolean", "margin": float, "logp": float, "rank": "Int64"}
    columns = {"case": int} | dict.fromkeys(("item", "criterion", "prompt", "target", "foil", "failed"), str)
    columns |= {f"{name}_{when}": kind for when in ("before", "after") for name, kind in kinds.items()}
    columns["kept"] = "boolean"
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def _columns(found: Sequence[_Read]) -> tuple:
    """says, margin, logp and rank of what was read for target and foil."""
    if not found:
        return pd.NA, math.nan, math.nan, pd.NA
    margin = found[0].logp - found[1].logp if len(found) > 1 else math.nan
    return found[0].says, margin, found[0].logp, found[0].rank


def _read(
    lm: LM, keys: Collection[Key], deltas: Mapping[int, Sequence[Delta]], budget: int, store: bool, progress: bool
) -> dict[Key, _Read | None]:
    """Return what the model gives each word, from the store if there; None where that is not a number."""
    rows: dict[Row, list[Encoded]] = {}
    for number, word in keys:
        rows.setdefault((number, word.ids), []).append(word)
    high = {number for number, some in deltas.items() if sum(len(delta.neurons) for delta in some) > LOW_RANK}
    todo = sorted(rows, key=lambda row: (row[0] if row[0] in high else 0, len(row[1])))
    names = {number: [_named(delta) for delta in some] for number, some in deltas.items()}
    settings = [
        {"edit": names[row[0]], "ids": row[1], "words": [[word.position, word.target] for word in rows[row]]}
        for row in todo
    ]

    def compute(part: list[int]) -> list[Result]:
        found: dict[Key, _Read] = {}
        for whole, some in itertools.groupby((todo[i] for i in part), lambda row: row[0] if row[0] in high else 0):
            with edited(lm, *deltas[whole]) if whole else contextlib.nullcontext():  # 0: edits that go row by row
                for batch in _batches(list(some), budget):
                    each = [() if whole else deltas[number] for number, _ in batch]
                    found |= _run(lm, {row: rows[row] for row in batch}, each)
        words = [[found[todo[i][0], word] for word in rows[todo[i]]] for i in part]
        return [{"words": torch.tensor(some, dtype=torch.float64)} for some in words]

    results = stored(
        lm, (_run, edited), settings, compute, batch=STORED, store=store, progress="ask" if progress else ""
    )
    read: dict[Key, _Read | None] = {}
    for row, result in zip(todo, results, strict=True):
        for word, (logp, says, *whole) in zip(rows[row], result["words"].tolist(), strict=True):
            read[row[0], word] = None if math.isnan(logp) else _Read(logp, bool(says), *map(int, whole))
    return read


def _named(delta: Delta) -> list:
    """Return the block of a delta and the hash of its numbers."""
    numbers = (x.detach().cpu().contiguous() for x in (delta.neurons, delta.hidden))
    shown = [(str(x.dtype), list(x.shape), hashlib.sha256(x.view(torch.uint8).numpy()).hexdigest()) for x in numbers]
    return [delta.block, *shown]


def _batches(rows: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Return rows that rise in length, in lists of at most `budget` positions, and of one row at least."""
    part: list[Row] = []
    for row in rows:
        if part and (len(part) + 1) * len(row[1]) > budget:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


@torch.no_grad()
def _run(lm: LM, rows: Mapping[Row, Sequence[Encoded]], deltas: Sequence[Sequence[Delta]]) -> dict[Key, _Read]:
    """Return one batch: every prompt once, and the head only at the places that predict a token of a word.

    `logp` is nan where a probability is not a number.
    """
    entries = [(r, number, word) for r, ((number, _), words) in enumerate(rows.items()) for word in words]
    states, at = (_masks if lm.spec.masked else _tails)(lm, [(r, word) for r, _, word in entries], list(rows), deltas)
    sizes = [len(slots) for slots in at]
    at = torch.tensor([slot for slots in at for slot in slots], device=lm.device)
    wanted = torch.tensor([token for *_, word in entries for token in word.target], device=lm.device)
    logp = lm.readout(states, normed=True).float().log_softmax(-1)
    own, top, sound = logp[at, wanted], logp.argmax(-1)[at], logp.isfinite().all(-1)[at]
    first = torch.tensor(sizes, device=lm.device).cumsum(0) - torch.tensor(sizes, device=lm.device)
    ranks = (logp[at[first]] > own[first, None]).sum(1).tolist()
    parts = (x.cpu().split(sizes) for x in (own.double(), top == wanted, top, sound))
    return {
        (number, word): _Read(float(p.mean()) if bool(fine.all()) else math.nan, bool(hit.all()), rank, int(best[0]))
        for (_, number, word), rank, p, hit, best, fine in zip(entries, ranks, *parts, strict=True)
    }


def _rows(lm: LM, deltas: Sequence[Sequence[Delta]]) -> contextlib.AbstractContextManager:
    """Return a context in which each row of a batch runs with its own edit."""
    return edited_rows(lm, deltas) if any(deltas) else contextlib.nullcontext()


def _states(lm: LM, deltas: Sequence[Sequence[Delta]], **batch) -> Float[Tensor, "row token hidden"]:
    with _rows(lm, deltas):
        return lm.model.base_model(**batch).last_hidden_state


def _masks(
    lm: LM, entries: Sequence[tuple[int, Encoded]], rows: Sequence[Row], deltas: Sequence[Sequence[Delta]]
) -> tuple[Float[Tensor, "slot hidden"], list[list[int]]]:
    """States at the masks, and which of them predict the tokens of each word."""
    ids, lengths = tokens.pad(lm, [Encoded(ids, 0, ()) for _, ids in rows])
    real = torch.arange(ids.shape[1], device=lm.device) < lengths[:, None]
    states = _states(lm, deltas, input_ids=ids, attention_mask=real.long())
    slots: dict[tuple[int, int], int] = {}
    at = [[slots.setdefault((r, e.position + k), len(slots)) for k in range(len(e.target))] for r, e in entries]
    row, position = torch.tensor(list(slots), device=lm.device).T
    return states[row, position], at


def _tails(
    lm: LM, entries: Sequence[tuple[int, Encoded]], rows: Sequence[Row], deltas: Sequence[Sequence[Delta]]
) -> tuple[Float[Tensor, "slot hidden"], list[list[int]]]:
    """As `_masks` for causal models: the prompts' last states, then those of the words from the second token on."""
    from transformers import DynamicCache

    ids, real = _left(lm, [ids for _, ids in rows])
    past = DynamicCache()
    options = {"past_key_values": past, "use_cache": True}
    positions = (real.cumsum(1) - 1).clamp_min(0)
    states = _states(lm, deltas, input_ids=ids, attention_mask=real.long(), position_ids=positions, **options)[:, -1]
    long = [(r, word) for r, word in entries if len(word.target) > 1]
    if long:
        which = torch.tensor([r for r, _ in long], device=lm.device)
        past.batch_select_indices(which)
        tails, lengths = tokens.pad(lm, [Encoded(word.target[:-1], 0, ()) for _, word in long])
        seen = torch.cat([real[which], torch.ones_like(tails, dtype=torch.bool)], 1).long()
        positions = seen.cumsum(1)[:, ids.shape[1] :] - 1
        mine = [deltas[r] for r, _ in long]
        more = _states(lm, mine, input_ids=tails, attention_mask=seen, position_ids=positions, **options)
        states = torch.cat([states, more[torch.arange(tails.shape[1], device=lm.device) < lengths[:, None]]])
    free = itertools.count(len(rows))
    return states, [[r, *itertools.islice(free, len(word.target) - 1)] for r, word in entries]


def _left(lm: LM, prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "prompt token"], Bool[Tensor, "prompt token"]]:
    """Return token ids padded on the left, and which of them are real."""
    ids, lengths = tokens.pad(lm, [Encoded(tuple(prompt), 0, ()) for prompt in prompts])
    width = ids.shape[1]
    ids = torch.stack([row.roll(width - n) for row, n in zip(ids, lengths.tolist(), strict=True)])
    return ids, torch.arange(width, device=lm.device) >= width - lengths[:, None]


def success(table: pd.DataFrame, by: str = "says") -> pd.Series:
    """Return whether each row of `measure` is a success, <NA> where that cannot be told.

    Asked for the new fact: the model says the target after the edit. Asked for what is to stay (`CONTROLS`): it said
    the target before and says it still; <NA> where it did not say it before. To say is, by "says", that every token of
    the target is the most probable one; by "margin", that it is more probable per token than the foil (<NA> without
    one); by "rank", that its first token is the most probable one; by "best", that it is more probable per token than
    all other targets and foils that the case has for this prompt. Rows whose edit failed are <NA>. Raises ValueError
    for another `by`.
    """
    before, after = (_said(table, by, when) for when in ("before", "after"))
    return after.mask(table["criterion"].isin(CONTROLS) & ~before.fillna(False)).rename("success")


def _said(table: pd.DataFrame, by: str, when: str) -> pd.Series:
    if by not in FORMS:
        raise unknown("form of success", by, FORMS)
    if by == "says":
        return table[f"says_{when}"]
    if by == "rank":
        return (table[f"rank_{when}"] == 0).astype("boolean")
    margin = table[f"margin_{when}"]
    if by == "best":
        own = table[f"logp_{when}"]
        both = pd.concat([own, own - margin], axis=1).max(axis=1)
        most = both.groupby([table["case"], table["prompt"]]).transform("max")
        return ((own >= most) & ~(margin <= 0)).astype("boolean").mask(own.isna())
    return (margin > 0).astype("boolean").mask(margin.isna())


def summary(table: pd.DataFrame, by: str = "says") -> pd.DataFrame:
    """Return one row per criterion but `RIVALS`, in the order of the table. Means are over cases, which weigh alike.

    `cases` that can tell, `failed` cases whose edit did (they count in no other column); `before`, the share of
    questions that the model answered with the target before the edit; `after`, the share of successes (see `success`)
    with Wilson's interval from `low` to `high`; `margin_before`, `margin_after` in nats per token.
    """
    rows = []
    judgement = {"success": success(table, by), "said": _said(table, by, "before")}
    for criterion, part in table.assign(**judgement).groupby("criterion", sort=False):
        if criterion in RIVALS:
            continue
        whole = part[part["failed"] == ""]
        judged = whole[whole["success"].notna()]
        before = whole["said"].astype("Float64").groupby(whole["case"]).mean().mean()
        after = stats.Estimate(math.nan, math.nan, math.nan, 0)
        if len(judged):
            after = stats.share(judged["success"].tolist(), judged["case"].tolist())
        margins = (whole[f"margin_{when}"].groupby(whole["case"]).mean().mean() for when in ("before", "after"))
        failed = part.loc[part["failed"] != "", "case"].nunique()
        rows.append((criterion, after.n, failed, before, after.value, after.low, after.high, *margins))
    names = ["criterion", "cases", "failed", "before", "after", "low", "high", "margin_before", "margin_after"]
    return pd.DataFrame(rows, columns=names)


def share(table: pd.DataFrame, criterion: str, by: str = "says", lost: bool = False) -> stats.Estimate:
    """Return the share of successes of one criterion (see `success`), or of failures where it asks what is `lost`.

    With Wilson's interval; the units are items.
    """
    outcomes = _outcomes(table, criterion, by) ^ lost
    return stats.share(outcomes.tolist(), outcomes.index.tolist())


def item_shares(table: pd.DataFrame, criterion: str, by: str = "says") -> pd.Series:
    """Return the share of successes of one criterion for each item that can tell, sorted by item."""
    return _outcomes(table, criterion, by).groupby(level=0).mean()


def _outcomes(table: pd.DataFrame, criterion: str, by: str) -> pd.Series:
    """Return the successes of one criterion, indexed by item, without those that cannot be told."""
    mine = table["criterion"] == criterion
    return success(table, by)[mine].set_axis(table.loc[mine, "item"]).dropna().astype(bool)


def item_gains(table: pd.DataFrame) -> pd.DataFrame:
    """Return by how much the edit raised the mean margin, in nats per token, of each item (rows) and criterion.

    Items whose edit failed are left out.
    """
    whole = table[table["failed"] == ""]
    gain = whole["margin_after"] - whole["margin_before"]
    return gain.groupby([whole["item"], whole["criterion"]]).mean().unstack()


def item_changes(table: pd.DataFrame, criterion: str, by: str = "says") -> pd.Series:
    """Return the share of an item's questions whose answer was brought about by the edit: said after minus said before.

    From −1 to 1; `by` as in `success`. Items whose edit failed are left out.
    """
    mine = (table["criterion"] == criterion) & (table["failed"] == "")
    after, before = (_said(table, by, when)[mine].astype(float) for when in ("after", "before"))
    return (after - before).groupby(table["item"]).mean()


@state.computes(grad=False)
def generations(
    lm: LM, prompts: Sequence[str], edits: Sequence[Edit] | None = None, length: int = 40, seed: int | None = 0
) -> list[str]:
    """Return how the model goes on after each prompt under its edit (None: unedited), by `length` tokens.

    Sampled from `seed`, the same random numbers whatever the edits; with seed None the most probable token each time.
    Prompts are read as `tokens.read_prompt` does; special tokens are left out of what is given back. All rows are one
    batch. Raises ValueError for a masked model, no prompts or an empty one, another number of edits than of prompts,
    an edit that failed, a `length` below 1, and a prompt that is with it longer than the context.
    """
    prompts, length = checks.items(prompts, str, "prompts", 1), checks.whole(length, "length", 1)
    edits = [Edit()] * len(prompts) if edits is None else edits
    if len(edits) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(edits)} edits; give one edit per prompt")
    for edit in edits:
        if edit.failed:
            raise ValueError(f"there is no edit to go on under: {edit.failed}")
    if lm.spec.masked:
        raise ValueError(f"{lm.name} is a masked model and cannot go on with a text")
    ids = [tokens.read_prompt(lm, edit.context + prompt) for edit, prompt in zip(edits, prompts, strict=True)]
    for prompt, row in zip(prompts, ids, strict=True):
        tokens.check_length(lm, len(row) + length, f"prompt {prompt[:40]!r} with the {length} tokens after it")
    padded, real = _left(lm, ids)
    width = padded.shape[1]
    with _rows(lm, [edit.deltas for edit in edits]):
        more = generate(lm, padded, width + length, seed, real)[:, width:].tolist()

    def decode(some):
        return lm.tokenizer.decode(some, skip_special_tokens=True)

    return [decode(prompt + new)[len(decode(prompt)) :] for prompt, new in zip(ids, more, strict=True)]


def entropy(text: str | Sequence) -> float:
    """Return the fluency of a text (Meng et al. 2022): the mean entropy of its bigrams and trigrams, in bits, with
    weights 2/3 and 4/3; low where it repeats itself.

    A text is split at white space; a sequence of tokens is taken as it is. nan for fewer than three.
    """
    words = text.split() if isinstance(text, str) else list(text)
    if len(words) < 3:
        return math.nan
    sizes = {n: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values() for n in (2, 3)}
    two, three = (-sum(c / sum(some) * math.log2(c / sum(some)) for c in some) for some in sizes.values())
    return (2 / 3 * two + 4 / 3 * three) / 2
