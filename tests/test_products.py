"""Products by oneDNN: the numbers of the ordinary way, forward and backward, for what they are for and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading

import pytest
import recording
import tiny
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from transformers.pytorch_utils import Conv1D

import kncore
from kncore import products
from kncore.query import Query
from kncore.store import cache, state
from knpaper import records, staleness

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
CAUSAL = Query("the capital of France is", "Paris", "France", "Madrid")
MASKED = Query("the capital of France is [MASK] .", "Paris", "France", "Madrid")


@pytest.fixture
def lm():
    return tiny.lm("gpt2")


@pytest.fixture
def onednn(monkeypatch) -> list[tuple]:
    """oneDNN is asked for, products of all sizes go there, and their shapes are counted."""
    monkeypatch.setenv("KNCORE_PRODUCTS", "onednn")
    monkeypatch.setattr(products, "ROWS", 1)
    monkeypatch.setattr(products, "WEIGHTS", 1)
    seen, through = [], products._onednn

    def counted(x, weight, bias):
        seen.append((*x.shape, weight.shape[0]))
        return through(x, weight, bias)

    monkeypatch.setattr(products, "_onednn", counted)
    return seen


def close(one, other):
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def gradients(work, *tensors):
    """What `work` gives, and the gradients of a loss that weighs every number of it differently."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = work(*tensors)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_of_every_family_gives_the_same_scores_and_predictions(family, onednn, monkeypatch):
    lm = tiny.lm(family)
    query = MASKED if lm.spec.masked else CAUSAL
    found = [kncore.attribute(lm, [query], steps=4, store=False).scores, kncore.predict(lm, [query]).probability]
    assert len(onednn) > 20
    monkeypatch.setenv("KNCORE_PRODUCTS", "mkl")
    onednn.clear()
    ordinary = [kncore.attribute(lm, [query], steps=4, store=False).scores, kncore.predict(lm, [query]).probability]
    assert close(found[0], ordinary[0]) and found[1].tolist() == pytest.approx(ordinary[1].tolist(), rel=1e-5)
    assert not onednn


_DRAWN = torch.Generator().manual_seed(0)
X, WEIGHT, BIAS = (torch.randn(size, generator=_DRAWN) for size in ((6, 8), (5, 8), (5,)))
PRODUCTS = {
    "a bias": (nn.functional.linear, (X, WEIGHT, BIAS)),
    "no bias": (nn.functional.linear, (X, WEIGHT)),
    "three dimensions": (nn.functional.linear, (X.view(2, 3, 8), WEIGHT, BIAS)),
    "Conv1D": (torch.addmm, (BIAS, X, WEIGHT.t().contiguous())),
    "a weight in another order": (nn.functional.linear, (X, WEIGHT.t().contiguous().t(), BIAS)),
    "every other weight": (nn.functional.linear, (X[:, ::2], WEIGHT[:, ::2], BIAS)),
    "rows in another order": (nn.functional.linear, (X.t().contiguous().t(), WEIGHT, BIAS)),
    "Conv1D in another order": (torch.addmm, (BIAS, X, WEIGHT.t())),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_and_its_gradients_are_those_of_pytorch(name, lm, onednn):
    function, tensors = PRODUCTS[name]
    ordinary = gradients(function, *tensors)
    with products.faster(lm):
        found = gradients(function, *tensors)
        alone = function(*tensors)
    assert len(onednn) == 3  # forward, the gradient of the input, and forward without gradients
    assert all(map(close, found, ordinary)) and close(alone, ordinary[0])


def test_only_the_gradients_that_are_wanted_are_taken_and_they_have_gradients_themselves(lm, onednn):
    x, weight = X.clone().requires_grad_(), WEIGHT.clone()
    with products.faster(lm):
        out = nn.functional.linear(x, weight)
        kept = [t for t in out.grad_fn.next_functions[0][0].saved_tensors if t is not None]
        assert [t.data_ptr() for t in kept] == [weight.data_ptr()]  # the input is not kept for nothing
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x)
    assert close(curve, 2 * (weight.t() @ weight).sum(0).expand(6, 8))


def test_a_weight_edited_in_place_inside_is_seen(lm, onednn):
    layer, conv = nn.Linear(8, 5), Conv1D(5, 8)
    with products.faster(lm), torch.no_grad():
        layer(X), conv(X)
        layer.weight.add_(WEIGHT)
        conv.weight.copy_(layer.weight.t())
        found = layer(X) - layer.bias, conv(X) - conv.bias
    assert len(onednn) == 4
    assert all(close(each, (X @ layer.weight.t()).detach()) for each in found)


def test_it_ends_with_its_context_after_an_exception_and_when_nested(lm, onednn):
    with pytest.raises(KeyError), products.faster(lm):
        raise KeyError
    assert not _get_current_function_mode_stack()
    with products.faster(lm):
        with products.faster(lm):
            inner = nn.functional.linear(X, WEIGHT, BIAS)
        outer = nn.functional.linear(X, WEIGHT, BIAS)
    assert torch.equal(inner, outer) and len(onednn) == 2
    nn.functional.linear(X, WEIGHT)
    assert len(onednn) == 2


def test_it_is_this_threads_alone(lm, onednn):
    with products.faster(lm):
        other = threading.Thread(target=nn.functional.linear, args=(X, WEIGHT))
        other.start()
        other.join()
    assert not onednn


