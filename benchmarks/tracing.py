"""Time causal tracing: one run of the whole model for each cell, and replay.

Prints a table in Markdown. A run of the whole model is one batch, as in the code of Meng et al. (2022): the clean run
in the first row, from which states are copied, and the samples in the others. Both ways leave out the tokens before the
subject, use the same noise and compute the same numbers; "apart" is the largest difference.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from unittest import mock

import torch
from report import parser, show, table, timed

import kncore
from kncore import arch, tokens, tracing
from kncore.query import Query
from kncore.tracing import Restore

# Prompts of 5, 10 and 15 tokens for the default model. The earlier the subject, the more there is to run again.
QUERIES = (
    Query("New Zealand's capital is", "Wellington", "New Zealand", "Oslo"),
    Query("The capital of the United Kingdom is a city called", "London", "the United Kingdom", "Madrid"),
    Query(
        "The Great Barrier Reef, as every child there learns at school, lies off",
        "Australia",
        "Great Barrier Reef",
        "Iceland",
    ),
    Query("As far as I know, the capital of New Zealand is a city called", "Wellington", "New Zealand", "Oslo"),
)
RESTORES = {"residual stream, one block": Restore(), "MLP, ten blocks": Restore("mlp", 10)}


def whole(lm, query: Query, restore: Restore, noise: torch.Tensor, stride: int) -> torch.Tensor:
    """Readings `[token, block, 2]` from the subject on, a run of the whole model a cell."""
    encoded, (first, last) = tokens.encode(lm, query), tokens.span(lm, query)
    ends = [encoded.target[0], tokens.encode(lm, query, query.foil).target[0]]
    where, n = lm.spec.sites[restore.site], len(lm.blocks)
    ids = torch.tensor([encoded.ids] * (1 + len(noise)), device=lm.device)

    def noised(module, args, out):
        out = out.clone()
        out[1:, first : last + 1] += noise
        return out

    def put(x, t: int):
        x = x.clone()
        x[1:, t] = x[0, t]
        return x

    out = torch.empty(len(encoded.ids) - first, len(range(0, n, stride)), 2)
    cells = itertools.product(range(first, len(encoded.ids)), enumerate(range(0, n, stride)))
    with lm.model.get_input_embeddings().register_forward_hook(noised):
        for t, (i, block) in cells:
            window = range(max(0, block - restore.window // 2), min(n, block + (restore.window + 1) // 2))
            with contextlib.ExitStack() as hooks:
                for depth in window:
                    hooks.enter_context(arch.at_site(lm.blocks[depth], where, partial(put, t=t)))
                got = lm.model(ids).logits[1:, encoded.position].float()
            target, foil = got[:, ends].T
            out[t - first, i, 0] = got.softmax(-1)[:, ends[0]].mean()
            out[t - first, i, 1] = (target - foil).mean()
    return out


@torch.no_grad()
def main() -> None:
    options = {
        "model": ("smollm2-135m", "as for kncore.load"),
        "stride": (1, "every how many blocks a cell lies"),
        "samples": (3, "of noise, a cell"),
    }
    options = parser(__doc__, **options).parse_args()
    lm = kncore.load(options.model)
    settings = {"samples": options.samples, "store": False}
    tracing.trace(lm, QUERIES[:1], stride=len(lm.blocks), **settings)  # warm
    rows = []
    for label, restore in RESTORES.items():
        for query in QUERIES:
            with mock.patch.object(tracing, "_noised", wraps=tracing._noised) as corrupted:
                fast, (got,) = timed(tracing.trace, lm, [query], [restore], stride=options.stride, **settings)
            slow, want = timed(whole, lm, query, restore, corrupted.call_args.args[2], options.stride)
            first, last = got.subject
            apart = (got.restored[0, first:] - want).abs().amax((0, 1)).tolist()
            cells = [f"{len(got.tokens)} ({first + 1}–{last + 1})", want[..., 0].numel()]
            times = [f"{slow:.1f}", f"{fast:.2f}", f"{slow / fast:.1f}"]
            rows.append([label, *cells, *times, f"{apart[0]:.0e}, {apart[1]:.0e}"])
    columns = ["restored", "tokens (subject)", "cells", "a run a cell, s", "replay, s", "ratio", "apart: P, log-odds"]
    about = f"*{lm.name}*, {torch.get_num_threads()} threads; {options.samples} samples of noise a cell."
    show(f"{about}\n\n{table(columns, rows)}", options.out)


if __name__ == "__main__":
    main()
