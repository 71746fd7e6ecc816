"""Interventions against hooks and matrices written out here, and the promise that nothing of them stays behind."""

import contextlib
import copy
from dataclasses import replace
from typing import NamedTuple

import naive
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from kncore import arch
from kncore.attribution import attribute
from kncore.interventions import (
    Delta,
    edited,
    edited_rows,
    enhance,
    set_neurons,
    suppress,
    target_position,
    value_update,
)
from kncore.quadrature import rule
from kncore.query import Query
from kncore.replay import Change, capture, replay
from kncore.tokens import encode

# Where the paths below differ from the package's own table, one of the two is wrong.
PROJECTION = dict.fromkeys(tiny.FAMILIES, "mlp.down_proj") | {
    "bert": "output.dense",
    "roberta": "output.dense",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
}
AUTHORS = dict.fromkeys(tiny.FAMILIES, "mlp.gate_proj") | {
    "bert": "intermediate",
    "roberta": "intermediate",
    "gpt2": "mlp.c_fc",
    "gpt_neox": "mlp.dense_h_to_4h",
}
FEEDS_ROW = torch.linspace(-0.2, 0.3, 16)  # the hidden side of the deltas of `deltas`
PROMPTS = ["the capital of", "Anna saw these red", "the capital of the cats is in"]
FACTOR = 3.0
NEURONS = {(0, 3): 0.7, (0, 20): -1.3, (2, 0): 2.1}
KINDS = ("suppress", "enhance", "set")
on_all_families = pytest.mark.parametrize("family", tiny.FAMILIES)

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    assert not any(lm.is_modified for lm in MODELS.values())


class Batch(NamedTuple):
    """Padded prompts; `target` is the position of each that predicts, known from how they were put together."""

    ids: torch.Tensor
    mask: torch.Tensor
    target: list[int]


def padded(lm, side="right", prompts=PROMPTS) -> Batch:
    """Prompts of several lengths; those of a masked model hold two masks."""
    texts = [f"{prompt} [MASK] is red" for prompt in prompts] if lm.spec.masked else prompts
    rows = [encode(lm, Query(text, "red cats" if lm.spec.masked else "cats")) for text in texts]
    width = max(len(row.ids) for row in rows)
    ids, mask, target = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width).long(), []
    for i, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row.ids)
        ids[i, first : first + len(row.ids)] = torch.tensor(row.ids)
        mask[i, first : first + len(row.ids)] = 1
        target.append(first + (row.ids.index(lm.tokenizer.mask_token_id) if lm.spec.masked else len(row.ids) - 1))
    return Batch(ids, mask, target)


def logits(lm, batch: Batch):
    """At the tokens that are not padding."""
    return lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.mask.bool()]


class Edit(NamedTuple):
    """One intervention on the neurons of `values`, which are used by set (each) and enhance (the first)."""

    kind: str
    values: dict[tuple[int, int], float]
    position: str = "all"
    site: str = "neuron"

    def apply(self, old: float, neuron: tuple[int, int]):
        """What becomes of the value of one neuron."""
        if self.kind == "suppress":
            return old * 0
        return old * self.factor if self.kind == "enhance" else self.values[neuron]

    @property
    def factor(self) -> float:
        return next(iter(self.values.values()))


def deltas(values) -> list[Delta]:
    """One delta per neuron, so that a block may have several."""
    return [Delta(b, v * torch.eye(24)[i][None], FEEDS_ROW.roll(i)[None]) for (b, i), v in values.items()]


def context(lm, edit: Edit):
    neurons, where = list(edit.values), {"position": edit.position, "site": edit.site}
    if edit.kind == "edited":
        return edited(lm, *deltas(edit.values))
    if edit.kind == "suppress":
        return suppress(lm, neurons, **where)
    if edit.kind == "enhance":
        return enhance(lm, neurons, edit.factor, **where)
    return set_neurons(lm, neurons, list(edit.values.values()), **where)


@contextlib.contextmanager
def by_hand(lm, edit: Edit, target: list[int]):
    """The same edit, number by number, by hooks on the modules of the tables above."""
    family = lm.spec.family

    def changed(x, block):
        x = x.clone()
        for row, place in enumerate(target):
            for token in [place] if edit.position == "target" else range(x.shape[1]):
                for b, i in edit.values:
                    if b == block:
                        x[row, token, i] = edit.apply(x[row, token, i].clone(), (b, i))
        return x

    def with_delta(x, out, block):
        for delta in deltas(edit.values):
            if delta.block == block:
                out = out + (x @ delta.neurons[0])[..., None] * delta.hidden[0]
        return out

    with contextlib.ExitStack() as hooks:
        for number in {block for block, _ in edit.values}:
            block = lm.blocks[number]
            projection = block.get_submodule(PROJECTION[family])
            if edit.kind == "edited":
                handle = projection.register_forward_hook(lambda _, x, out, n=number: with_delta(x[0], out, n))
            elif edit.site == "neuron":
                handle = projection.register_forward_pre_hook(lambda _, x, n=number: (changed(x[0], n),))
            else:
                site = block.get_submodule(AUTHORS[family])
                handle = site.register_forward_hook(lambda _, x, out, n=number: changed(out, n))
            hooks.callback(handle.remove)
        yield


