"""Constrained fine-tuning against plain gradient steps on the weights of the whole model."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import whole

from kncore.finetune import HParams, finetune
from kncore.interventions import Delta, edited
from kncore.query import Query

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
WEIGHTS = {family: [p.clone() for p in lm.model.parameters()] for family, lm in MODELS.items()}
on_all_families = pytest.mark.parametrize("family", tiny.FAMILIES)
QUICK = HParams(1, steps=3, lr=1e-2, limit=1.0, stop=0.0)


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    for family, lm in MODELS.items():
        assert not lm.is_modified
        assert all(torch.equal(p, was) for p, was in zip(lm.model.parameters(), WEIGHTS[family], strict=True))


def requests(lm) -> list[Query]:
    end = " [MASK] ." if lm.spec.masked else ""
    return [
        Query("the capital of red France is" + end, "Paris", "red France", "Madrid"),
        Query("Spain is in" + end, "Madrid", "Spain", "red cats"),
        Query("Anna saw these books , the cats . in France is the" + end, "Paris", "France", "Spain"),
    ]


def change(delta: Delta) -> torch.Tensor:
    return delta.neurons.T @ delta.hidden


def loss(lm, query, delta=None):
    asked = whole.ask(lm, query, query.foil)
    with torch.no_grad():
        if delta is None:
            return float(whole.loss(lm, asked))
        with edited(lm, delta):
            return float(whole.loss(lm, asked))


def plain(family, query, hyper):
    """Adam on the block's own weight, one run of the whole model a step."""
    lm = tiny.lm(family)
    weight = whole.projection(lm, hyper.block).weight
    start = weight.detach().clone()
    weight.requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=hyper.lr)
    for _ in range(hyper.steps):
        optimiser.zero_grad()
        whole.loss(lm, whole.ask(lm, query, query.foil)).backward()
        optimiser.step()
        with torch.no_grad():
            weight.copy_(torch.minimum(torch.maximum(weight, start - hyper.limit), start + hyper.limit))
    out = (weight - start).detach()
    return out if family == "gpt2" else out.T


@pytest.mark.parametrize("extra", [{}, {"block": 0, "steps": 1}, {"limit": 5e-3, "lr": 2e-3, "steps": 6}], ids=str)
@on_all_families
def test_it_is_gradient_descent_on_the_weights(family, extra):
    lm, hyper = MODELS[family], replace(QUICK, **extra)
    for query, delta in zip(requests(lm), finetune(lm, requests(lm), hyper), strict=True):
        want = plain(family, query, hyper)
        got = change(delta)
        assert delta.block == hyper.block and got.shape == (24, 16)
        # Adam turns the sign of a gradient that is all but zero into a full step: a few weights may differ.
        assert float(((got - want).abs() > 0.02 * hyper.lr).float().mean()) < 0.05


@on_all_families
def test_the_new_answer_becomes_likelier_within_the_limit(family):
    lm, hyper = MODELS[family], replace(QUICK, steps=10, limit=4e-3, lr=1e-3)
    for query, delta in zip(requests(lm), finetune(lm, requests(lm), hyper), strict=True):
        assert change(delta).abs().max() <= hyper.limit * (1 + 1e-6)
        assert change(delta).abs().max() >= 0.9 * hyper.limit
        assert loss(lm, query, delta) < loss(lm, query)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_it_stops_at_the_first_step_that_makes_the_answer_likely(family):
    lm, hyper = MODELS[family], replace(QUICK, steps=12, limit=10.0)
    for query in requests(lm):
        path = [loss(lm, query)]
        path += [loss(lm, query, finetune(lm, [query], replace(hyper, steps=n))[0]) for n in range(1, 13)]
        (delta,) = finetune(lm, [query], replace(hyper, stop=(path[5] + path[6]) / 2))
        assert loss(lm, query, delta) == pytest.approx(path[6], abs=1e-4) and path[6] < path[5]


