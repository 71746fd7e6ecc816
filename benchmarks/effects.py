"""Time edits of many prompts: one run of the whole model for each trial, one for each edit, and replay.

    python benchmarks/effects.py [--model NAME] [--trials N] [--out FILE]

Prints a table in Markdown. All three compute the same log-probabilities; the largest difference is in the table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import kncore
from kncore import effects, predictions, tasks, tokens
from kncore.effects import Trial


def whole(lm, held, trials, together: bool) -> torch.Tensor:
    """Log-probability of each trial's target, hooks around the whole model; prompts of one edit `together` or not."""
    out = torch.empty(len(trials))
    groups: dict = {}
    for i, trial in enumerate(trials):
        groups.setdefault((id(trial.neurons), trial.factor) if together else i, []).append(i)
    for members in groups.values():
        first = trials[members[0]]
        queries = [held.queries[trials[i].prompt] for i in members]
        with kncore.enhance(lm, first.neurons, first.factor):
            logp = predictions.log_probabilities(lm, queries)
        for i, query, row in zip(members, queries, logp, strict=True):
            out[i] = row[tokens.encode(lm, query).target[0]]
    return out


def timed(work):
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--out", type=Path, help="file for the table; without it the table is printed")
    options = parser.parse_args()
    lm = kncore.load(options.model)
    queries = tasks.facts("capital", n=options.trials // 5)
    seconds, held = timed(lambda: effects.hold(lm, queries))
    rng = np.random.default_rng(0)

    def some(count: int, lowest: int):
        blocks = rng.integers(lowest, len(lm.blocks), count)
        return sorted({(int(b), int(i)) for b, i in zip(blocks, rng.integers(0, lm.n_neurons, count), strict=True)})

    high, one, many = 2 * len(lm.blocks) // 3, some(3, 0), some(1000, 0)
    everyone = range(len(queries))
    cases = {
        "3 neurons, another set for each prompt, upper third": [Trial(p, some(3, high)) for p in everyone],
        "3 neurons, another set for each prompt, any block": [Trial(p, some(3, 0)) for p in everyone],
        "3 neurons, one set for all prompts, any block": [Trial(p, one) for p in everyone],
        "1,000 neurons, one set for all prompts": [Trial(p, many) for p in everyone],
    }
    lines = [
        f"*{lm.name}*, {torch.get_num_threads()} threads; {len(queries)} prompts, captured once in {seconds:.1f} s.",
        "",
        "| edit | trials | a run a trial, s | a run an edit, s | replay, s | ratios | largest difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, trials in cases.items():
        whole(lm, held, trials[:10], False), whole(lm, held, trials[:10], True), effects.read(held, trials[:10])
        fast, (logp, _) = timed(lambda trials=trials: effects.read(held, trials))
        slow, alone = timed(lambda trials=trials: whole(lm, held, trials, False))
        batched, together = timed(lambda trials=trials: whole(lm, held, trials, True))
        apart = max((alone - logp[:, 0]).abs().max(), (together - logp[:, 0]).abs().max())
        ratios = f"{slow / fast:.1f}, {batched / fast:.1f}"
        lines.append(f"| {label} | {len(trials)} | {slow:.1f} | {batched:.1f} | {fast:.2f} | {ratios} | {apart:.0e} |")
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