VALUES = st.dictionaries(
    st.tuples(st.integers(0, 2), st.integers(0, 23)), st.floats(-3, 3, width=16), min_size=1, max_size=4
)
EDITS = st.builds(
    Edit,
    st.sampled_from([*KINDS, "edited"]),
    VALUES,
    st.sampled_from(["all", "target"]),
    st.sampled_from(arch.NEURON_SITES),
)


# What an intervention computes


@pytest.mark.parametrize("kind", KINDS)
@on_all_families
def test_suppress_enhance_and_set_equal_hooks_written_by_hand(family, kind):
    lm = MODELS[family]
    for side in ("right", "left"):
        batch = padded(lm, side)
        plain = logits(lm, batch)
        for site in arch.NEURON_SITES:
            for position in ("all", "target"):
                edit = Edit(kind, NEURONS, position, site)
                with context(lm, edit):
                    got = logits(lm, batch)
                with by_hand(lm, edit, batch.target):
                    want = logits(lm, batch)
                torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
                assert torch.isfinite(got).all() and (got - plain).abs().max() > 1e-4


@pytest.mark.parametrize("position", ["all", "target"])
@on_all_families
def test_an_edit_moves_the_projection_by_value_vectors_alone(family, position):
    """Σ_i (new − old)_i · v_i at the edited tokens, and not a bit at the others."""
    lm = MODELS[family]
    batch = padded(lm)
    projection = lm.blocks[1].get_submodule(PROJECTION[family])
    wanted = {(1, 3): 0.5, (1, 8): -2.0}
    outputs = []
    with contextlib.ExitStack() as hooks:
        states = []
        hooks.callback(projection.register_forward_pre_hook(lambda _, x: states.append(x[0])).remove)
        hooks.callback(projection.register_forward_hook(lambda _, x, out: outputs.append(out)).remove)
        logits(lm, batch)
        with context(lm, Edit("set", wanted, position)):
            logits(lm, batch)
    change = torch.zeros_like(outputs[0])
    for row, place in enumerate(batch.target):
        for token in [place] if position == "target" else range(batch.ids.shape[1]):
            for (_, i), value in wanted.items():
                vector = projection.weight[i] if family == "gpt2" else projection.weight[:, i]
                change[row, token] += (value - states[0][row, token, i]) * vector
    torch.testing.assert_close(outputs[1] - outputs[0], change, atol=2e-6, rtol=1e-5)
    untouched = change.abs().sum(-1) == 0
    assert torch.equal(outputs[1][untouched], outputs[0][untouched])
    assert untouched.any() == (position == "target")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_published_site_is_upstream_of_the_activation(family, kind):
    lm = MODELS[family]
    batch = padded(lm)
    mlp, seen = lm.blocks[1].mlp, {}
    edit = Edit(kind, {(1, 5): -1.5, (1, 7): 2.0}, "target", "published")
    parts = {"before": mlp.c_fc} if family == "gpt2" else {"before": mlp.gate_proj, "up": mlp.up_proj}
    with contextlib.ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_hook(lambda _, x, out, n=name: seen.update({n: out.clone()})).remove)
        hooks.callback(mlp.register_forward_hook(lambda _, x, out: seen.update(mlp=out)).remove)
        with context(lm, edit):
            logits(lm, batch)
    before = seen["before"]
    for row, place in enumerate(batch.target):
        for _, i in edit.values:
            before[row, place, i] = edit.apply(before[row, place, i].clone(), (1, i))
    if family == "gpt2":
        want = gelu(before, approximate="tanh") @ mlp.c_proj.weight + mlp.c_proj.bias
    else:
        want = (silu(before) * seen["up"]) @ mlp.down_proj.weight.T
    torch.testing.assert_close(seen["mlp"], want, atol=2e-6, rtol=1e-5)


