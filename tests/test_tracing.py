"""Tracing against the definition: the whole model run once for every cell, with hooks that put states back."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import MODELS, ask, on_all_families

from kncore import tokens, tracing
from kncore.interventions import Delta, edited
from kncore.query import Query
from kncore.store import cache
from kncore.tracing import Restore, trace

WEIGHTS = {family: [p.clone() for p in lm.model.parameters()] for family, lm in MODELS.items()}
SITES = ("residual", "mlp", "attention")
RESTORES = (
    Restore(),
    Restore("mlp", 2),
    Restore("attention", 3),
    Restore(sever="mlp"),
    Restore("residual", 2, "attention"),
    Restore("mlp", 1, "attention"),
)
close = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    """Bit for bit, without hooks, after every test, also after those that raise."""
    yield
    for family, lm in MODELS.items():
        assert not lm.is_modified
        assert all(torch.equal(p, was) for p, was in zip(lm.model.parameters(), WEIGHTS[family], strict=True))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def first(lm, query: Query) -> int:
    """Token of the subject's first word, counted by hand: the tiny tokenizer's tokens are words."""
    return len(query.prompt[: query.prompt.index(query.subject)].split()) + lm.spec.masked


def run(lm, ids, at, added=None, start=0, put=None):
    """Logits at token `at` of the whole model run on rows of ids, and every state `[row, token, hidden]` it had.

    `added` goes to the embeddings from token `start` on; `put[site, block]` maps tokens to states that replace the
    model's own, wherever the forward pass comes to them.
    """
    seen, put, handles = {}, put or {}, []

    def noised(module, args, out):
        out = out.clone()
        out[:, start : start + added.shape[1]] += added
        return out

    def swapped(x, site, block):
        x = x.clone()
        for token, value in put.get((site, block), {}).items():
            x[:, token] = value
        seen[site, block] = x
        return x

    def before(site, block):
        return lambda module, args: (swapped(args[0], site, block), *args[1:])

    def after(site, block):
        return lambda module, args, out: swapped(out, site, block)

    if added is not None:
        handles.append(lm.model.get_input_embeddings().register_forward_hook(noised))
    for number, block in enumerate(lm.blocks):
        handles.append(block.register_forward_pre_hook(before("residual", number)))
        for site in ("mlp", "attention"):
            module = block.get_submodule(lm.spec.sites[site].path)
            handles.append(module.register_forward_hook(after(site, number)))
    try:
        with torch.no_grad():
            logits = lm.model(torch.tensor(ids)).logits[:, at]
    finally:
        for handle in handles:
            handle.remove()
    return logits.double(), seen


def told(logits, lm, query):
    """Probability of the target and log-odds against the foil, the mean over rows."""
    table = lm.tokenizer.get_vocab()
    target, foil = logits[:, table[query.target]], logits[:, table[query.foil]]
    return torch.stack([(target - logits.logsumexp(-1)).exp(), target - foil], 1).mean(0)


def cell(restore, clean, wrong, token, block, n_blocks):
    """What the definition of a restore puts where."""
    low = max(0, block - restore.window // 2)
    high = min(n_blocks, block + (restore.window + 1) // 2)
    put = {(restore.site, depth): {token: clean[restore.site, depth][:, token]} for depth in range(low, high)}
    if restore.sever:
        put |= {(restore.sever, d): {token: wrong[restore.sever, d][:, token]} for d in range(low, n_blocks)}
    return put


def naive(lm, query, restores, added=None, other=None):
    """Clean, corrupted and restored readings, one run of the whole model a cell."""
    one = tokens.encode(lm, query)
    rows = [list(one.ids)] * len(added) if other is None else [list(tokens.encode(lm, other, query.target).ids)]
    begin, n = first(lm, query), len(lm.blocks)
    right, clean = run(lm, [list(one.ids)], one.position)
    broken, wrong = run(lm, rows, one.position, added, begin)
    restored = [
        [
            [
                told(run(lm, rows, one.position, added, begin, cell(r, clean, wrong, t, b, n))[0], lm, query)
                for b in range(n)
            ]
            for t in range(len(one.ids))
        ]
        for r in restores
    ]
    table = torch.stack([torch.stack([torch.stack(row) for row in part]) for part in restored])
    return told(right, lm, query), told(broken, lm, query), table


@pytest.fixture
def noise(monkeypatch):
    """The noise of every corruption since the test began."""
    drawn, own = [], tracing._noised

    def noised(lm, span, added):
        drawn.append(added)
        return own(lm, span, added)

    monkeypatch.setattr(tracing, "_noised", noised)
    return drawn


def same(one, two):
    return torch.equal(one.restored, two.restored) and torch.equal(one.corrupted, two.corrupted)


# Numbers


@on_all_families
def test_a_noised_trace_is_one_run_of_the_whole_model_a_cell(family, noise):
    lm = MODELS[family]
    query = ask(lm)
    (got,) = trace(lm, [query], RESTORES, samples=2)
    clean, corrupted, restored = naive(lm, query, RESTORES, noise[0])
    torch.testing.assert_close(got.clean.double(), clean, **close)
    torch.testing.assert_close(got.corrupted.double(), corrupted, **close)
    torch.testing.assert_close(got.restored.double(), restored, **close)
    assert torch.equal(got.effects, got.restored - got.corrupted)
    begin = first(lm, query)
    assert got.subject == (begin, begin + 1) and got.tokens[begin : begin + 2] == ("France", "Spain")
    assert len(got.tokens) == restored.shape[1] and got.blocks == (0, 1, 2)
    # The noise did something, and so did each restore: the agreement is not one of zeros.
    assert (clean - corrupted).abs().max() > 1e-2
    assert (restored - corrupted).abs().flatten(1).amax(1).min() > 1e-2


@on_all_families
def test_a_replaced_trace_is_one_run_of_the_whole_model_a_cell(family):
    lm = MODELS[family]
    query, other = ask(lm), ask(lm, "red cats", "Madrid", "Paris")
    (got,) = trace(lm, [query], RESTORES, others=[other])
    clean, corrupted, restored = naive(lm, query, RESTORES, other=other)
    torch.testing.assert_close(got.clean.double(), clean, **close)
    torch.testing.assert_close(got.corrupted.double(), corrupted, **close)
    torch.testing.assert_close(got.restored.double(), restored, **close)
    # The corrupted run is the other prompt's own.
    encoded = tokens.encode(lm, other, "Paris")
    with torch.no_grad():
        logits = lm.model(torch.tensor([encoded.ids])).logits[:, encoded.position].double()
    torch.testing.assert_close(got.corrupted.double(), told(logits, lm, query), **close)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["gpt2", "mistral", "bert"]),
    st.sampled_from(SITES),
    st.integers(1, 3),
    st.sampled_from(["", *SITES[1:]]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_any_restore_stride_and_budget_agrees_with_whole_runs(family, site, window, sever, stride, budget, seed):
    lm = MODELS[family]
    restore = Restore(site, window, sever if sever != site else "")
    query, other = ask(lm, text="{} , the book is in"), ask(lm, "these cats", text="{} , the book is in")
    (got,) = trace(lm, [query], [restore], others=[other], stride=stride, budget=budget, seed=seed, store=False)
    _, _, restored = naive(lm, query, [restore], other=other)
    assert got.blocks == tuple(range(0, 3, stride))
    torch.testing.assert_close(got.restored.double(), restored[:, :, ::stride], **close)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_before_the_subject_nothing_comes_back_and_from_it_on_something_does(family):
    lm = MODELS[family]
    (got,) = trace(lm, [ask(lm)], RESTORES)
    begin, end = got.subject
    assert begin == 3
    assert torch.equal(got.restored[:, :begin], got.corrupted.expand(len(RESTORES), begin, 3, 2))
    assert (got.effects[0, begin : end + 1, 0, 1].abs() > 1e-3).all()


@on_all_families
def test_the_state_that_enters_the_first_block_at_a_one_token_subject_is_the_whole_clean_run(family):
    lm = MODELS[family]
    query = ask(lm, "France")
    for others in (None, [ask(lm, "cats")]):
        (got,) = trace(lm, [query], [Restore(), Restore("residual", 3)], others=others)
        begin = got.subject[0]
        torch.testing.assert_close(got.restored[0, begin, 0], got.clean, **close)
        # With every block's state put back at the subject, too: the middle of a window of three covers all blocks.
        torch.testing.assert_close(got.restored[1, begin, 1], got.clean, **close)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_the_mlp_adds_at_the_last_block_comes_back_at_the_last_token_alone(family):
    lm = MODELS[family]
    query = ask(lm)
    (got,) = trace(lm, [query], [Restore("mlp"), Restore("attention")])
    at = tokens.encode(lm, query).position
    elsewhere = [t for t in range(len(got.tokens)) if t != at]
    torch.testing.assert_close(got.effects[:, elsewhere, 2], torch.zeros(2, len(elsewhere), 2), **close)
    assert (got.effects[:, at, 2].abs().amax(-1) > 1e-3).all()


@on_all_families
def test_severing_matters_above_what_is_restored_and_not_below(family):
    lm = MODELS[family]
    (got,) = trace(lm, [ask(lm)], [Restore("attention"), Restore("attention", sever="mlp")])
    at = tokens.encode(lm, ask(lm)).position
    assert (got.restored[0, at] - got.restored[1, at]).abs().amax(-1)[:2].min() > 1e-3
    (got,) = trace(lm, [ask(lm)], [Restore("mlp"), Restore("mlp", sever="attention")])
    torch.testing.assert_close(got.restored[0, at, 2], got.restored[1, at, 2], **close)


@on_all_families
def test_the_ends_are_the_last_token_of_the_subject_and_the_one_that_predicts_as_in_the_whole_trace(family):
    lm = MODELS[family]
    query = ask(lm)
    (every,), (got,) = (trace(lm, [query], RESTORES[:4], where=where) for where in ("all", "ends"))
    begin, end = every.subject
    ends = [end, tokens.encode(lm, query).position]
    torch.testing.assert_close(got.restored[:, ends], every.restored[:, ends], **close)
    assert torch.equal(got.corrupted, every.corrupted) and torch.equal(got.clean, every.clean)
    lowest = 0 if lm.spec.masked else begin
    untold = [t for t in range(len(got.tokens)) if t not in ends and t >= lowest]
    assert begin in untold and got.restored[:, untold].isnan().all()  # not computed, and not to be taken for numbers
    assert torch.equal(got.restored[:, :lowest], every.restored[:, :lowest])


# Corruption


def test_noise_is_the_standard_deviation_of_the_embeddings_times_the_factor(noise):
    lm = MODELS["gpt2"]
    trace(lm, [ask(lm)], noise=3.0, samples=400, store=False, budget=10**6)
    trace(lm, [ask(lm)], noise=6, samples=400, store=False, budget=10**6)
    three, six = noise
    assert three.shape == (400, 2, 16)  # sample, token of the subject, hidden
    sigma = lm.model.get_input_embeddings().weight.std()
    assert three.std() == pytest.approx(float(3 * sigma), rel=0.03)
    assert abs(float(three.mean())) < 0.1 * float(sigma)
    torch.testing.assert_close(six, 2 * three)


def test_a_breath_of_noise_leaves_the_clean_run():
    lm = MODELS["llama"]
    (got,) = trace(lm, [ask(lm)], RESTORES, noise=1e-6)
    torch.testing.assert_close(got.restored, got.clean.expand_as(got.restored), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_a_seed_and_a_prompt_fix_a_trace(family):
    lm = MODELS[family]
    one, two = ask(lm), ask(lm, "these cats")
    alone, again, further = (trace(lm, [one], RESTORES[:2], seed=seed, store=False)[0] for seed in (0, 0, 1))
    assert same(alone, again) and not torch.allclose(alone.corrupted, further.corrupted, rtol=1e-3)
    assert torch.equal(alone.clean, further.clean)
    for queries in ([one, two], [two, one]):
        together = trace(lm, queries, RESTORES[:2], store=False)[queries.index(one)]
        assert same(alone, together)
    (slowly,) = trace(lm, [one], RESTORES[:2], budget=1, store=False)
    torch.testing.assert_close(slowly.restored, alone.restored, **close)


def test_prompts_have_noise_of_their_own_and_targets_of_one_prompt_have_the_same(noise):
    lm = MODELS["gpt2"]
    trace(lm, [ask(lm), ask(lm, "these cats"), ask(lm, target="book", foil="books")], samples=2, store=False)
    one, two, three = noise
    assert torch.equal(one, three) and not torch.allclose(one, two)


def test_more_samples_go_on_where_fewer_stopped(noise):
    lm = MODELS["gpt2"]
    trace(lm, [ask(lm)], samples=2, store=False)
    trace(lm, [ask(lm)], samples=5, store=False)
    assert torch.equal(noise[1][:2], noise[0])


# The store


@pytest.fixture
def runs(monkeypatch):
    """How often any model has been run since the test began."""
    count = []
    for family in tiny.FAMILIES:
        kind = type(MODELS[family].model.base_model)
        own = kind.__call__

        def call(self, *args, _own=own, **kwargs):
            count.append(1)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)  # another `forward` would be another model
    return count


def stored():
    return sorted(cache.scores_folder().rglob("*.safetensors"))


@pytest.mark.parametrize("others", [False, True])
def test_a_finished_trace_is_read_and_not_run_again(others, runs):
    lm = MODELS["llama"]
    queries = [ask(lm), ask(lm, "red cats")]
    swapped = {"others": queries[::-1]} if others else {}
    before = trace(lm, queries, RESTORES, **swapped)
    assert len(stored()) == 2 and runs
    runs.clear()
    again = trace(lm, queries[::-1], RESTORES, **({"others": queries} if others else {}))[::-1]
    assert not runs and all(same(*pair) for pair in zip(before, again, strict=True))
    assert [one.query for one in again] == queries and [one.subject for one in again] == [(3, 4)] * 2


def test_whatever_decides_a_trace_is_in_its_name(runs):
    lm = MODELS["gpt2"]
    query = ask(lm)
    settings = [
        {},
        {"noise": 1.0},
        {"samples": 2},
        {"seed": 1},
        {"stride": 2},
        {"where": "ends"},
        {"restores": [Restore("mlp")]},
        {"restores": [Restore(window=2)]},
        {"restores": [Restore(sever="mlp")]},
        {"others": [ask(lm, "red cats")]},
        {"others": [ask(lm, "these books")]},
    ]
    for given_ in settings:
        runs.clear()
        trace(lm, [query], **given_)
        assert runs
    others = ask(lm, target="book"), ask(lm, foil="book"), ask(lm, "these cats")
    others = *others, replace(query, subject="Spain", template="")
    for changed in others:
        runs.clear()
        trace(lm, [changed])
        assert runs
    assert len(stored()) == len(settings) + 4
    runs.clear()
    trace(lm, [query], others=[ask(lm, "red cats")], noise=7.0, samples=9)  # no noise is drawn, so none is told
    trace(lm, [query], budget=1)
    assert not runs


def test_a_truncated_file_is_no_result(runs):
    lm = MODELS["gpt2"]
    (before,) = trace(lm, [ask(lm)])
    (file,) = stored()
    whole = file.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        runs.clear()
        (again,) = trace(lm, [ask(lm)])
        assert runs and same(before, again) and file.read_bytes() == whole


def test_an_interrupt_keeps_the_prompts_that_were_finished(monkeypatch, runs):
    lm = MODELS["gpt2"]
    queries, norm = [ask(lm), ask(lm, "red cats"), ask(lm, "these books")], type(lm.model.transformer.ln_f)
    want = trace(lm, queries, store=False)
    calls, own, limit = [], norm.__call__, 10**9

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    # Not a function of the package: with another one in its place, the code would be other code.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(norm, "__call__", call)
        trace(lm, queries[:1], store=False)
        limit = len(calls) + len(calls) * 3 // 2  # in the middle of the second prompt
        trace(lm, queries)
    assert len(stored()) == 1 and not list(cache.scores_folder().rglob("*.part"))
    runs.clear()
    first_again = trace(lm, queries[:1])
    assert not runs
    got = trace(lm, queries)
    assert all(same(*pair) for pair in zip(want, got, strict=True)) and same(want[0], first_again[0])


def test_a_changed_model_is_traced_as_it_is_and_stored_as_another_one(runs):
    lm = MODELS["gpt2"]
    delta = Delta(1, torch.linspace(-9, 9, 24)[None], torch.linspace(9, -9, 16)[None])
    (before,) = trace(lm, [ask(lm)])
    with edited(lm, delta):
        (changed,) = trace(lm, [ask(lm)])
    assert len(stored()) == 2 and not torch.allclose(changed.clean, before.clean)
    trace(lm, [ask(lm, "red cats")], store=False)
    assert len(stored()) == 2
    runs.clear()
    assert same(trace(lm, [ask(lm)])[0], before)
    with edited(lm, delta):
        assert same(trace(lm, [ask(lm)])[0], changed)
    assert not runs


# Errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": []}, "no queries given"),
        ({"restores": []}, "no restores given"),
        ({"queries": [Query("the capital of France is", "Paris", foil="Madrid")]}, "a subject to corrupt"),
        ({"queries": [Query("the capital of France is", "Paris", "France")]}, "a foil for the log-odds"),
        ({"restores": [Restore("neuron")]}, "neuron.*the site is one of attention, mlp, residual"),
        ({"restores": [Restore("mlp", sever="mlp")]}, "only another can be severed"),
        ({"restores": [Restore("mlp", sever="residual")]}, "only another can be severed"),
        ({"restores": [Restore(window=0)]}, "window must be from 1 to 3"),
        ({"restores": [Restore(), Restore(window=4)]}, "window must be from 1 to 3"),
        ({"noise": 0.0}, "noise must be"),
        ({"noise": None}, "noise must be"),
        ({"noise": float("nan")}, "noise must be"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"where": "subject"}, "unknown tokens 'subject'.*'all' or 'ends'"),
        ({"stride": 0}, "stride must be from 1 to 3"),
        ({"stride": 4}, "stride must be from 1 to 3"),
        ({"others": []}, "1 queries but 0 others"),
        ({"others": [Query("the capital of Spain is in", "Madrid", "Spain")]}, "cannot replace.*`replacements`"),
        ({"others": [Query("the capital of the red is in", "Madrid", "red")]}, "cannot replace.*`replacements`"),
        ({"others": [Query("the capital of red cats is in", "Madrid")]}, "has no subject"),
        ({"queries": [Query("the capital of France is", "Paris", "France", "Paris cat")]}, "same token"),
    ],
)
def test_what_cannot_be_traced_is_refused(change, message):
    lm = MODELS["gpt2"]
    with pytest.raises(ValueError, match=message):
        trace(lm, **({"queries": [ask(lm)], "restores": [Restore()]} | change))
    assert not stored()


def test_others_must_predict_at_the_same_token_and_differ_in_the_subject_alone():
    lm = MODELS["bert"]
    one = Query("the capital of France is [MASK] in red", "Paris", "France", "Madrid")
    two = Query("the capital of Spain is in [MASK] red", "Paris", "Spain", "Madrid")
    with pytest.raises(ValueError, match="cannot replace"):
        trace(lm, [one], others=[two])
    lm = MODELS["gpt2"]
    with pytest.raises(ValueError, match="cannot replace"):
        trace(lm, [ask(lm)], others=[ask(lm, "red cats", text="the book of {} is in")])


def test_an_error_in_the_middle_leaves_the_model_without_hooks(monkeypatch):
    lm = MODELS["llama"]
    own, replays = tracing.replay, []

    def fail(*args):
        replays.append(1)
        if len(replays) > 3:
            assert lm.is_modified  # noise and states are hooks while a trace runs
            raise RuntimeError("out of memory")
        return own(*args)

    monkeypatch.setattr(tracing, "replay", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trace(lm, [ask(lm)], [Restore("mlp", 3, "attention")])
    assert not lm.is_modified and not stored()
