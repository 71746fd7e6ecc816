"""Whose a model is, what acts on it from outside, and what it holds."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
from torch import nn

import kncore
from kncore import editors, interventions, rome, tracing
from kncore.query import Query
from kncore.store import cache, state
from knpaper import criteria

QUERY = Query("the capital of France is", "Paris", "France", "Madrid")
OTHER = Query("the capital of Spain is", "Madrid", "Spain", "Paris")


@pytest.fixture
def lm():
    return tiny.lm("llama")


def scores(lm, **options):
    return kncore.attribute(lm, [QUERY], **options).scores


def stored(lm):
    """Where scores of a model are stored; None where it cannot be said what it computes."""
    content = state.content(lm.model)
    return content and cache.files(lm, content, [kncore.attribute], [{}])


# ------------------------------------------------------------------------------------------ ambient state


def numbers(lm) -> list[torch.Tensor]:
    """What every method gives for one prompt, without the store."""
    found = rome.search(lm, [QUERY], rome.HParams(1, steps=3, prefixes=1))[0]
    trace = tracing.trace(lm, [QUERY], noise=1.0, samples=1, store=False)[0]
    table = kncore.predict(lm, [QUERY, OTHER])
    return [
        scores(lm, store=False),
        found.change,
        trace.restored,
        torch.from_numpy(table[["probability", "margin"]].to_numpy(float).copy()),
    ]


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.kind("ambient-state")
@pytest.mark.kind("grad-and-inference-mode")
@pytest.mark.parametrize("name", AMBIENT)
def test_settings_from_outside_change_no_number(lm, name):
    expected = numbers(lm)
    with AMBIENT[name]():
        found = numbers(lm)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.kind("ambient-state")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_number(lm, dtype):
    expected = numbers(lm)
    torch.set_default_dtype(dtype)
    try:
        found = numbers(lm)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.kind("ambient-state", own=True)
def test_a_lower_precision_of_products_is_set_aside_and_comes_back(lm):
    torch.set_float32_matmul_precision("medium")
    try:
        with state.pinned(lm):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.kind("ambient-state")
def test_training_mode_changes_no_number_and_comes_back():
    lm = tiny.lm("gpt2")  # its dropout is 0.1
    expected = scores(lm, store=False)
    lm.model.train()
    before = [module.training for module in lm.model.modules()]
    assert torch.equal(scores(lm, store=False), expected)
    assert [module.training for module in lm.model.modules()] == before and any(before)


@pytest.mark.kind("ambient-state", own=True)
def test_gradient_checkpointing_in_training_changes_no_number():
    lm = tiny.lm("llama")
    expected = scores(lm, store=False)
    lm.model.gradient_checkpointing_enable()
    lm.model.train()
    assert torch.equal(scores(lm, store=False), expected)


@pytest.mark.kind("grad-and-inference-mode")
def test_inference_mode_is_refused_with_a_remedy(lm):
    for ask in (scores, lambda lm: kncore.predict(lm, [QUERY]), lambda lm: editors.edit(lm, [QUERY])):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*no_grad"):
            ask(lm)
    assert scores(lm).isfinite().all()


@pytest.mark.kind("grad-and-inference-mode", own=True)
def test_fine_tuning_and_edits_of_neurons_need_no_gradients_outside(lm, tmp_path):
    edits = {name: editors.edit(lm, [QUERY], name) for name in ("fine-tuning", "neurons")}
    for name, (edit,) in edits.items():
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("KNCORE_SCORES", str(tmp_path))
            (again,) = editors.edit(lm, [QUERY], name)
            assert not torch.is_grad_enabled()
        assert again.failed == edit.failed
        for one, other in zip(again.deltas, edit.deltas, strict=True):
            assert torch.equal(one.neurons, other.neurons) and torch.equal(one.hidden, other.hidden)


@pytest.mark.kind("ambient-state", own=True)
def test_a_compiled_module_is_refused(lm):
    lm.blocks[1].mlp.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"is compiled .model\.layers\.1\.mlp.*load it anew"):
        scores(lm)


@pytest.mark.kind("raw-errors", own=True)
def test_a_name_in_the_place_of_a_model_is_refused():
    with pytest.raises(TypeError, match="expected a loaded model, as kncore.load gives it, got str 'gpt2'"):
        kncore.predict("gpt2", [QUERY])


# ------------------------------------------------------------------------------------------ threads and order


def in_thread(function):
    """What a function gives, or raises, in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the thread hangs"
    return found[0]