@on_all_families
def test_one_value_serves_all_neurons_and_the_order_of_neurons_is_free(family):
    lm = MODELS[family]
    batch = padded(lm)
    with set_neurons(lm, list(NEURONS), 0.5):
        one = logits(lm, batch)
    with set_neurons(lm, list(NEURONS), [0.5] * 3):
        assert torch.equal(logits(lm, batch), one)
    with set_neurons(lm, list(NEURONS), list(NEURONS.values())):
        forth = logits(lm, batch)
    with set_neurons(lm, list(NEURONS)[::-1], torch.tensor(list(NEURONS.values())[::-1])):
        assert torch.equal(logits(lm, batch), forth)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_while_text_is_generated_each_last_token_is_a_target_once(family):
    lm = MODELS[family]
    prompt = torch.tensor([encode(lm, Query("the capital of the", "cats")).ids])
    edit = Edit("enhance", {(0, 3): FACTOR, (1, 4): 0}, "target")
    with context(lm, edit):
        made = lm.model.generate(
            prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=-1
        )
    text, first = made.sequences, prompt.shape[1] - 1

    def changed(x, block):
        x = x.clone()
        for b, i in edit.values:
            if b == block:
                x[0, first:, i] *= FACTOR
        return x

    with contextlib.ExitStack() as hooks:
        for number in (0, 1):
            module = lm.blocks[number].get_submodule(PROJECTION[family])
            hooks.callback(module.register_forward_pre_hook(lambda _, x, n=number: (changed(x[0], n),)).remove)
        want = lm.model(text).logits[0, first:-1]
    torch.testing.assert_close(torch.cat(made.logits), want, atol=1e-5, rtol=1e-4)


def test_the_target_position_is_the_last_token_attended_to_or_the_first_mask():
    gpt2, bert = MODELS["gpt2"], MODELS["bert"]
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert target_position(gpt2, ids, mask).tolist() == [1, 3]
    assert target_position(gpt2, ids, mask.bool()).tolist() == [1, 3]
    assert target_position(gpt2, ids).tolist() == [3, 3]
    after_two = ids[:, 2:]  # tokens that follow two in a cache, which the mask still names
    assert target_position(gpt2, after_two, torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])).tolist() == [0, 1]
    m = bert.tokenizer.mask_token_id
    assert target_position(bert, torch.tensor([[2, m, m, 3], [2, 5, m, 3]]), mask).tolist() == [1, 2]


# Nesting


@settings(max_examples=40, deadline=None)
@given(st.lists(EDITS, min_size=1, max_size=4), st.sampled_from(["left", "right"]))
@on_all_families
def test_nesting_is_composition(family, plan, side):
    lm = MODELS[family]
    batch = padded(lm, side)
    with contextlib.ExitStack() as stack:
        for edit in plan:
            stack.enter_context(context(lm, edit))
        got = logits(lm, batch)
    with contextlib.ExitStack() as stack:
        for edit in plan:
            stack.enter_context(by_hand(lm, edit, batch.target))
        want = logits(lm, batch)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["all", "target"])
@pytest.mark.parametrize("site", arch.NEURON_SITES)
@on_all_families
def test_an_inner_intervention_acts_on_what_the_outer_left(family, site, position):
    lm = MODELS[family]
    batch, neurons, where = padded(lm), list(NEURONS), {"position": position, "site": site}

    def under(*stack):
        with contextlib.ExitStack() as open_:
            for one in stack:
                open_.enter_context(one)
            return logits(lm, batch)

    def times(factor):
        return enhance(lm, neurons, factor, **where)

    def to(value):
        return set_neurons(lm, neurons, value, **where)

    def off():
        return suppress(lm, neurons, **where)

    assert torch.equal(under(times(2.0), times(2.0)), under(times(4.0)))
    assert torch.equal(under(off(), to(1.5)), under(to(1.5)))
    assert torch.equal(under(to(1.5), off()), under(off()))
    assert torch.equal(under(to(1.5), times(2.0)), under(to(3.0)))
    assert torch.equal(under(times(2.0), to(1.5)), under(to(1.5)))
    assert not torch.equal(under(to(3.0)), under(to(1.5)))


# What stays behind: nothing


class Bits:
    """Every tensor and every hook of a model, to compare with later."""

    def __init__(self, lm):
        self.lm, self.batch = lm, padded(lm)
        self.tensors = [(x, x.detach().clone()) for x in self.now()]
        self.logits = logits(lm, self.batch)

    def now(self):
        return [*self.lm.model.parameters(), *self.lm.model.buffers()]

    def check(self):
        assert not self.lm.is_modified
        for module in self.lm.model.modules():
            assert not any(value for name, value in vars(module).items() if "hooks" in name and "forward" in name)
        assert all(a is b for a, (b, _) in zip(self.now(), self.tensors, strict=True))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in self.tensors)
        assert not any(x.requires_grad for x, _ in self.tensors)
        assert torch.equal(logits(self.lm, self.batch), self.logits)


class Stop(Exception):
    pass


def fail_in_the_body(lm):
    raise Stop


def interrupt_the_body(lm):
    raise KeyboardInterrupt


def fail_in_the_model(lm):
    lm.model(torch.tensor([[4, 4, lm.tokenizer.mask_token_id, 10**6]]))  # no such token


def interrupt_the_model(lm):
    hook = lm.blocks[1].register_forward_pre_hook(lambda *_: interrupt_the_body(lm))
    try:
        logits(lm, padded(lm))
    finally:
        hook.remove()