OTHERS = {
    "an empty batch": lambda: nn.functional.linear(X[:0], WEIGHT),
    "one dimension": lambda: nn.functional.linear(X[0], WEIGHT),
    "float64": lambda: nn.functional.linear(X.double(), WEIGHT.double()),
    "bfloat16": lambda: nn.functional.linear(X.bfloat16(), WEIGHT.bfloat16()),
    "autocast": lambda: _autocast(),
    "no device": lambda: nn.functional.linear(X.to("meta"), WEIGHT.to("meta")),
    "vmap": lambda: torch.vmap(nn.functional.linear, (0, None))(X.view(2, 3, 8), WEIGHT),
    "grad of functorch": lambda: torch.func.grad(lambda x: nn.functional.linear(x, WEIGHT).sum())(X),
    "a factor": lambda: torch.addmm(BIAS, X, WEIGHT.t(), beta=0.5),
    "a matrix that is added": lambda: torch.addmm(torch.ones(6, 5), X, WEIGHT.t()),
}


def _autocast():
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.linear(X, WEIGHT)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_goes_the_ordinary_way(name, lm, onednn):
    ordinary = OTHERS[name]()
    with products.faster(lm):
        found = OTHERS[name]()
    assert found.dtype == ordinary.dtype and found.shape == ordinary.shape and not onednn
    assert found.is_meta or torch.equal(found, ordinary)


def test_a_product_too_small_to_pay_goes_the_ordinary_way_and_a_wrong_one_is_refused_as_ever(lm, onednn, monkeypatch):
    with products.faster(lm):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            nn.functional.linear(X, WEIGHT[:, 1:])
        monkeypatch.setattr(products, "ROWS", 7)
        nn.functional.linear(X, WEIGHT)
        assert not onednn
        nn.functional.linear(X.repeat(2, 1), WEIGHT)
        assert onednn
    assert products.WEIGHTS == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_is_left_alone(dtype, onednn):
    lm = tiny.lm("gpt2", dtype=dtype)
    assert products.path(lm) == "mkl" and products.noted(lm) == {}
    with products.faster(lm):
        assert not _get_current_function_mode_stack()


def test_kernels_compute_inside_and_nothing_is_left_of_it(lm, onednn):
    @state.computes()
    def inside(lm):
        return len(_get_current_function_mode_stack())

    assert inside(lm) == 1 and not _get_current_function_mode_stack() and not lm.is_modified


def test_training_is_left_alone(onednn):
    model = copy.deepcopy(tiny.model("gpt2")).train().requires_grad_()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, labels=ids).loss.backward()
    assert not onednn


@pytest.mark.parametrize(("seconds", "expected"), [((1.3, 1.0), "onednn"), ((1.2, 1.0), "mkl"), ((1.0, 1.5), "mkl")])
def test_what_is_clearly_faster_is_chosen_and_measured_once_for_each_number_of_threads(seconds, expected, monkeypatch):
    monkeypatch.delenv("KNCORE_PRODUCTS", raising=False)
    products._measured.cache_clear()
    asked, both = [], 2 * (1 + {"mkl": products.ROUNDS // 4 + 1, "onednn": products.ROUNDS}[expected])
    monkeypatch.setattr(products, "_seconds", lambda work: asked.append(work()) or seconds[(len(asked) - 1) % 2])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    try:
        assert [products.chosen() for _ in range(3)] == [expected] * 3 and len(asked) == both
        assert torch.allclose(*asked[:2])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        assert products.chosen() == expected and len(asked) == 2 * both
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert products._measured(100) == "mkl" and len(asked) == 2 * both
    finally:
        products._measured.cache_clear()


@pytest.mark.parametrize(("disturbed", "expected"), [(8, "mkl"), (10, "onednn")])
def test_calls_that_something_else_held_up_do_not_choose(disturbed, expected, monkeypatch):
    times = [1.0, 1.0, *[2.0, 1.0] * disturbed, *[0.7, 1.0] * (products.ROUNDS - disturbed)]
    monkeypatch.setattr(products, "_seconds", lambda work: times.pop(0))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert products._measured.__wrapped__(1) == expected


def test_the_measurement_itself_gives_a_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert products._measured.__wrapped__(1) in ("mkl", "onednn")


def test_a_cpu_without_wide_instructions_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(products, "_seconds", lambda work: pytest.fail("it is measured"))
    assert products._measured.__wrapped__(1) == "mkl"


def test_a_wrong_name_is_refused_in_one_line(lm, monkeypatch):
    monkeypatch.setenv("KNCORE_PRODUCTS", "onednnn")
    with pytest.raises(ValueError, match="unknown KNCORE_PRODUCTS 'onednnn'. Did you mean 'onednn'") as error:
        kncore.predict(lm, [CAUSAL])
    assert "\n" not in str(error.value)
    monkeypatch.setenv("KNCORE_PRODUCTS", "onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="built without; leave it unset"):
        products.chosen()
    monkeypatch.setenv("KNCORE_PRODUCTS", "")
    assert products.asked() == ""


def test_a_stored_result_is_that_of_one_way(lm, onednn, monkeypatch):
    places = {}
    for way in ("mkl", "onednn"):
        monkeypatch.setenv("KNCORE_PRODUCTS", way)
        places[way] = cache.files(lm, lm.loaded, [kncore.attribute], [{}])
    assert places["mkl"] != places["onednn"]
    spread = dataclasses.replace(lm, model=copy.deepcopy(lm.model).double())
    assert cache.files(spread, lm.loaded, [kncore.attribute], [{}]) not in places.values()


def test_a_record_says_which_way_unless_it_is_pytorchs_own_and_both_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path))
    for way, noted in {"onednn": "onednn", "mkl": None}.items():
        monkeypatch.setenv("KNCORE_PRODUCTS", way)
        recording.put()
        (told,) = records.read_records(tmp_path)
        assert told.get("products") == noted and staleness.stale(told) == []
    path = tmp_path / records.place_of(told)
    path.write_text(json.dumps({**told, "products": 3}))
    with pytest.raises(ValueError, match="its products is 3, and text is expected"):
        records.read_records(tmp_path)
