"""MEMIT against its closed form in numpy and against what the edited model has in its residual stream."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import whole

from kncore import memit, rome
from kncore.interventions import edited
from kncore.memit import HParams
from kncore.query import Query

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
WEIGHTS = {family: [p.clone() for p in lm.model.parameters()] for family, lm in MODELS.items()}
on_causal_families = pytest.mark.parametrize("family", tiny.CAUSAL)
REQUESTS = [
    Query("the capital of red France is", "Paris", "red France", "Madrid"),
    Query("Spain is in", "Madrid", "Spain", "red cats"),
    Query("Anna saw these books , the cats . in Anna is the", "France", "Anna", "Spain"),
]


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    for family, lm in MODELS.items():
        assert not lm.is_modified
        assert all(torch.equal(p, was) for p, was in zip(lm.model.parameters(), WEIGHTS[family], strict=True))


def asked(prefixes=2):
    return [rome.contexts(query, prefixes)[:-1] for query in REQUESTS]


def moment(seed, n=24):
    rows = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / len(rows)


def changes(seed=0):
    return torch.randn(len(REQUESTS), 16, generator=torch.Generator().manual_seed(seed))


def stream(lm, query, block):
    """What leaves a block where the subject ends."""
    one, seen = whole.ask(lm, query, query.foil), []
    blocks = lm.model.get_submodule(whole.PLACES[lm.spec.family][0])
    hook = blocks[block].register_forward_hook(
        lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, one.at])
    )
    try:
        with torch.no_grad():
            lm.model(torch.tensor([one.ids]))
    finally:
        hook.remove()
    return seen[0].double()


def key(lm, prompts, block):
    with torch.no_grad():
        keys = [whole.run(lm, whole.ask(lm, one, one.foil), block)[1].double() for one in prompts]
    return sum(keys) / len(keys)


@pytest.mark.parametrize("with_moment", [True, False])
@on_causal_families
def test_each_block_gets_the_closed_form_of_what_is_still_missing(family, with_moment):
    """(λC + KᵀK)⁻¹KᵀR with numpy's inverse, keys and stream measured again on the model edited so far."""
    lm, weight = MODELS[family], 0.7
    moments = [moment(block) if with_moment else None for block in range(2)]
    deltas = memit.memit(lm, asked(), changes(), moments, HParams(0, 1, weight))
    assert [delta.block for delta in deltas] == [0, 1] and all(len(delta.neurons) == 3 for delta in deltas)
    goal = torch.stack([stream(lm, query, 1) for query in REQUESTS]) + changes()
    for block, delta in enumerate(deltas):
        with edited(lm, *deltas[:block]) if block else contextlib.nullcontext():
            keys = torch.stack([key(lm, prompts, block) for prompts in asked()]).numpy()
            now = torch.stack([stream(lm, query, 1) for query in REQUESTS])
        missing = ((goal - now) / (2 - block)).numpy()
        c = moments[block].numpy() if with_moment else np.eye(24)
        want = np.linalg.inv(weight * c + keys.T @ keys) @ keys.T @ missing
        np.testing.assert_allclose(delta.neurons.T.double() @ delta.hidden.double(), want, atol=1e-4, rtol=1e-3)