ENDS = {
    fail_in_the_body: Stop,
    interrupt_the_body: KeyboardInterrupt,
    fail_in_the_model: IndexError,
    interrupt_the_model: KeyboardInterrupt,
}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), EDITS), min_size=1, max_size=5),
    st.sampled_from([None, *ENDS]),
    st.integers(0, 5),
    st.integers(0, 5),
)
@on_all_families
def test_nothing_stays_behind_whatever_ends_a_nesting(family, plan, end, depth, caught):
    """Two models, changed in turns: a failure at `depth` is caught at `caught`, and each level ends as it began."""
    pair = [MODELS[family], MODELS[tiny.FAMILIES[tiny.FAMILIES.index(family) - 1]]]
    bits = [Bits(lm) for lm in pair]
    depth = min(depth, len(plan))
    caught = min(caught, depth)

    def said():
        return [logits(lm, b.batch) for lm, b in zip(pair, bits, strict=True)]

    def walk(level):
        before = said()
        if level == len(plan) or level == depth and end is not None:
            return end and end(pair[plan[min(level, len(plan) - 1)][0]])
        which, edit = plan[level]
        swallow = contextlib.suppress(ENDS[end]) if end and level == caught else contextlib.nullcontext()
        with swallow:
            try:
                with context(pair[which], edit):
                    assert torch.equal(said()[1 - which], before[1 - which])
                    walk(level + 1)
            finally:
                assert all(map(torch.equal, said(), before))

    with pytest.raises(ENDS[end]) if end and caught == depth else contextlib.nullcontext():
        walk(0)
    for one in bits:
        one.check()


@on_all_families
def test_a_model_says_that_it_is_touched_inside_and_only_there(family):
    lm = MODELS[family]
    before = Bits(lm)
    for kind in (*KINDS, "edited"):
        with context(lm, Edit(kind, NEURONS)):
            assert lm.is_modified
        before.check()


@on_all_families
def test_a_run_that_failed_leaves_no_target_position_to_the_next(family):
    lm, edit = MODELS[family], Edit("enhance", NEURONS, "target")
    short = padded(lm, prompts=PROMPTS[:1])
    captured = capture(lm, [encode(lm, queries(lm)[0])])
    with context(lm, edit):
        want = logits(lm, short)
    for end, error in ENDS.items():
        with context(lm, edit):
            with pytest.raises(error):
                end(lm)
            assert torch.equal(logits(lm, short), want)
            if error is not KeyboardInterrupt:
                with pytest.raises(error):
                    end(lm)
                with pytest.raises(RuntimeError, match="whole model"):
                    replay(captured, [Change(0, torch.tensor([0]), captured.sites["neuron"][0])])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_model_without_a_mask_fails_at_the_target_and_works_at_all_positions(family):
    lm = MODELS[family]
    before, ids = Bits(lm), torch.tensor([[2, 7, 8, 3]])
    plain = lm.model(ids).logits
    with pytest.raises(ValueError, match="no mask token"), suppress(lm, list(NEURONS)):
        lm.model(ids)
    before.check()
    with suppress(lm, list(NEURONS), position="all"):
        assert not torch.equal(lm.model(ids).logits, plain)
    before.check()


def test_embeddings_without_ids_have_no_target_position():
    lm = MODELS["gpt2"]
    before = Bits(lm)
    with pytest.raises(ValueError, match="input_ids"), suppress(lm, list(NEURONS)):
        lm.model(inputs_embeds=torch.ones(1, 3, 16))
    before.check()


# Out of place


@contextlib.contextmanager
def watched(module, on_input=True):
    """The states that pass a module's input or output, as leaves that take gradients, and copies of their numbers."""
    states, copies = [], []

    def leaf(x):
        x = x.detach().requires_grad_() if not x.requires_grad else x
        states.append(x)
        copies.append(x.detach().clone())
        return x

    if on_input:
        hook = module.register_forward_pre_hook(lambda _, x: (leaf(x[0]), *x[1:]))
    else:
        hook = module.register_forward_hook(lambda _, x, out: leaf(out))
    try:
        yield states, copies
    finally:
        hook.remove()


