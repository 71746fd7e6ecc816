"""The table of families against models built from their configurations."""

from dataclasses import replace

import pytest
import tiny
import torch
import transformers

from kncore import arch
from kncore.arch import SPECS, Site


def test_the_table_and_the_tiny_models_hold_the_same_families():
    assert set(SPECS) == set(tiny.FAMILIES)
    assert {"bert", "roberta", "gpt2", "gpt_neox", "llama", "qwen2", "mistral"} <= set(SPECS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_path_of_a_family_exists_in_a_model_that_transformers_builds(family):
    model, spec = tiny.model(family), arch.spec_for(family)
    arch.check(model, spec)
    assert spec.family == model.config.model_type == family
    blocks = arch.module_at(model, spec.blocks, "blocks")
    assert len(blocks) == model.config.num_hidden_layers
    assert arch.value_vectors(model, spec, 0).shape == (24, 16)
    head = arch.module_at(model, spec.head, "language-model head")
    assert head(torch.zeros(1, 16)).shape == (1, tiny.VOCAB)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_value_vector_is_what_one_unit_of_its_neuron_adds(family):
    """Read off the residual stream itself; in BERT-like models, whose sum is normalised, before the normalisation."""
    model, spec = tiny.model(family).double(), arch.spec_for(family)
    unit = None

    def add(_, args):
        return None if unit is None else (args[0] + torch.eye(24, dtype=torch.float64)[unit], *args[1:])

    seen = []
    for depth, block in enumerate(arch.module_at(model, spec.blocks, "blocks")):
        projection = arch.module_at(block, spec.sites["neuron"].path, "neuron site")
        read = arch.module_at(block, spec.sites["mlp"].path, "mlp site") if spec.masked else block
        hooks = [
            projection.register_forward_pre_hook(add),
            read.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)),
        ]
        for unit in (None, 0, 7, 23):  # noqa: B007 - read by the hook
            model(torch.tensor([[5, 9, 11]]))
        for hook in hooks:
            hook.remove()
        plain, *raised = [states.reshape(-1, 16) for states in seen]
        seen.clear()
        vectors = arch.value_vectors(model, spec, depth)
        for i, states in zip((0, 7, 23), raised, strict=True):
            torch.testing.assert_close(states - plain, vectors[i].expand_as(plain), atol=1e-9, rtol=1e-7)


def test_linear_and_conv1d_are_read_the_right_way_round():
    gpt2, llama = tiny.model("gpt2"), tiny.model("llama")
    down = llama.model.layers[1].mlp.down_proj
    proj = gpt2.transformer.h[1].mlp.c_proj
    assert isinstance(down, torch.nn.Linear) and isinstance(proj, transformers.pytorch_utils.Conv1D)
    assert torch.equal(arch.value_vectors(llama, SPECS["llama"], 1)[3], down.weight[:, 3])
    assert torch.equal(arch.value_vectors(gpt2, SPECS["gpt2"], 1)[3], proj.weight[3])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("site", ["neuron", "published", "mlp", "attention"])
def test_a_wrong_path_says_what_was_looked_for_and_what_is_there(family, site):
    model, spec = tiny.model(family), arch.spec_for(family)
    wrong = replace(spec, sites={**spec.sites, site: Site("no_such.module", "input")})
    with pytest.raises(ValueError) as error:
        arch.check(model, wrong)
    block = arch.module_at(model, spec.blocks, "blocks")[0]
    for said in (f"{site} site", "'no_such.module'", "has no 'no_such'", *dict(block.named_children())):
        assert said in str(error.value)


def test_every_block_is_checked_not_only_the_first():
    model = tiny.model("llama")
    del model.model.layers[2].mlp.gate_proj
    with pytest.raises(ValueError, match="published site at 'mlp.gate_proj'.*has no 'gate_proj'.*up_proj, down_proj"):
        arch.check(model, SPECS["llama"])


@pytest.mark.parametrize(
    "built, family, said",
    [
        (lambda: transformers.BertModel(tiny.CONFIGS["bert"]), "bert", "blocks at 'bert.encoder.layer' in BertModel"),
        (
            lambda: transformers.BertForSequenceClassification(tiny.CONFIGS["bert"]),
            "bert",
            "language-model head at 'cls' .* has no 'cls' .it has bert, dropout, classifier",
        ),
        (
            lambda: transformers.LlamaForSequenceClassification(tiny.CONFIGS["llama"]),
            "llama",
            "language-model head at 'lm_head' .* has no 'lm_head' .it has model, score",
        ),
        (lambda: tiny.model("gpt2"), "llama", "blocks at 'model.layers' in GPT2LMHeadModel"),
    ],
    ids=["base", "classifier", "causal-classifier", "other-family"],
)
def test_an_absent_head_is_refused(built, family, said):
    with pytest.raises(ValueError, match=said) as error:
        arch.check(built(), SPECS[family])
    assert "with its language-model head" in str(error.value)


def test_an_absent_final_norm_and_a_path_to_no_list_are_refused():
    model = tiny.model("gpt2")
    with pytest.raises(ValueError, match="list of blocks at 'transformer.h.0', found GPT2Block"):
        arch.check(model, replace(SPECS["gpt2"], blocks="transformer.h.0"))
    with pytest.raises(ValueError, match="final norm at 'transformer.norm'"):
        arch.check(model, replace(SPECS["gpt2"], norm="transformer.norm"))


def test_a_projection_that_does_not_end_in_the_residual_stream_is_refused():
    spec = SPECS["llama"]
    wrong = replace(spec, sites={**spec.sites, "neuron": Site("mlp.gate_proj", "input")})
    with pytest.raises(ValueError, match="width 24, the residual stream 16"):
        arch.check(tiny.model("llama"), wrong)


@pytest.mark.parametrize("model_type", ["t5", "opt", ""])
def test_an_unsupported_family_lists_those_that_work(model_type):
    with pytest.raises(ValueError) as error:
        arch.spec_for(model_type)
    assert repr(model_type) in str(error.value)
    assert all(family in str(error.value) for family in tiny.FAMILIES)
