"""Long sweeps: memory, order and batches over many attributions, and many edits stacked and undone.

Prints a table in Markdown. Nothing is looked up or stored.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import random
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from report import most_memory, parser, show, table

import kncore
from kncore.interventions import Delta
from kncore.models import LM
from kncore.query import Query
from knpaper import grammar, tasks

BATCH = 50
RELATIONS = ("birthplace", "capital", "field_of_work", "native_language", "occupation")  # in everyone's vocabulary


class Long(NamedTuple):
    """`memory` of the process in MiB after each part of the work; `apart`, what should be 0 or nearly."""

    memory: list[float]
    apart: float


def memory() -> float:
    """MiB that the process holds now (where the system does not tell: the most that it held)."""
    gc.collect()
    # What is freed may stay with the allocator: up to some hundred MiB, more or less from one moment to the next.
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back:
        give_back(0)
    now = Path("/proc/self/statm")
    if now.is_file():
        return int(now.read_text().split()[1]) * resource.getpagesize() / 2**20
    return most_memory() * 2**10


def prompts(lm: LM, n: int) -> list[Query]:
    """`n` of the project's own queries: facts, then agreement, in an order of their own."""
    form = "masked" if lm.spec.masked else "causal"
    pool = [query for name in RELATIONS for query in tasks.facts(name)]
    pool += [query for name in grammar.phenomena() for query in grammar.minimal_pairs(name, form=form)]
    return random.Random(0).sample(list({(q.prompt, q.target): q for q in pool}.values()), n)


def attributions(lm: LM, queries: Sequence[Query], parts: int = 5, again: int = 60) -> Long:
    """Attribute all queries, batch after batch. `apart`: the largest difference of a score, as a share of its prompt's
    largest, to that of the same prompt in another order and other batches, over the last `again` prompts."""
    held, last = [], []
    for part in range(parts):
        mine = queries[part * len(queries) // parts : (part + 1) * len(queries) // parts]
        for i in range(0, len(mine), BATCH):
            last.append(kncore.attribute(lm, mine[i : i + BATCH], store=False).scores)
            last = last[-(-(-again // BATCH) + 1) :]
        held.append(memory())
    scores = torch.cat(last)[-again:]
    order = random.Random(1).sample(range(len(scores)), len(scores))
    shuffled = kncore.attribute(lm, [queries[-len(scores) :][i] for i in order], budget=97, store=False).scores
    apart, largest = (x.abs().amax((1, 2)) for x in (shuffled - scores[order], scores[order]))
    return Long(held, float((apart / largest).max()))


def digest(lm: LM) -> str:
    """A hash of every weight, bit by bit."""
    whole = hashlib.sha256()
    for name, value in lm.model.state_dict().items():
        whole.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def stacked(lm: LM, query: Query, n: int, rounds: int = 3) -> Long:
    """Put `n` edits of weights and neurons on one another, undo them, and that `rounds` times; then `apart` counts the
    levels at which the weights were not, on the way down, what they had been on the way up, bit for bit."""
    rng, width = torch.Generator().manual_seed(0), lm.model.config.hidden_size
    held, wrong = [], 0
    for _ in range(rounds):
        seen = [digest(lm)]
        with contextlib.ExitStack() as undo:
            levels = []
            for i in range(n):
                level = contextlib.ExitStack()
                reads, writes = torch.randn(1, lm.n_neurons, generator=rng), torch.randn(1, width, generator=rng)
                level.enter_context(kncore.edited(lm, Delta(i % len(lm.blocks), reads, writes / 100)))
                level.enter_context(kncore.enhance(lm, [(i % len(lm.blocks), i % lm.n_neurons)], 1.5))
                levels.append(undo.enter_context(level))
                seen.append(digest(lm))
            kncore.predict(lm, [query])
            for level in reversed(levels):
                wrong += digest(lm) != seen.pop()
                level.close()
        wrong += digest(lm) != seen.pop() or lm.is_modified
        held.append(memory())
    return Long(held, wrong)


def main() -> None:
    options = {
        "model": ("controlled-gpt2", "as for kncore.load"),
        "prompts": (1000, "to attribute"),
        "edits": (200, "on one another"),
    }
    args = parser(__doc__, **options).parse_args()
    lm = kncore.load(args.model)
    queries = prompts(lm, args.prompts)
    before, said = digest(lm), kncore.predict(lm, queries[:50])
    swept = attributions(lm, queries)
    piled = stacked(lm, queries[0], args.edits)
    if digest(lm) != before or not kncore.predict(lm, queries[:50]).equals(said):
        raise SystemExit("the model is not what it was")
    rows = [
        [what, ", ".join(f"{m:.0f}" for m in memory), f"{memory[-1] - memory[0]:+.0f}", apart]
        for what, memory, apart in (
            (f"{args.prompts:,} prompts attributed", swept.memory, f"{swept.apart:.0e}"),
            (
                f"{args.edits} edits stacked and undone, {len(piled.memory)} times",
                piled.memory,
                f"{piled.apart} levels",
            ),
        )
    ]
    text = f"""\
{lm.name}, float32, {torch.get_num_threads()} thread(s). Afterwards every weight had the bits that it had before, and
the model said the same.

{table(["work", "memory on the way, MiB", "growth", "apart"], rows, left=2)}"""
    show(text, args.out)


if __name__ == "__main__":
    main()
