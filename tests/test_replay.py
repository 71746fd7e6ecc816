"""Replay against the truth: a full forward pass with a hook that makes the same change."""

import naive
import pytest
import tiny
import torch
import whole
from hypothesis import given, settings
from hypothesis import strategies as st

from kncore.query import Query
from kncore.replay import Change, capture, later, replay, states
from kncore.tokens import encode

PROMPTS = ["the capital of", "Anna saw these red", "the capital of the cats is in", "a", "these , the cats . Anna saw"]


def encoded(lm, prompts=PROMPTS):
    if lm.spec.masked:
        return [encode(lm, Query(f"{prompt} [MASK] is red", "cats")) for prompt in prompts]
    return [encode(lm, Query(prompt, "cats")) for prompt in prompts]


@pytest.mark.parametrize("site", ["neuron", "published", "mlp", "attention", "residual"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_replay_equals_a_full_pass_with_a_hook(family, site):
    lm = tiny.lm(family)
    batch = encoded(lm)
    captured = capture(lm, batch, sites=(site,))
    torch.manual_seed(1)
    changes = []
    for block, state in enumerate(captured.sites[site]):
        prompts = torch.randint(len(batch), (7,))
        changes.append(Change(block, prompts, state[prompts] * torch.randn(7, 1) + torch.randn(7, 1), site))
    got = replay(captured, changes)
    row = 0
    for change in changes:
        for prompt, value in zip(change.prompts.tolist(), change.values, strict=True):
            with torch.no_grad():
                want, _ = naive.forward(lm, batch[prompt], change.block, site, lambda _, v=value: v)
            torch.testing.assert_close(got[row], want, atol=2e-5, rtol=1e-4)
            row += 1
    assert row == len(got)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_capture_reads_what_a_full_pass_has(family):
    lm = tiny.lm(family)
    batch = encoded(lm)
    together = capture(lm, batch)
    for i, one in enumerate(batch):
        alone = capture(lm, [one])
        logits, _ = naive.forward(lm, one, 0, "neuron")
        torch.testing.assert_close(together.logits[i], logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(alone.logits[0], logits, atol=2e-5, rtol=1e-4)
        for block in range(len(lm.blocks)):
            _, state = naive.forward(lm, one, block, "neuron")
            torch.testing.assert_close(together.sites["neuron"][block][i], state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_rows_may_start_before_the_target(family):
    lm = tiny.lm(family)
    batch = encoded(lm)
    short, long = capture(lm, batch), capture(lm, batch, start=[max(0, e.position - 2) for e in batch])
    rows = torch.arange(len(batch))
    for block, state in enumerate(short.sites["neuron"]):
        change = [Change(block, rows, -state)]
        torch.testing.assert_close(replay(long, change), replay(short, change), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_later_rows_give_what_a_capture_from_there_gives(family):
    """Prompts that begin alike and end at different tokens, so that some rows are padded."""
    lm = tiny.lm(family)
    batch = encoded(lm, ["the capital of the cats is in", "Anna saw these red", "the capital of"])
    early = capture(lm, batch, start=[1] * len(batch))
    rows = torch.arange(len(batch))
    for start in (1, 2):
        moved, fresh = later(early, start), capture(lm, batch, start=[start] * len(batch))
        for block, state in enumerate(fresh.sites["neuron"]):
            change = [Change(block, rows, -state)]
            torch.testing.assert_close(replay(moved, change), replay(fresh, change), atol=2e-5, rtol=1e-4)
    if not lm.spec.masked:
        for start in (0, 99):
            with pytest.raises(ValueError, match=f"begin at .* cannot all begin at {start}"):
                later(early, start)
        with pytest.raises(ValueError, match=r"begin at \[1, 2, 1\] cannot all begin at 2"):
            later(capture(lm, batch, start=[1, 2, 1]), 2)


def test_rows_must_start_at_or_before_the_target():
    lm = tiny.lm("gpt2")
    with pytest.raises(ValueError, match="at or before"):
        capture(lm, encoded(lm, PROMPTS[:1]), start=[5])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 27))
def test_rows_in_parts_keep_their_order_and_the_budget(budget, n):
    captured = capture(LLAMA, encoded(LLAMA, PROMPTS[:2]))
    parts = list(captured.parts(list(range(n)), budget))  # rows of one position
    assert all(0 < len(part) <= budget for part in parts)
    assert [row for part in parts for row in part] == list(range(n))


def test_the_model_is_left_as_it_was_also_after_an_error():
    lm = tiny.lm("llama")
    captured = capture(lm, encoded(lm))
    assert not lm.is_modified
    with pytest.raises(ValueError, match="prompts that are not captured; those are 0 to 4"):
        replay(captured, [Change(0, torch.tensor([99]), captured.sites["neuron"][0][:1])])
    wrong = Change(1, torch.tensor([0]), torch.zeros(1, 5), "mlp")
    with pytest.raises(ValueError, match="site 'mlp' has width 16, got 5"):
        replay(captured, [wrong])
    assert not lm.is_modified


def test_bad_changes_are_refused():
    lm = tiny.lm("llama")
    captured = capture(lm, encoded(lm))
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="width 24, got 5"):
        replay(captured, [Change(0, one, torch.zeros(1, 5))])
    with pytest.raises(ValueError, match="rise in block"):
        replay(captured, [Change(1, one, torch.zeros(1, 24)), Change(0, one, torch.zeros(1, 24))])
    with pytest.raises(ValueError, match="no changes"):
        replay(captured, [])
    with pytest.raises(ValueError, match="unknown site 'head'"):
        capture(lm, encoded(lm), sites=("head",))


def full(lm, one, block, at, added):
    """States that leave the last block, with `added` put on what the MLP of a block gives at one token."""
    seen, blocks = [], lm.model.get_submodule(whole.PLACES[lm.spec.family][0])
    hook = blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        with torch.no_grad():
            logits, _, value = whole.run(lm, whole.Asked(list(one.ids), at, [], []), block, added)
    finally:
        hook.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return out[0] if out.dim() == 3 else out, logits, value


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_change_may_be_at_any_position_of_its_row(family):
    """States at every position from the start of the row on, and the logits at the target, equal a full pass."""
    lm = tiny.lm(family)
    batch = encoded(lm)
    begin = [0 if lm.spec.masked else max(0, one.position - 3) for one in batch]
    captured = capture(lm, batch, ("mlp",), start=begin)
    torch.manual_seed(2)
    changes, wanted = [], []
    for block in range(3):
        prompts = torch.randint(len(batch), (6,))
        at = [begin[i] + int(torch.randint(len(batch[i].ids) - begin[i], (1,))) for i in prompts.tolist()]
        added = torch.randn(6, 16)
        runs = [full(lm, batch[i], block, a, x) for i, a, x in zip(prompts.tolist(), at, added, strict=True)]
        values = torch.stack([value for *_, value in runs]) + added
        changes.append(Change(block, prompts, values, "mlp", torch.tensor(at)))
        wanted += [(i, *run[:2]) for i, run in zip(prompts.tolist(), runs, strict=True)]
    rows, logits = states(captured, changes), replay(captured, changes)
    assert len(rows) == len(logits) == len(wanted) == 18
    for got, at_target, (i, want, all_logits) in zip(rows, logits, wanted, strict=True):
        n = len(batch[i].ids) - begin[i]
        torch.testing.assert_close(got[:n], want[begin[i] :], atol=5e-5, rtol=1e-3)
        torch.testing.assert_close(at_target, all_logits[batch[i].position], atol=5e-5, rtol=1e-3)


def test_a_position_that_rows_do_not_carry_is_refused():
    batch = encoded(LLAMA, PROMPTS[:1])
    captured = capture(LLAMA, batch, ("mlp",), start=[1])
    for at in (0, 3, -1):
        with pytest.raises(ValueError, match="position that rows do not carry; capture from there"):
            states(captured, [Change(0, torch.tensor([0]), torch.zeros(1, 16), "mlp", torch.tensor([at]))])


def test_states_are_kept_where_at_says():
    for family in ("gpt2", "bert"):
        lm = tiny.lm(family)
        batch = encoded(lm)
        captured = capture(lm, batch, ("neuron", "mlp"), at=[0] * len(batch))
        for i, one in enumerate(batch):
            for block in range(3):
                with torch.no_grad():
                    _, key, value = whole.run(lm, whole.Asked(list(one.ids), 0, [], []), block)
                torch.testing.assert_close(captured.sites["neuron"][block][i], key, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(captured.sites["mlp"][block][i], value, atol=1e-5, rtol=1e-4)


LLAMA = tiny.lm("llama")