@pytest.mark.parametrize("position", ["all", "target"])
@on_all_families
def test_gradients_flow_as_through_hooks_written_by_hand(family, position):
    lm = MODELS[family]
    batch = padded(lm)
    rows = torch.arange(len(batch.target))
    embedding = lm.model.get_input_embeddings()
    for kind in KINDS:
        for site in arch.NEURON_SITES:
            slopes = []
            for change in (context, lambda lm, edit: by_hand(lm, edit, batch.target)):
                with watched(embedding, on_input=False) as (states, _), change(lm, Edit(kind, NEURONS, position, site)):
                    out = lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits
                    slopes += torch.autograd.grad(out[rows, batch.target, 9].sum(), states)
            assert slopes[0].abs().max() > 1e-4
            torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_gradients_reach_embeddings_that_were_passed_in(family):
    lm = MODELS[family]
    batch = padded(lm)
    given = lm.model.get_input_embeddings()(batch.ids).detach().requires_grad_()
    before = given.detach().clone()
    edit = Edit("enhance", {(1, 4): FACTOR}, "all")
    slopes = []
    for change in (context(lm, edit), by_hand(lm, edit, batch.target)):
        with change:
            out = lm.model(inputs_embeds=given, attention_mask=batch.mask).logits
            slopes += torch.autograd.grad(out[batch.mask.bool()].square().sum(), given)
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-4)
    assert torch.equal(given.detach(), before)


@pytest.mark.parametrize("position", ["all", "target"])
@on_all_families
def test_the_gradient_of_a_neuron_is_zero_where_it_is_replaced_and_scaled_where_it_is(family, position):
    lm = MODELS[family]
    batch = padded(lm)
    rows = torch.arange(len(batch.target))
    module = lm.blocks[1].get_submodule(PROJECTION[family])
    for kind, scale in {"suppress": 0.0, "set": 0.0, "enhance": FACTOR}.items():
        edit = Edit(kind, {(1, 5): FACTOR, (1, 9): 1.0}, position)
        with watched(module) as (before, copies), context(lm, edit), watched(module) as (after, _):
            out = lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits[rows, batch.target, 9].sum()
        slopes_before, slopes_after = torch.autograd.grad(out, [before[0], after[0]])
        want = slopes_after.clone()
        for i in (5, 9):
            if position == "all":
                want[..., i] *= scale
            else:
                want[rows, batch.target, i] *= scale
        torch.testing.assert_close(slopes_before, want)
        assert slopes_after[rows, batch.target, 5].abs().min() > 0
        assert torch.equal(before[0].detach(), copies[0])


@on_all_families
def test_the_state_that_comes_in_is_not_written_to(family):
    lm = MODELS[family]
    module = lm.blocks[1].get_submodule(PROJECTION[family])
    for kind in KINDS:
        for position in ("all", "target"):
            with torch.no_grad(), watched(module) as (states, copies), context(lm, Edit(kind, {(1, 5): 2.0}, position)):
                logits(lm, padded(lm))
            assert torch.equal(states[0], copies[0])


# Weight edits


def add_dense(model, family: str, block: int, matrix) -> None:
    """Write `matrix` [neuron, hidden] into the weights of a copy."""
    weight = arch.module_at(model, arch.SPECS[family].blocks, "blocks")[block].get_submodule(PROJECTION[family]).weight
    change = matrix if family == "gpt2" else matrix.T
    with torch.no_grad():
        weight.copy_((weight.float() + change).to(weight.dtype))


def random_deltas(*blocks: int, rank: int = 2, seed: int = 0) -> list[Delta]:
    made = torch.Generator().manual_seed(seed)
    return [
        Delta(b, torch.randn(rank, 24, generator=made), 0.3 * torch.randn(rank, 16, generator=made)) for b in blocks
    ]


