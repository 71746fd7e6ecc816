"""Published shapes: their sizes, and the kernels on models of the full width, reduced in depth, with random weights."""

from __future__ import annotations

from dataclasses import replace

import gpu
import pytest
import torch

import kncore
from kncore import arch, interventions, rome, tracing, zoo
from kncore.covariance import covariance
from knpaper import shapes

PAPER = ("bert-base-cased", "gpt2-xl", "llama-2-7b")


@pytest.mark.parametrize(("name", "millions"), [
    ("bert-base-cased", 108.3), ("roberta-base", 124.7), ("gpt2", 124.4), ("gpt2-xl", 1557.6), ("llama-2-7b", 6738.4),
    ("qwen2.5-coder-0.5b", 494.0),
])  # fmt: skip
def test_size_of_a_published_configuration_is_the_published_number_of_weights(name, millions):
    size = shapes.size(shapes.config(name))
    assert size.whole / 1e6 == pytest.approx(millions, abs=0.05)
    assert size.passed == size.blocks * size.block + size.head < size.whole


def test_every_hub_model_of_the_registry_has_a_known_shape_and_no_other_name_has():
    hub = {name for name, entry in zoo.REGISTRY.items() if isinstance(entry, zoo.Hub)}
    assert hub <= shapes.known().keys() <= zoo.REGISTRY.keys()


def differing(before: dict[str, torch.Tensor], lm: kncore.LM) -> list[str]:
    return [name for name, value in lm.model.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("name", PAPER)
def test_the_kernels_run_on_the_papers_models_at_full_width_reduced_in_depth(name):
    config = shapes.config(name)
    config.num_hidden_layers = depth = 2  # with one block nothing that is changed at the subject is read at the end
    lm = gpu.random_model(config, torch.float32, "cpu")
    assert lm.n_neurons == shapes.size(shapes.config(name)).neurons
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    query = gpu.query(1)
    if lm.spec.masked:
        query = replace(query, prompt=f"{query.prompt} [MASK] .", template=f"{query.template} [MASK] .")
    scores = kncore.attribute(lm, [query], quadrature="riemann", steps=2, store=False).scores
    assert scores.shape == (1, depth, lm.n_neurons) and scores.isfinite().all() and scores.abs().max() > 0
    (trace,) = tracing.trace(lm, [query], samples=1, store=False)
    assert trace.restored.isfinite().any()
    old = arch.value_vectors(lm.model, lm.spec, 0).clone()
    settings = replace(rome.hparams_for(lm), block=0, steps=2)
    (search,) = rome.search(lm, [query], settings)
    moment = covariance(lm, 0, ["w1 w2 w3 w4 w5 w6 w7 w8"] * 2)
    assert moment.shape == (lm.n_neurons, lm.n_neurons) and moment.isfinite().all()
    with interventions.edited(lm, rome.delta(replace(search, failed=""), None, 0)):
        written = search.key @ arch.value_vectors(lm.model, lm.spec, 0)
        assert torch.allclose(written - search.key @ old, search.change, atol=1e-4)
        assert differing(before, lm)
    assert not differing(before, lm)