def delta(lm, block=0, seed=0):
    shape = lm.n_neurons, lm.model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    return interventions.Delta(block, *(torch.randn(1, width, generator=generator) for width in shape))


CONTEXTS = {
    "edited": lambda lm, i: interventions.edited(lm, delta(lm, seed=i)),
    "edited_rows": lambda lm, i: interventions.edited_rows(lm, [[delta(lm, seed=i)]]),
    "suppress": lambda lm, i: kncore.suppress(lm, [(0, i)]),
    "enhance everywhere": lambda lm, i: kncore.enhance(lm, [(1, i)], position="all"),
}
ASKS = {
    "predict": lambda lm: kncore.predict(lm, [QUERY]),
    "attribute": lambda lm: kncore.attribute(lm, [QUERY]),
    "edited": lambda lm: interventions.edited(lm, delta(lm)).__enter__(),
    "suppress": lambda lm: kncore.suppress(lm, [(0, 0)]).__enter__(),
    "search": lambda lm: rome.search(lm, [QUERY], rome.HParams(0, steps=1, prefixes=1)),
    "measure": lambda lm: criteria.generations(lm, ["the capital"], length=1),
}


@pytest.mark.kind("threads-and-order")
@pytest.mark.parametrize("name", ASKS)
def test_another_thread_is_refused_while_an_intervention_is_open(lm, name):
    with kncore.suppress(lm, [(0, 1)]):
        error = in_thread(lambda: ASKS[name](lm))
    assert isinstance(error, RuntimeError) and "another thread has an intervention open" in str(error)
    assert not lm.is_modified
    if not hasattr(answer := in_thread(lambda: ASKS[name](lm)), "__exit__"):
        assert not isinstance(answer, Exception)


@pytest.mark.kind("threads-and-order")
def test_threads_that_compute_wait_for_each_other(lm):
    expected = scores(lm, store=False)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(scores(lm, store=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and all(torch.equal(one, expected) for one in found)


@pytest.mark.kind("threads-and-order", own=True)
def test_two_models_are_two_sessions(lm):
    other = tiny.lm("llama", seed=1)
    with kncore.suppress(lm, [(0, 1)]):
        assert not isinstance(in_thread(lambda: kncore.predict(other, [QUERY])), Exception)


@pytest.mark.kind("threads-and-order", own=True)
def test_a_copy_of_a_model_is_free(lm):
    with interventions.edited(lm, delta(lm)):
        twin = copy.deepcopy(lm)
    assert not isinstance(in_thread(lambda: kncore.predict(twin, [QUERY])), Exception)


@pytest.mark.kind("threads-and-order")
@pytest.mark.parametrize("first", CONTEXTS)
@pytest.mark.parametrize("second", CONTEXTS)
def test_interventions_that_end_out_of_order_are_undone_and_refused(lm, first, second):
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    own = {name: id(weight) for name, weight in lm.model.named_parameters()}
    outer, inner = CONTEXTS[first](lm, 1), CONTEXTS[second](lm, 2)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="ended before 1 that began after it.*reverse order"):
        outer.__exit__(None, None, None)
    assert not lm.is_modified
    inner.__exit__(None, None, None)
    assert not lm.is_modified and {name: id(weight) for name, weight in lm.model.named_parameters()} == own
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    assert "forward" not in vars(lm.model.base_model)
    assert not isinstance(in_thread(lambda: kncore.predict(lm, [QUERY])), Exception)


@pytest.mark.kind("threads-and-order", own=True)
def test_of_three_the_outermost_stays_where_the_middle_one_ends_too_early(lm):
    with kncore.suppress(lm, [(0, 1)]):
        alone = kncore.predict(lm, [QUERY])
        middle, inner = interventions.edited(lm, delta(lm)), kncore.suppress(lm, [(1, 2)])
        middle.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError, match="out|before"):
            middle.__exit__(None, None, None)
        assert kncore.predict(lm, [QUERY]).equals(alone)
        inner.__exit__(None, None, None)
        assert kncore.predict(lm, [QUERY]).equals(alone)
    assert not lm.is_modified


# ------------------------------------------------------------------------------------------ what a model holds


def swap_rows(lm):
    weight = lm.blocks[0].mlp.down_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()


def swap_columns(lm):
    weight = lm.blocks[0].mlp.down_proj.weight.data
    weight[:, [0, 2]] = weight[:, [2, 0]].clone()