@on_causal_families
def test_with_other_keys_counting_little_every_request_gets_its_value(family):
    """For one block and λ → 0, (W+Δ)ᵀk grows by just what was asked for, for all requests at once."""
    lm, hyper = MODELS[family], HParams(1, 1, 1e-7)
    (delta,) = memit.memit(lm, asked(0), changes(), [None], hyper)
    for query, wanted in zip(REQUESTS, changes(), strict=True):
        with torch.no_grad():
            before = whole.run(lm, whole.ask(lm, query, query.foil), 1)[2]
            with edited(lm, delta):
                after = whole.run(lm, whole.ask(lm, query, query.foil), 1)[2]
        torch.testing.assert_close(after - before, wanted, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_request_and_one_block_is_rome_with_a_smaller_step(family):
    """By Sherman and Morrison, Δ = C⁻¹k δᵀ / (λ + kᵀC⁻¹k): ROME's change times kᵀC⁻¹k / (λ + kᵀC⁻¹k)."""
    lm, weight, c = MODELS[family], 0.4, moment(5)
    settings = rome.HParams(1, steps=3, prefixes=0, lr=0.1, stop=0.0)
    (found,) = rome.search(lm, REQUESTS[:1], settings)
    (delta,) = memit.memit(lm, asked(0)[:1], found.change[None], [c], HParams(1, 1, weight))
    want = rome.delta(found, c, 1)
    gain = float(found.key.double() @ torch.linalg.inv(c) @ found.key.double())
    torch.testing.assert_close(
        delta.neurons.T @ delta.hidden, want.neurons.T @ want.hidden * gain / (weight + gain), atol=1e-5, rtol=1e-3
    )


def test_many_prompts_are_run_in_batches(monkeypatch):
    want = memit.memit(MODELS["llama"], asked(), changes(), [None, None], HParams(0, 1))
    monkeypatch.setattr(memit, "BATCH", 2)
    got = memit.memit(MODELS["llama"], asked(), changes(), [None, None], HParams(0, 1))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.neurons, other.neurons, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(one.hidden, other.hidden, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_written_is_refused():
    lm = MODELS["llama"]
    with pytest.raises(ValueError, match="normalised in tiny-bert; use a causal model"):
        memit.check(MODELS["bert"], HParams(0, 1))
    for wrong in (HParams(1, 0), HParams(0, 2), HParams(-1, 1), HParams(2, 2)):
        with pytest.raises(ValueError, match="blocks rise, from 0 to 1"):
            memit.memit(lm, asked(), changes(), [None] * 2, wrong)
    with pytest.raises(ValueError, match="1 covariances for blocks 0 to 1"):
        memit.memit(lm, asked(), changes(), [None], HParams(0, 1))
    with pytest.raises(ValueError, match="singular"):
        memit.memit(lm, asked(), changes(), [torch.zeros(24, 24)], HParams(1, 1))
    with pytest.raises(ValueError, match="no subject"):
        memit.memit(lm, [[replace(REQUESTS[0], subject="")]], changes()[:1], [None], HParams(1, 1))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_request_that_begins_with_its_subject_has_one_key_in_both_places(family):
    """For one block and one request, what is added at the mean key is R · k̄ᵀC⁻¹k̄ / (λ + k̄ᵀC⁻¹k̄): less than R."""
    lm, weight, c = MODELS[family], 0.4, moment(5)
    prompts = rome.contexts(REQUESTS[1], 3)[:-1]
    (delta,) = memit.memit(lm, [prompts], changes()[1:2], [c], HParams(1, 1, weight))
    k = key(lm, prompts, 1)
    gain = float(k @ torch.linalg.inv(c) @ k)
    got = k @ delta.neurons.T.double() @ delta.hidden.double()
    torch.testing.assert_close(got, changes()[1].double() * gain / (weight + gain), atol=1e-4, rtol=1e-3)


@pytest.mark.kind("not-a-number")
def test_zero_keys_and_changes_that_are_no_numbers_are_refused():
    wrong = changes()
    wrong[1, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        memit.memit(MODELS["llama"], asked(), wrong, [None], HParams(1, 1))
    lm = tiny.lm("gpt2")
    with torch.no_grad():
        for parameter in lm.model.transformer.h[1].mlp.c_fc.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="neurons of block 1 are zero at a subject"):
        memit.memit(lm, asked(), changes(), [None, None], HParams(0, 1))


@pytest.mark.kind("raw-errors")
def test_requests_and_changes_of_unlike_numbers_are_refused():
    lm = MODELS["llama"]
    for some, moved in (([], changes()[:0]), (asked(), changes()[:2]), ([asked()[0], asked()[1][:1]], changes()[:2])):
        with pytest.raises(ValueError, match="one change for each"):
            memit.memit(lm, some, moved, [None], HParams(1, 1))
    for wrong in ({"weight": 0}, {"weight": -1.0}, {"weight": float("nan")}, {"first": 0.5}, {"last": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HParams(**{"first": 0, "last": 1, **wrong})
