"""Time edits of many prompts: one run of the whole model for each trial, one for each edit, and replay.

Prints a table in Markdown. All three compute the same log-probabilities; the largest difference is in the table.
"""

from __future__ import annotations

import numpy as np
import torch
from report import parser, show, table, timed

import kncore
from kncore import ablation, predictions, tokens
from kncore.ablation import Ablation
from knpaper import tasks

COLUMNS = ("edit", "trials", "a run a trial, s", "a run an edit, s", "replay, s", "ratios", "largest difference")


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


def main() -> None:
    options = parser(__doc__, model=("smollm2-135m", "as for kncore.load"), trials=(120, "of each edit")).parse_args()
    lm = kncore.load(options.model)
    queries = tasks.facts("capital", n=options.trials // 5)
    seconds, held = timed(ablation.capture_prompts, lm, queries)
    rng = np.random.default_rng(0)

    def some(count: int, lowest: int):
        blocks = rng.integers(lowest, len(lm.blocks), count)
        return sorted({(int(b), int(i)) for b, i in zip(blocks, rng.integers(0, lm.n_neurons, count), strict=True)})

    high, few, many = 2 * len(lm.blocks) // 3, some(3, 0), some(1000, 0)
    everyone = range(len(queries))
    cases = {
        "3 neurons, another set for each prompt, upper third": [Ablation(p, some(3, high)) for p in everyone],
        "3 neurons, another set for each prompt, any block": [Ablation(p, some(3, 0)) for p in everyone],
        "3 neurons, one set for all prompts, any block": [Ablation(p, few) for p in everyone],
        "1,000 neurons, one set for all prompts": [Ablation(p, many) for p in everyone],
    }
    rows = []
    for label, trials in cases.items():
        whole(lm, held, trials[:10], False), whole(lm, held, trials[:10], True), ablation.read(held, trials[:10])
        fast, (logp, _) = timed(ablation.read, held, trials)
        slow, alone = timed(whole, lm, held, trials, False)
        batched, together = timed(whole, lm, held, trials, True)
        apart = max((alone - logp[:, 0]).abs().max(), (together - logp[:, 0]).abs().max())
        times = [f"{slow:.1f}", f"{batched:.1f}", f"{fast:.2f}", f"{slow / fast:.1f}, {batched / fast:.1f}"]
        rows.append([label, len(trials), *times, f"{apart:.0e}"])
    about = f"{torch.get_num_threads()} threads; {len(queries)} prompts, captured once in {seconds:.1f} s."
    show(f"*{lm.name}*, {about}\n\n{table(COLUMNS, rows)}", options.out)


if __name__ == "__main__":
    main()