def one_number(lm):
    lm.blocks[2].self_attn.q_proj.weight.data[3, 5] *= 1 + 1e-6


def last_bit(lm):
    lm.model.lm_head.weight.data.view(torch.int32)[7, 11] ^= 1


def activation(lm):
    lm.blocks[0].mlp.act_fn = nn.GELU()


def activation_function(lm):
    del lm.blocks[0].mlp.act_fn
    lm.blocks[0].mlp.act_fn = torch.relu


def buffer(lm):
    lm.model.model.rotary_emb.inv_freq *= 1.01


def configuration(lm):
    lm.model.config.attention_dropout = 0.5


CHANGES = {
    "two rows swapped behind PyTorch's back": swap_rows,
    "two columns swapped": swap_columns,
    "one number by a millionth": one_number,
    "the last bit of one number": last_bit,
    "another activation module": activation,
    "another activation function": activation_function,
    "eps of a normalisation": lambda lm: setattr(lm.model.model.norm, "variance_epsilon", 1e-2),
    "the scaling of attention": lambda lm: setattr(lm.blocks[1].self_attn, "scaling", 0.1),
    "a buffer": buffer,
    "the configuration": configuration,
    "an adapter in the place of a layer": lambda lm: setattr(
        lm.blocks[0].mlp, "down_proj", nn.Linear(24, 16, bias=False)
    ),
}
UNKNOWN = {
    "a replaced forward": lambda lm: setattr(lm.blocks[0].mlp, "forward", lambda x: x),
    "a forward hook": lambda lm: lm.blocks[0].register_forward_hook(lambda *x: None),
    "a backward hook": lambda lm: lm.blocks[0].register_full_backward_hook(lambda *x: None),
    "a hook before the backward pass": lambda lm: lm.blocks[0].register_full_backward_pre_hook(lambda *x: None),
}


@pytest.mark.kind("identity")
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_has_another_content_and_finds_nothing_stored(lm, name):
    found = stored(lm)
    CHANGES[name](lm)
    assert lm.is_modified and stored(lm) != found


@pytest.mark.kind("identity")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_a_model_computes_cannot_be_said_then_and_nothing_is_stored(lm, name):
    UNKNOWN[name](lm)
    assert lm.is_modified and stored(lm) is None


@pytest.mark.kind("identity", own=True)
def test_hooks_on_all_modules_and_a_patched_class_are_seen(lm, monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(lambda *x: None)
    try:
        assert lm.is_modified and stored(lm) is None
    finally:
        handle.remove()
    assert not lm.is_modified
    monkeypatch.setattr(type(lm.blocks[0].mlp), "forward", lambda self, x: x)
    assert lm.is_modified and stored(lm) is None


@pytest.mark.kind("identity", own=True)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_asking_a_model_does_not_change_its_content(family):
    lm = tiny.lm(family)
    query = Query("the capital of France is [MASK].", "Paris") if lm.spec.masked else QUERY
    kncore.attribute(lm, [query])
    with kncore.suppress(lm, [(0, 1)], position="all"):
        kncore.predict(lm, [query])
    lm.model.requires_grad_(True)
    lm.model.train()
    assert not lm.is_modified


@pytest.mark.kind("identity")
def test_a_model_that_is_changed_while_it_computes_stores_nothing(lm, monkeypatch):
    from kncore import attribution

    compute = attribution._scores

    def disturbed(*arguments):
        one_number(lm)
        return compute(*arguments)

    monkeypatch.setattr(attribution, "_scores", disturbed)
    with pytest.raises(RuntimeError, match="changed while it computed.*ask again"):
        scores(lm)
    assert not list(cache.scores_folder().rglob("*.safetensors"))


@pytest.mark.kind("identity")
def test_an_edited_model_has_results_of_its_own(lm):
    clean = scores(lm)
    with interventions.edited(lm, delta(lm)):
        changed = scores(lm)
        assert torch.equal(scores(lm), changed)
    assert not torch.equal(clean, changed) and torch.equal(scores(lm), clean)


def test_sums_see_every_bit_and_every_exchange():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((3, 4), (5, 7), (1, 3), (6,), (2, 3, 5)):
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            whole = state._sums(tensor)
            raw = tensor.clone().view(torch.uint8).flatten()
            for bit in range(0, 8 * len(raw), 5):
                other = raw.clone()
                other[bit // 8] ^= 1 << bit % 8
                assert state._sums(other.view(dtype).reshape(shape)) != whole
