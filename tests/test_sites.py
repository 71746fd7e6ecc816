"""Shares of what a restored state brings back, against traces written by hand and a traced tiny model."""

import pandas as pd
import pytest
import tiny
import torch

from kncore import tracing
from kncore.query import Query
from kncore.tokens import encode, span
from kncore.tracing import Restore, Trace
from knpaper import sites


def written() -> pd.DataFrame:
    """Two prompts of four tokens traced in blocks 0, 2 and 4 of five, by hand: 4 and 2 nats lost."""
    rows = []
    for i, lost in enumerate((4.0, 2.0)):
        restored = torch.zeros(2, 4, 3, 2)
        restored[0, 1, :, 1] = torch.tensor([1.0, 2.0, 0.0])
        restored[1, 1, :, 1] = torch.tensor([0.0, 1.0, 2.0])
        restored[0, 3, :, 1] = torch.tensor([0.0, 0.0, 4.0]) * (i + 1)
        ends = torch.tensor([0.5, lost]), torch.tensor([0.1, 0.0])
        trace = Trace(Query("a b c d", "e"), tuple("abcd"), (0, 1), (0, 2, 4), *ends, restored)
        rows.append({"item": str(i), "lost": lost, "subject": 1, "end": 3, "trace": trace})
    return pd.DataFrame(rows)


def test_share_divides_effects_by_what_was_lost():
    assert sites.share(written(), 0, "subject").tolist() == [[0.25, 0.5, 0.0], [0.5, 1.0, 0.0]]
    assert sites.share(written(), 0, "end").tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 4.0]]


def test_curve_is_the_mean_over_prompts_in_each_traced_block():
    found = sites.curve(written(), 0, "subject")
    assert {block: estimate.value for block, estimate in found.items()} == {0: 0.375, 2: 0.75, 4: 0.0}


def test_advantage_is_the_mean_difference_over_the_blocks_asked_for():
    # Blocks 0 and 2: (0.25 - 0 + 0.5 - 0.25) / 2 of the first prompt, twice that of the second.
    assert sites.advantage(written(), 0, 1, "subject", range(3)).tolist() == [0.25, 0.5]
    assert sites.advantage(written(), 1, 0, "subject", range(3, 5)).tolist() == [0.5, 1.0]


def test_collect_traces_and_leaves_out_what_loses_little():
    lm = tiny.lm("gpt2")
    queries = [
        Query(f"Anna saw the {subject} in", target, subject=subject, foil="red", task=task, item=subject)
        for subject, target, task in (("red cat", "Paris", "capital"), ("a book", "Spain", "subject_verb"))
    ]
    options = dict(samples=2, seed=1, store=False)
    traces = tracing.trace(lm, queries, [Restore()], where="ends", **options)
    lost = [float(trace.clean[1] - trace.corrupted[1]) for trace in traces]
    rows = sites.collect(lm, queries, [Restore()], least=min(lost) - 1, **options)
    assert rows.kind.tolist() == ["facts", "agreement"]
    assert rows.lost.tolist() == pytest.approx(lost)
    assert rows.subject.tolist() == [span(lm, query)[1] for query in queries]
    assert rows.end.tolist() == [encode(lm, query).position for query in queries]
    fewer = sites.collect(lm, queries, [Restore()], least=min(lost), **options)
    assert fewer["item"].tolist() == [queries[lost.index(max(lost))].item] and fewer.index.tolist() == [0]


def test_means_and_advantages_of_no_prompts_say_nothing():
    nothing = written()[:0]
    values = sites.advantage(nothing, 0, 1, "subject", range(3))
    assert len(values) == 0
    assert tuple(sites.mean(values, nothing.item)) == (0.0, -float("inf"), float("inf"), 0)
    some = sites.advantage(written(), 0, 1, "subject", range(3))
    assert sites.mean(some, written().item).value == 0.375


@pytest.mark.parametrize(
    "task, kind",
    [("capital", "facts"), ("subject_verb", "agreement"), ("subject_verb_distractor", "distractor")],
)
def test_kinds_part_sentences_with_a_distractor_from_others(task, kind):
    assert sites.kind_of(task) == kind
