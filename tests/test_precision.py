"""Precisions and places: half-precision weights with integrals and softmax in float32, and weights that lie on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

import kncore
from kncore import finetune, interventions, models, rome, tokens, tracing
from kncore.editors import Edit
from kncore.query import Query
from kncore.replay import Change, capture, replay
from knpaper import criteria, tasks
from knpaper.cases import Case

HALVES = (torch.bfloat16, torch.float16)
# Largest relative Euclidean distance from float32: bfloat16 has 8 bits, float16 has 11.
SCORES = {torch.bfloat16: 5e-2, torch.float16: 6e-3}
# Effects are small differences of readings, down to a fifteenth of them here; the rounding is that of the readings.
EFFECTS = {torch.bfloat16: 0.2, torch.float16: 0.06}
LOGITS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
QUERIES = [
    Query("the capital of France is", "Paris", "France", "Madrid"),
    Query("Anna saw the books in Spain", "book", "books", "cat"),
]
both = pytest.mark.parametrize("dtype", HALVES, ids=str)
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def apart(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@both
@families
def test_attribution_in_half_precision_is_that_of_float32_to_its_rounding(family, dtype):
    found = kncore.attribute(tiny.lm(family, dtype=dtype), QUERIES, store=False)
    truth = kncore.attribute(tiny.lm(family), QUERIES, store=False)
    assert found.scores.dtype == found.probability.dtype == torch.float32
    assert 0 < apart(found.scores, truth.scores) < SCORES[dtype]
    assert apart(found.probability, truth.probability) < SCORES[dtype]
    assert bool((found.gap < SCORES[dtype] * truth.probability[:, None]).all())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_scores_of_an_improbable_target_do_not_fall_below_what_the_precision_can_hold(dtype):
    """At a probability of 1e-9, the gradient of P is below the smallest number that float16 has."""
    lm, wide = tiny.lm("gpt2", dtype=dtype), tiny.lm("gpt2")
    for one in (lm, wide):
        norm = one.model.transformer.ln_f
        for parameter in norm.parameters():
            parameter.mul_(6)
    logits = capture(wide, [tokens.encode(wide, QUERIES[0])]).logits[0]
    words = (logits.log_softmax(-1) + 20.7).abs().argsort().tolist()
    rare = next(tiny.WORDS[i - 5] for i in words if i >= 5 and tiny.WORDS[i - 5].isalpha())
    asked = [Query(QUERIES[0].prompt, rare)]
    truth = kncore.attribute(wide, asked, steps=6, store=False)
    assert 1e-12 < float(truth.probability) < 1e-6
    found = kncore.attribute(lm, asked, steps=6, store=False)
    assert apart(found.scores, truth.scores) < {torch.bfloat16: 0.5, torch.float16: 0.1}.get(dtype, 1e-3)


@both
def test_the_path_of_a_stiff_block_is_split_in_half_precision_too(dtype):
    """In block 0 of this model, nodes on the whole path are wrong by half."""
    queries = tasks.facts("capital", n=1)[1:2]
    truth = kncore.attribute(models.load("controlled-llama"), queries, store=False)
    lm = models.load("controlled-llama", dtype=dtype)
    found = kncore.attribute(lm, queries, store=False)
    flat = kncore.attribute(lm, queries, steps=5, store=False)
    assert apart(flat.scores[0, 0], truth.scores[0, 0]) > 0.3
    assert apart(found.scores[0, 0], truth.scores[0, 0]) < 0.12
    assert int(found.nodes.sum()) < 4 * int(truth.nodes.sum())


@both
@families
def test_replay_is_the_whole_model_in_half_precision(family, dtype):
    lm = tiny.lm(family, dtype=dtype)
    (encoded,) = [tokens.encode(lm, QUERIES[0])]
    captured = capture(lm, [encoded])
    values = torch.full((1, lm.n_neurons), 0.5, dtype=dtype)
    got = replay(captured, [Change(1, torch.tensor([0]), values)])
    assert captured.logits.dtype == got.dtype == torch.float32
    neurons = [(1, i) for i in range(lm.n_neurons)]
    with kncore.set_neurons(lm, neurons, 0.5):
        whole = lm.model(torch.tensor([encoded.ids])).logits[0, encoded.position].float()
    assert apart(got, whole[None]) < LOGITS[dtype] < apart(captured.logits, whole[None])


@both
@families
def test_neurons_are_suppressed_in_half_precision_as_in_float32(family, dtype):
    neurons = [(0, 1), (1, 3), (2, 5), (2, 7)]

    def logp(lm):
        with kncore.suppress(lm, neurons):
            return kncore.predictions.log_probabilities(lm, QUERIES)

    lm = tiny.lm(family, dtype=dtype)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    assert apart(logp(lm), logp(tiny.lm(family))) < LOGITS[dtype]
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


@both
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_traces_in_half_precision_are_those_of_float32_to_their_rounding(family, dtype):
    (found,) = tracing.trace(tiny.lm(family, dtype=dtype), QUERIES[:1], store=False)
    (truth,) = tracing.trace(tiny.lm(family), QUERIES[:1], store=False)
    assert found.restored.dtype == torch.float32
    assert apart(found.restored[..., 0], truth.restored[..., 0]) < 2 * SCORES[dtype]
    assert apart(found.restored, truth.restored) < SCORES[dtype]
    assert apart(found.effects, truth.effects) < EFFECTS[dtype]


@both
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_edits_in_half_precision_are_those_of_float32_to_their_rounding(family, dtype):
    request = QUERIES[0]
    case = Case(request, {"reliability": (Query(request.prompt, request.foil, request.subject, request.target),)})
    settings = rome.HParams(1, prefixes=0, clamp=100.0, decay=0.0, covariance="identity")

    def margins(lm):
        (found,) = rome.search(lm, [request], settings)
        (tuned,) = finetune.finetune(lm, [request], finetune.HParams(1, limit=0.1, lr=2e-2))
        assert found.change.dtype == tuned.neurons.dtype == torch.float32
        delta = rome.delta(found, None, 1)
        table = criteria.measure(lm, [case, case], [Edit((delta,)), Edit((tuned,))])
        with kncore.edited(lm, delta):
            written = criteria.measure(lm, [case], [Edit()])
        return [*table["margin_after"], *written["margin_before"]], table["margin_before"][0]

    (got, _), (wanted, before) = margins(tiny.lm(family, dtype=dtype)), margins(tiny.lm(family))
    assert min(abs(one - before) for one in wanted) > 0.1, "the edits change nothing that could be compared"
    assert got == pytest.approx(wanted, abs={torch.bfloat16: 0.08, torch.float16: 0.008}[dtype])


@both
def test_an_edit_in_half_precision_ends_bit_for_bit(dtype):
    lm = tiny.lm("llama", dtype=dtype)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    delta = interventions.Delta(1, torch.ones(1, lm.n_neurons), torch.ones(1, 16))
    name = "model.layers.1.mlp.down_proj.weight"
    with kncore.edited(lm, delta):
        assert not torch.equal(lm.model.state_dict()[name], before[name])
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


# ------------------------------------------------------------------------------------------------- places


def saved(folder, family):
    tiny.model(family).save_pretrained(folder)
    tiny.tokenizer(tiny.spec_for(family).masked).save_pretrained(folder)
    return folder


def spread(family) -> dict[str, str]:
    """The first block in memory, the others on disk."""
    model, (top, _, blocks) = tiny.model(family), tiny.spec_for(family).blocks.rpartition(".")
    parts = {f"{top}.{name}": "cpu" for name, _ in model.get_submodule(top).named_children() if name != blocks}
    inside, depth = model, ""
    for step in top.split("."):
        parts |= {f"{depth}{name}": "cpu" for name, _ in inside.named_children() if name != step}
        inside, depth = inside.get_submodule(step), f"{depth}{step}."
    return parts | {f"{top}.{blocks}.{i}": "disk" if i else "cpu" for i in range(3)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))


@families
def test_a_model_partly_on_disk_is_captured_suppressed_and_attributed_as_in_memory(family, tmp_path):
    folder = saved(tmp_path / "model", family)
    words = tiny.tokenizer(tiny.spec_for(family).masked)  # transformers reads another one for some families
    whole = replace(models.load(folder), tokenizer=words)
    lm = replace(models.load(folder, device_map=spread(family)), tokenizer=words)
    assert {p.device.type for p in lm.model.parameters()} == {"cpu", "meta"}
    assert (lm.device.type, lm.dtype, lm.revision) == ("cpu", torch.float32, whole.revision)
    neurons = [(0, 1), (1, 3), (2, 5)]
    for one in (whole, lm):
        assert not one.is_modified
        captured = capture(one, [tokens.encode(one, query) for query in QUERIES])
        with kncore.suppress(one, neurons):
            assert one.is_modified
            suppressed = kncore.predict(one, QUERIES)
        scores = kncore.attribute(one, QUERIES, store=False).scores
        if one is whole:
            truth = captured, suppressed, scores
        assert not one.is_modified
    assert torch.equal(captured.logits, truth[0].logits)
    assert all(map(torch.equal, captured.sites["neuron"], truth[0].sites["neuron"]))
    assert suppressed.equals(truth[1])
    assert torch.equal(scores, truth[2])


def test_weights_on_disk_are_not_edited(tmp_path):
    lm = models.load(saved(tmp_path / "model", "gpt2"), device_map=spread("gpt2"))
    delta = interventions.Delta(1, torch.ones(1, lm.n_neurons), torch.ones(1, 16))
    with pytest.raises(ValueError, match="weights of block 1 are on disk; load model@.{8} without a device map"):
        with kncore.edited(lm, delta):
            pass


def test_a_device_map_of_one_device_is_a_plain_model(tmp_path):
    folder = saved(tmp_path / "model", "gpt2")
    lm = models.load(folder, device_map="auto", dtype="bfloat16")
    assert (lm.device.type, lm.dtype) == ("cpu", torch.bfloat16)
    asked = [tokens.encode(lm, QUERIES[0])]
    assert torch.equal(capture(lm, asked).logits, capture(models.load(folder, dtype="bfloat16"), asked).logits)


def test_device_and_precision_come_from_the_environment_where_none_is_given(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", "gpt2")
    monkeypatch.setenv("KNCORE_DTYPE", "bfloat16")
    assert models.load(folder).dtype == torch.bfloat16
    assert models.load(folder, dtype="float64").dtype == torch.float64
    monkeypatch.setenv("KNCORE_DEVICE", "nowhere")
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used here"):
        models.load(folder)
    assert models.load(folder, device="cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="a device .cpu. or a device map, not both"):
        models.load(folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("device", ["meta", "hpu", "lazy", "cuda:99", "cpu:x", "", "gpu", -1, 1.5, [], "\0"])
def test_a_device_that_cannot_compute_is_refused(device):
    with pytest.raises(ValueError, match="cannot be used here: .*'cpu' always can"):
        models.resolve_device(device)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "nn", "", 16, torch.int64])
def test_a_precision_that_no_model_is_computed_in_is_refused(dtype):
    with pytest.raises(ValueError, match="one of float32, bfloat16, float16, float64"):
        models.resolve_device("cpu", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    for device in ("cuda", 0):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here.*'cpu' always can"):
            models.load("controlled-gpt2", device=device)