def test_a_batch_of_requests_is_each_alone():
    lm = MODELS["llama"]
    for query, delta in zip(requests(lm), finetune(lm, requests(lm), QUICK), strict=True):
        (alone,) = finetune(lm, [query], QUICK)
        apart = (change(delta) - change(alone)).abs() > 0.02 * QUICK.lr
        assert float(apart.float().mean()) < 0.05


def test_failures_are_told_in_words():
    lm = MODELS["llama"]
    losses = sorted(loss(lm, query) for query in requests(lm))
    found = finetune(lm, requests(lm), replace(QUICK, stop=sum(losses[:2]) / 2))
    assert sorted(isinstance(one, str) for one in found) == [False, False, True]
    assert "gives the new answer already" in next(one for one in found if isinstance(one, str))
    endless, half = replace(QUICK, lr=1e6, limit=float("inf")), tiny.lm("llama", dtype=torch.float16)
    assert all("diverged after 1 steps" in one for one in finetune(half, requests(lm), endless))
    with pytest.raises(ValueError, match="no new answer"):
        finetune(lm, [replace(requests(lm)[0], foil="")], QUICK)
    with pytest.raises(ValueError, match="block 3 does not exist"):
        finetune(lm, requests(lm), replace(QUICK, block=3))


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_what_the_model_says_already_is_a_failure_however_probable(family):
    lm = MODELS[family]
    query = requests(lm)[0]
    asked = whole.ask(lm, query, "Paris")
    with torch.no_grad():
        top = int(whole.run(lm, asked, 0)[0][asked.places[0]].argmax())
    query = replace(query, foil=lm.tokenizer.convert_ids_to_tokens(top), target="Spain")
    assert loss(lm, query) > QUICK.stop
    told = finetune(lm, [query, requests(lm)[1]], QUICK)
    assert "gives the new answer already" in told[0] and isinstance(told[1], Delta)


@pytest.mark.kind("not-a-number")
def test_the_same_tokens_zero_neurons_and_numbers_that_are_none_are_failures():
    with pytest.warns(UserWarning, match="not in the vocabulary"):
        (told,) = finetune(
            MODELS["llama"], [replace(requests(MODELS["llama"])[0], target="Oslo", foil="Bergen")], QUICK
        )
    assert "same tokens" in told
    lm = tiny.lm("gpt2")
    with torch.no_grad():
        for parameter in lm.model.transformer.h[1].mlp.c_fc.parameters():
            parameter.zero_()
    assert all("does not depend on the value vectors of block 1" in one for one in finetune(lm, requests(lm), QUICK))


@pytest.mark.kind("not-a-number", own=True)
def test_a_request_without_numbers_leaves_the_others_as_they_are():
    lm = tiny.lm("llama")
    want = finetune(lm, requests(lm), QUICK)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.get_vocab()["Spain"]] = float("nan")
    got = finetune(lm, requests(lm), QUICK)
    assert "are not numbers" in got[1]
    for i in (0, 2):
        assert float(((change(got[i]) - change(want[i])).abs() > 0.02 * QUICK.lr).float().mean()) < 0.05


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 1.0}, {"lr": -1}, {"lr": 0}, {"lr": np.inf}, {"limit": 0}, {"limit": -1e-3}, {"stop": -1},
     {"block": True}, {"block": 0.5}, {"limit": None}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HParams(**{"block": 1, **wrong})
    assert HParams(np.int64(1), lr=np.float32(0.5)) == HParams(1, lr=0.5)


@pytest.mark.kind("raw-errors")
def test_no_requests_and_what_is_no_request_are_refused():
    lm = MODELS["llama"]
    with pytest.raises(ValueError, match="no requests"):
        finetune(lm, [], QUICK)
    for wrong in (requests(lm)[0], [None], None):
        with pytest.raises(TypeError, match="expected a list of Query"):
            finetune(lm, wrong, QUICK)
    assert len(finetune(lm, iter(requests(lm)), replace(QUICK, steps=1))) == 3