def dense(delta: Delta):
    """Σ_r neurons[r] ⊗ hidden[r], one outer product after the other."""
    return sum(torch.outer(a, b) for a, b in zip(delta.neurons, delta.hidden, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
@on_all_families
def test_a_delta_equals_a_dense_matrix_added_to_a_copy_of_the_model(family, rank, dtype):
    lm = tiny.lm(family, dtype=dtype)
    batch = padded(lm)
    (delta,) = random_deltas(1, rank=rank)
    copied = copy.deepcopy(lm.model)
    add_dense(copied, family, 1, dense(delta))
    before = dict(lm.model.named_parameters())
    with edited(lm, delta):
        inside = dict(lm.model.named_parameters())
        got = logits(lm, batch)
    want = logits(replace(lm, model=copied), batch)
    assert (got - logits(lm, batch)).abs().max() > 1e-2
    torch.testing.assert_close(got, want, **({} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.02}))
    assert got.dtype is dtype and all(p.dtype is dtype and not p.requires_grad for p in inside.values())
    changed = [name for name in before if inside[name] is not before[name]]
    assert len(changed) == 1 and f".1.{PROJECTION[family]}.weight" in changed[0]
    assert inside[changed[0]].shape == before[changed[0]].shape
    assert not lm.is_modified


@on_all_families
def test_deltas_add_up_within_a_context_and_across_contexts(family):
    lm = MODELS[family]
    batch = padded(lm)
    some = random_deltas(0, 2, 0, 1, 2)
    plain = logits(lm, batch)
    copied = copy.deepcopy(lm.model)
    for delta in some:
        add_dense(copied, family, delta.block, dense(delta))
    want = logits(replace(lm, model=copied), batch)
    with edited(lm, *some):
        torch.testing.assert_close(logits(lm, batch), want, atol=2e-5, rtol=1e-4)
    with edited(lm, some[0]), edited(lm, *some[1:3]), edited(lm, *some[3:]):
        torch.testing.assert_close(logits(lm, batch), want, atol=2e-5, rtol=1e-4)
        with edited(lm, *(replace(delta, hidden=-delta.hidden) for delta in some)):
            torch.testing.assert_close(logits(lm, batch), plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_delta_leaves_the_other_rows_bit_for_bit_in_every_dtype(dtype):
    lm = tiny.lm("llama", dtype=dtype)
    with torch.no_grad():
        for parameter in lm.model.parameters():  # numbers that need all digits of the dtype
            parameter.mul_(1 + torch.rand_like(parameter) / 3)
    old = arch.value_vectors(lm.model, lm.spec, 1).clone()
    with edited(lm, Delta(1, torch.eye(24)[7][None], torch.ones(1, 16))):
        new = arch.value_vectors(lm.model, lm.spec, 1)
        rest = torch.arange(24) != 7
        assert new.dtype is dtype and torch.equal(new[rest], old[rest])
        torch.testing.assert_close(new[7], old[7] + 1)


def test_a_delta_is_a_constant_to_the_model():
    lm = MODELS["llama"]
    (delta,) = random_deltas(1)
    with edited(lm, replace(delta, neurons=delta.neurons.requires_grad_())):
        assert not logits(lm, padded(lm)).requires_grad


def output_embeddings(lm):
    """Where each family keeps the vectors that the last hidden state is multiplied by."""
    paths = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder"}
    return lm.model.get_submodule(paths.get(lm.spec.family, "lm_head")).weight


@on_all_families
def test_a_value_update_subtracts_the_old_word_and_adds_the_new(family):
    lm = MODELS[family]
    prompt = "the capital of France is" + (" [MASK] ." if lm.spec.masked else "")
    query, neurons = Query(prompt, "Paris red", "France"), [(2, 5), (0, 1), (2, 17)]
    vocabulary = lm.tokenizer.get_vocab()
    paris, madrid = (output_embeddings(lm)[vocabulary[word]] for word in ("Paris", "Madrid"))
    old = [arch.value_vectors(lm.model, lm.spec, block).clone() for block in range(3)]
    for options, (less, more) in (({}, (1, 8)), ({"scale": (0.5, 3.0)}, (0.5, 3.0))):
        with edited(lm, *value_update(lm, query, "Madrid cat", neurons, **options)):
            for block in range(3):
                want = old[block].clone()
                for b, i in neurons:
                    if b == block:
                        want[i] += more * madrid - less * paris
                got = arch.value_vectors(lm.model, lm.spec, block)
                torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
                same = torch.tensor([(block, i) not in neurons for i in range(24)])
                assert torch.equal(got[same], old[block][same])


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_a_value_update_of_an_active_neuron_makes_the_new_word_likelier_than_the_old(family):
    """In the last block a value vector is read by the head as it is, so an active neuron says what it was told to."""
    lm = MODELS[family]
    query = Query("the capital of France is", "Paris", "France")
    encoded = encode(lm, query)
    old, new = (lm.tokenizer.get_vocab()[word] for word in ("Paris", "Madrid"))
    index = int(capture(lm, [encoded]).sites["neuron"][2][0].argmax())
    ids = torch.tensor([encoded.ids])
    before = lm.model(ids).logits[0, -1]
    with edited(lm, *value_update(lm, query, "Madrid", [(2, index)])):
        after = lm.model(ids).logits[0, -1]
    assert after[new] > after[old]
    assert after[new] - after[old] > before[new] - before[old] + 1


# Attribution and replay inside


def queries(lm):
    tail = " [MASK] ." if lm.spec.masked else ""
    return [Query(f"the capital of France is{tail}", "Paris"), Query(f"Anna saw these{tail}", "books")]


@on_all_families
def test_attribution_under_an_intervention_is_that_of_the_changed_model(family):
    lm = MODELS[family]
    nodes, weights = rule("gauss", 4)
    neurons = [(0, 3), (1, 8), (1, 20)]
    for change in (suppress(lm, neurons, position="all"), enhance(lm, neurons, 2.5, position="all")):
        with change:
            got = attribute(lm, queries(lm), steps=4)
            want = torch.stack([naive.attribution(lm, encode(lm, q), nodes, weights) for q in queries(lm)])
        torch.testing.assert_close(got.scores, want, atol=2e-6, rtol=1e-3)


@on_all_families
def test_a_suppressed_neuron_has_score_zero_and_stored_scores_are_not_mixed_up(family):
    lm = MODELS[family]
    neurons = [(0, 3), (1, 8), (2, 20)]
    before = attribute(lm, queries(lm), steps=4)
    with suppress(lm, neurons, position="all"):
        inside = attribute(lm, queries(lm), steps=4)
    with edited(lm, *random_deltas(1)):
        rewritten = attribute(lm, queries(lm), steps=4)
    for block, index in neurons:
        assert (inside.scores[:, block, index] == 0).all()
        assert (before.scores[:, block, index] != 0).all()
    assert not torch.equal(rewritten.probability, before.probability)
    assert not torch.equal(inside.probability, before.probability)
    assert torch.equal(attribute(lm, queries(lm), steps=4).scores, before.scores)
    assert torch.equal(attribute(lm, queries(lm), steps=4, store=False).scores, before.scores)


@on_all_families
def test_replay_cannot_know_the_target_position_and_says_so(family):
    lm = MODELS[family]
    before = Bits(lm)
    with suppress(lm, [(0, 3)]), pytest.raises(RuntimeError, match="position='all'"):
        attribute(lm, queries(lm), steps=4)
    before.check()
    with suppress(lm, [(1, 3)]):
        captured = capture(lm, [encode(lm, query) for query in queries(lm)])  # a whole run: works
        assert (captured.sites["neuron"][1][:, 3] == 0).all()
        change = [Change(0, torch.tensor([0]), captured.sites["neuron"][0][:1])]
        with pytest.raises(RuntimeError, match="whole model"):
            replay(captured, change)
    before.check()


# Bad input


def half_spec(lm):
    sites = {name: site for name, site in lm.spec.sites.items() if name != "published"}
    return replace(lm, spec=replace(lm.spec, sites=sites))


N = [(0, 3), (1, 8)]
ONE = Delta(1, torch.ones(1, 24), torch.ones(1, 16))
BAD = {
    "empty": (lambda lm: suppress(lm, []), "must not be empty"),
    "twice": (lambda lm: suppress(lm, [(0, 3), (1, 8), (0, 3)]), r"neuron \(0, 3\) is given twice"),
    "block": (lambda lm: suppress(lm, [(3, 0)]), r"\(3, 0\) does not exist; tiny-.* blocks 0 to 2, neurons 0 to 23"),
    "index": (lambda lm: suppress(lm, [(0, 0), (0, 24)]), r"neuron \(0, 24\) does not exist"),
    "negative block": (lambda lm: suppress(lm, [(-1, 0)]), r"neuron \(-1, 0\) does not exist"),
    "negative index": (lambda lm: suppress(lm, [(0, -1)]), r"neuron \(0, -1\) does not exist"),
    "float block": (lambda lm: suppress(lm, [(0.0, 1)]), r"whole numbers, got \(0\.0, 1\)"),
    "float index": (lambda lm: suppress(lm, [(0, 1.0)]), r"whole numbers, got \(0, 1\.0\)"),
    "triple": (lambda lm: suppress(lm, [(0, 1, 2)]), r"a pair .* got \(0, 1, 2\)"),
    "one neuron, no list": (lambda lm: suppress(lm, (0, 1)), r"a pair .* got \(0,\)"),
    "position": (lambda lm: suppress(lm, N, position="last"), "unknown position 'last'; choose 'target' or 'all'"),
    "site": (lambda lm: suppress(lm, N, site="mlp"), r"at site 'mlp'; \w+ has neuron, published"),
    "no such site": (lambda lm: suppress(half_spec(lm), N, site="published"), r"site 'published'; \w+ has neuron$"),
    "enhance nothing": (lambda lm: enhance(lm, [], 2.0), "must not be empty"),
    "enhance twice": (lambda lm: enhance(lm, [N[0], N[0]]), "given twice"),
    "factor nan": (lambda lm: enhance(lm, N, float("nan")), "finite number of torch.float32, got nan"),
    "factor inf": (lambda lm: enhance(lm, N, float("-inf")), "finite number of torch.float32, got -inf"),
    "set nothing": (lambda lm: set_neurons(lm, [], 1.0), "must not be empty"),
    "set twice": (lambda lm: set_neurons(lm, [N[0], N[0]], [1.0, 2.0]), "given twice"),
    "few values": (lambda lm: set_neurons(lm, N, [1.0]), "2 neurons but 1 values"),
    "many values": (lambda lm: set_neurons(lm, N, [1.0, 2.0, 3.0]), "2 neurons but 3 values"),
    "value nan": (lambda lm: set_neurons(lm, N, [1.0, float("nan")]), "finite number"),
    "value inf": (lambda lm: set_neurons(lm, N, float("inf")), "a finite number of torch.float32, got inf"),
    "no delta": (lambda lm: edited(lm), "at least one"),
    "delta block": (lambda lm: edited(lm, ONE, replace(ONE, block=3)), "block 3 does not exist; .* blocks 0 to 2"),
    "delta negative block": (lambda lm: edited(lm, replace(ONE, block=-1)), "block -1 does not exist"),
    "delta neurons": (
        lambda lm: edited(lm, ONE, replace(ONE, neurons=torch.ones(1, 23))),
        r"block 1 has widths \(23, 16\); expected \(24, 16\)",
    ),
    "delta hidden": (lambda lm: edited(lm, replace(ONE, hidden=torch.ones(1, 24))), r"\(24, 24\); expected"),
    "delta swapped": (lambda lm: edited(lm, Delta(1, ONE.hidden, ONE.neurons)), "expected"),
    "delta ranks": (lambda lm: edited(lm, replace(ONE, hidden=torch.ones(2, 16))), "expected"),
    "delta dense": (lambda lm: edited(lm, Delta(1, torch.ones(24), torch.ones(16))), "expected"),
    "delta nan": (lambda lm: edited(lm, ONE, replace(ONE, hidden=ONE.hidden * float("nan"))), "not all finite"),
    "delta inf": (lambda lm: edited(lm, replace(ONE, neurons=ONE.neurons * float("inf"))), "not all finite"),
    "delta sum": (lambda lm: edited(lm, *[replace(ONE, hidden=ONE.hidden * 3e38)] * 2), "not finite"),
    "update nothing": (lambda lm: value_update(lm, queries(lm)[0], "Madrid", []), "must not be empty"),
    "update nowhere": (lambda lm: value_update(lm, queries(lm)[0], "Madrid", [(0, 99)]), "does not exist"),
    "update by inf": (
        lambda lm: edited(lm, *value_update(lm, queries(lm)[0], "Madrid", N, (1.0, float("inf")))),
        "scale must be a finite number",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bad_input_is_refused_before_anything_changes(family, name):
    lm = MODELS[family]
    before = Bits(lm)
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        with call(lm):
            pytest.fail("the body ran")
    before.check()


def test_a_delta_too_large_for_the_dtype_is_refused():
    lm = tiny.lm("llama", dtype=torch.float16)
    big = replace(ONE, hidden=ONE.hidden * 1e5)
    with pytest.raises(ValueError, match=r"block 1 .* not finite in torch.float16"), edited(lm, big):
        pytest.fail("the body ran")
    assert not lm.is_modified
    with edited(tiny.lm("llama"), big):
        pass


# Rows with deltas of their own


def some_deltas(lm):
    """Deltas of one and two blocks, of rank one and two, two of one block, and none."""
    torch.manual_seed(5)
    width, hidden = lm.n_neurons, lm.model.config.hidden_size

    def one(block, rank):
        return Delta(block, torch.randn(rank, width), torch.randn(rank, hidden))

    return [[one(0, 1)], [], [one(1, 2), one(2, 1), one(1, 1)]]


@on_all_families
@pytest.mark.parametrize("side", ["right", "left"])
def test_each_row_is_that_of_a_model_with_its_own_deltas(family, side):
    lm = MODELS[family]
    if side == "left" and lm.spec.masked:
        side = "right"
    batch, deltas = padded(lm, side), some_deltas(lm)
    place = (batch.mask.cumsum(1) - 1).clamp_min(0)
    options = {} if lm.spec.masked else {"position_ids": place}
    inputs = dict(input_ids=batch.ids, attention_mask=batch.mask, **options)
    with torch.no_grad():
        with edited_rows(lm, deltas):
            assert lm.is_modified
            got = lm.model(**inputs).logits
        for row, some in enumerate(deltas):
            with edited(lm, *some) if some else contextlib.nullcontext():
                want = lm.model(**inputs).logits[row]
            real = batch.mask[row].bool()
            torch.testing.assert_close(got[row][real], want[real], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(got[0], lm.model(**inputs).logits[0], atol=1e-2)


def test_a_batch_of_another_number_of_rows_is_refused():
    lm = MODELS["llama"]
    for n in (1, 4):
        with pytest.raises(ValueError, match=f"a batch of {n} rows, but deltas for 3; give one list a row"):
            with edited_rows(lm, some_deltas(lm)):
                lm.model(input_ids=torch.ones(n, 4, dtype=torch.long))
        assert not lm.is_modified


def test_rows_of_deltas_that_do_not_fit_the_model_are_refused_and_leave_no_hook():
    lm = MODELS["gpt2"]
    good = Delta(0, torch.ones(1, 24), torch.ones(1, 16))
    for bad, words in (
        (replace(good, block=3), "block 3 does not exist"),
        (replace(good, block=1, neurons=torch.ones(1, 23)), "has widths"),
        (replace(good, block=1, hidden=torch.ones(1, 24)), "has widths"),
    ):
        with pytest.raises(ValueError, match=words):
            with edited_rows(lm, [[good], [bad]]):
                pass
        assert not lm.is_modified
