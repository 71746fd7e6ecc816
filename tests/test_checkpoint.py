"""Model folders: what stands for one, and what is refused when it is loaded, with the true cause."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from kncore import arch, checkpoint, models, rome, zoo
from kncore.arch import spec_for
from kncore.models import load
from kncore.zoo import REGISTRY


def save(folder, family="llama"):
    """A tiny model as a folder of the kind `save_pretrained` leaves; the folder."""
    tiny.model(family).save_pretrained(folder)
    tiny.tokenizer(spec_for(family).masked).save_pretrained(folder)
    return Path(folder)


def rewrite(folder, name="config.json", **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def weights(folder, change):
    """Rewrite model.safetensors by `change`, which takes and gives a dict of tensors."""
    held = change({name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()})
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, below="", unlisted=()):
    """Split model.safetensors in two, put into a subfolder if `below` names one, with an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    named = {}
    for i in (0, 1):
        part = {name: tensor for k, (name, tensor) in enumerate(sorted(held.items())) if k % 2 == i}
        file = f"{below}model-{i + 1:05}-of-00002.safetensors"
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        save_file(part, folder / file, metadata={"format": "pt"})
        named |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": {k: v for k, v in named.items() if k not in unlisted}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ------------------------------------------------------------------------------------ the revision of a folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "mine")


def change_file(name):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("ab") as file:
            file.write(b"\n ")

    return change


@pytest.mark.kind("tokenizer-in-identity")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_the_revision_changes_with_each_file_that_is_read(folder, name):
    before = models.identity(folder)
    change_file(name)(folder)
    assert models.identity(folder)[1] != before[1]


@pytest.mark.kind("tokenizer-in-identity", own=True)
@pytest.mark.parametrize(
    "name",
    [
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "vocab.bpe",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "tokenizer.4.0.json",
    ],
)
def test_the_revision_changes_with_every_file_that_a_tokenizer_may_be_read_from(folder, name):
    before = models.identity(folder)
    (folder / name).write_text("{}")
    assert models.identity(folder)[1] != before[1]


@pytest.mark.kind("tokenizer-in-identity")
@pytest.mark.parametrize("below", ["", "parts/", "../elsewhere/"])
def test_the_revision_changes_with_shards_wherever_the_index_points_and_with_the_index(folder, below):
    whole = load(folder)
    shard(folder, below)
    before = load(folder)
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(before.model(ids).logits, whole.model(ids).logits)
    part = folder / f"{below}model-00002-of-00002.safetensors"
    held = load_file(part)
    save_file({name: tensor + 1 for name, tensor in held.items()}, part, metadata={"format": "pt"})
    after = load(folder)
    assert (after.name, after.revision) == models.identity(folder) and after.revision != before.revision
    change_file("model.safetensors.index.json")(folder)
    assert models.identity(folder)[1] not in (before.revision, after.revision)


@pytest.mark.kind("tokenizer-in-identity", own=True)
def test_the_revision_stays_with_files_that_decide_no_number(folder, tmp_path):
    before = models.identity(folder)
    for name in (
        "README.md",
        ".git/HEAD",
        "trainer_state.json",
        "runs/events",
        "generation_config.json",
        "x.safetensors",
    ):
        change_file(name)(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    assert models.identity(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert models.identity(tmp_path / "copy")[1] == before[1]


@pytest.mark.kind("tokenizer-in-identity", own=True)
def test_the_revision_of_a_model_that_comes_with_the_package_changes_with_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path)
    save(tmp_path / "controlled-llama")
    before = load("controlled-llama")
    assert models.identity("controlled-llama") == ("controlled-llama", before.revision)
    change_file("tokenizer.json")(tmp_path / "controlled-llama")
    assert load("controlled-llama").revision != before.revision


# ---------------------------------------------------------------------------------------- the name of a folder


@pytest.mark.kind("folder-named-like-a-model")
def test_a_folder_called_like_a_registered_model_has_another_name_and_not_its_settings(tmp_path):
    lm = load(save(tmp_path / "smollm2-135m"))
    assert lm.name == f"smollm2-135m@{lm.revision[:8]}" and lm.name not in REGISTRY
    assert (lm.name, lm.revision) == models.identity(str(tmp_path / "smollm2-135m"))
    assert rome.hparams_for(lm) != rome.HPARAMS["smollm2-135m"]


@pytest.mark.kind("folder-named-like-a-model")
def test_two_folders_of_one_name_are_two_models(tmp_path):
    first, second = (save(tmp_path / way / "checkpoint-500") for way in "ab")
    weights(second, lambda held: {name: tensor * 2 for name, tensor in held.items()})
    assert load(first).name != load(second).name


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_one_folder_has_one_name_however_it_is_reached(folder, monkeypatch):
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for way in (".", "../mine", "../link", "../mine/", f"{folder}/.", "~/mine", Path("../mine"), folder):
        assert models.identity(way) == models.identity(str(folder))


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_a_path_object_is_a_folder_and_a_text_a_registered_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "controlled-gpt2")
    assert models.identity("controlled-gpt2")[0] == "controlled-gpt2"
    name, revision = models.identity(Path("controlled-gpt2"))
    assert name == f"controlled-gpt2@{revision[:8]}"
    lm = load(Path("controlled-gpt2"))
    assert (lm.name, lm.spec.family) == (name, "llama")
    with pytest.raises(ValueError, match="unknown model '/.*/gpt2'"):
        load(Path("gpt2"))


@pytest.mark.kind("folder-named-like-a-model", own=True)
@pytest.mark.parametrize(
    "name, plain",
    [
        ("my model", "my-model"),
        ("<script>alert(1)</script>"[:8], "script"),
        ("=1+1", "1-1"),
        (".hidden", "hidden"),
        ("a\nb\t\x7f", "a-b"),
        ("модель", "folder"),
        ("x" * 200, "x" * 60),
        ("v1.0_final-2", "v1.0_final-2"),
        ("a|b`c$d&e@f", "a-b-c-d-e-f"),
        ("-rf", "rf"),
    ],
)
def test_the_name_of_any_folder_is_safe_in_a_path_and_on_a_page(tmp_path, name, plain):
    found, revision = models.identity(save(tmp_path / name, "gpt2"))
    assert found == f"{plain}@{revision[:8]}"


# ------------------------------------------------------------------------------- what is refused, with its cause


def refused(folder, said, **options):
    """The model is refused by one line that holds the folder and what is said."""
    with pytest.raises(ValueError, match=said) as error:
        load(folder, **options)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert "intact copy" not in str(error.value) or "damaged" in str(error.value)
    return str(error.value)


def checked_early(folder, said):
    """It is refused from its files alone too, before a run begins."""
    refused(folder, said)
    for ask in (models.check, models.identity):
        with pytest.raises(ValueError, match=said):
            ask(str(folder))


def with_tokens(folder, *words, masked=False, **special):
    tokenizer = tiny.tokenizer(masked)
    if words:
        tokenizer.add_tokens(list(words))
    if special:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


@pytest.mark.kind("pad-outside-embeddings")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pad_token_beyond_the_embeddings_is_refused(tmp_path, family):
    with_tokens(save(tmp_path, family), pad_token="<pad>")
    refused(tmp_path, f"1 tokens beyond the model's {tiny.VOCAB} embeddings, the first '<pad>' with id {tiny.VOCAB}")


@pytest.mark.kind("pad-outside-embeddings", own=True)
def test_a_pad_token_of_the_configuration_beyond_the_embeddings_is_refused(folder):
    rewrite(folder, pad_token_id=tiny.VOCAB)
    checked_early(folder, f"'pad_token_id' is {tiny.VOCAB}, beyond the {tiny.VOCAB} embeddings")


@pytest.mark.kind("pad-outside-embeddings", own=True)
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_an_added_word_beyond_the_embeddings_is_refused(tmp_path, family):
    with_tokens(save(tmp_path, family), "Berlin", "Rome", masked=family == "bert")
    refused(tmp_path, "2 tokens beyond .* the first 'Berlin'")


@pytest.mark.kind("pad-outside-embeddings", own=True)
def test_an_id_that_only_the_template_of_the_tokenizer_adds_is_refused(tmp_path):
    file = save(tmp_path, "bert") / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [99]
    file.write_text(json.dumps(content))
    refused(tmp_path, "the first 'what it adds to each text' with id 99")


@pytest.mark.kind("pad-outside-embeddings", own=True)
def test_a_tokenizer_without_a_pad_token_and_a_table_larger_than_needed_are_fine(tmp_path):
    model = tiny.model("gpt2")
    model.resize_token_embeddings(tiny.VOCAB + 7)
    model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer(False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer.pad_token_id is None


@pytest.mark.kind("slow-tokenizer")
@pytest.mark.parametrize("kind", ["ByT5Tokenizer", "CanineTokenizer"])
def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path, kind):
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**tiny._SHAPE, "vocab_size": 2000}))
    model.save_pretrained(tmp_path)
    getattr(transformers, kind)().save_pretrained(tmp_path)
    refused(tmp_path, f"has a tokenizer \\({kind}\\) without a fast version.*save one there")


@pytest.mark.kind("slow-tokenizer", own=True)
def test_a_tokenizer_of_another_class_than_it_was_saved_as_is_not_used(folder, tmp_path):
    """Qwen2's own class makes other tokens of these words than the tokenizer that was saved."""
    save(tmp_path / "qwen", "qwen2")
    assert load(tmp_path / "qwen").tokenizer("the capital")["input_ids"] == [5, 7]
    rewrite(tmp_path / "qwen", "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    refused(tmp_path / "qwen", "as a Qwen2Tokenizer, which splits .* otherwise than tokenizer.json does; set")


@pytest.mark.kind("return-dict")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_how_the_configuration_wraps_outputs_changes_nothing(tmp_path, family):
    lm = load(save(tmp_path, family))
    rewrite(tmp_path, return_dict=False)
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(load(tmp_path).model(ids).logits, lm.model(ids).logits)


@pytest.mark.kind("return-dict", own=True)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"chunk_size_feed_forward": 1},
        {"attn_implementation": "flash_attention_2"},
        {"return_dict": None, "use_cache": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_how_it_is_computed_do_not_reach_the_model(tmp_path, family, settings):
    lm = load(save(tmp_path, family))
    rewrite(tmp_path, **settings)
    changed, ids = load(tmp_path), torch.tensor([[5, 9, 11], [6, 6, 7]])
    torch.testing.assert_close(changed.model(ids).logits, lm.model(ids).logits, atol=1e-5, rtol=1e-5)
    seen = []
    for one in (lm, changed):
        with arch.at_site(one.blocks[1], one.spec.sites["neuron"], lambda state: seen.append(state)):
            one.model(ids)
    assert [state.shape for state in seen] == [(2, 3, lm.n_neurons)] * 2
    assert set(changed.model(ids).keys()) <= {"logits", "past_key_values"}


@pytest.mark.kind("attention-direction")
@pytest.mark.parametrize(
    "family, settings",
    [("llama", {"is_causal": False}), ("bert", {"is_decoder": True}), ("bert", {"add_cross_attention": True})],
)
def test_attention_in_the_wrong_direction_is_refused(tmp_path, family, settings):
    rewrite(save(tmp_path, family), **settings)
    checked_early(
        tmp_path, f"{next(iter(settings))} = (True|False), expected a {family} that .*; give a checkpoint of that"
    )


@pytest.mark.kind("attention-direction", own=True)
@pytest.mark.parametrize(
    "family, settings",
    [
        ("qwen2", {"is_causal": False}),
        ("mistral", {"is_causal": None}),
        ("llama", {"is_causal": 0}),
        ("roberta", {"is_decoder": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("bert", {"is_encoder_decoder": True}),
    ],
)
def test_every_setting_of_direction_is_refused_in_every_family(tmp_path, family, settings):
    rewrite(save(tmp_path, family), **settings)
    checked_early(tmp_path, f"{next(iter(settings))} = ")


@pytest.mark.kind("attention-direction", own=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_direction_is_asked_of_the_model_itself(family, dtype):
    """Whatever turned it: here the attention of one block of three."""
    lm = tiny.lm(family, dtype=dtype)
    given = Path("some-folder"), lm.tokenizer, lm.model, lm.spec
    checkpoint.check_direction(*given)
    if lm.spec.masked:
        lm.model.config.is_decoder = True
        for module in lm.model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = True
        said = "reads from left to right, and is of a family that reads both ways"
    else:
        turn(lm)
        said = "also reads from right to left"
    with pytest.raises(ValueError, match=said):
        checkpoint.check_direction(*given)


def turn(lm):
    """One block passes each state what the next token's state is."""
    block = lm.blocks[1]
    forward = block.forward

    def turned(hidden_states, *args, **kwargs):
        return forward(hidden_states + 0.1 * hidden_states.roll(-1, 1), *args, **kwargs)

    block.forward = turned


@pytest.mark.kind("adapters-and-quantised")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("base", [True, False])
def test_an_adapter_is_refused_with_and_without_its_base(tmp_path, name, base):
    if base:
        save(tmp_path)
    (tmp_path / name).write_text('{"base_model_name_or_path": "x/y"}')
    checked_early(tmp_path, f"holds an adapter \\({name}\\), which would be left out; merge it")


@pytest.mark.kind("adapters-and-quantised", own=True)
@pytest.mark.parametrize("name", ["adapters.safetensors", "pytorch_adapter.bin", "pytorch_lora_weights.safetensors"])
def test_adapters_of_other_packages_are_refused(folder, name):
    (folder / name).write_text("{}")
    checked_early(folder, "holds an adapter")


@pytest.mark.kind("adapters-and-quantised")
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_weights_are_refused(folder, method):
    rewrite(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    checked_early(folder, "is quantised .quantization_config.*`dequantize`")


@pytest.mark.kind("adapters-and-quantised", own=True)
@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_that_says_quantised_is_refused(folder, name):
    (folder / name).write_text("{}")
    checked_early(folder, f"is quantised \\({name}\\)")


@pytest.mark.kind("adapters-and-quantised", own=True)
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_whole_numbers_or_eight_bits_are_refused_whatever_the_configuration_says(folder, kind):
    name = "model.layers.1.mlp.down_proj.weight"
    weights(folder, lambda held: held | {name: held[name].to(kind)})
    checked_early(folder, f"holds {name} as .*quantised weights")


@pytest.mark.kind("unexpected-weights")
@pytest.mark.parametrize(
    "family, depth", [("gpt2", "n_layer"), ("llama", "num_hidden_layers"), ("bert", "num_hidden_layers")]
)
def test_blocks_that_the_configuration_does_not_have_are_refused(tmp_path, family, depth):
    rewrite(save(tmp_path, family), **{depth: 2})
    assert ".2." in refused(tmp_path, "weights that a .* of its config.json does not have .*would be left out")


@pytest.mark.kind("unexpected-weights")
def test_unknown_weights_are_refused_by_name(folder):
    weights(folder, lambda held: held | {"extra.weight": torch.ones(3)})
    refused(folder, "holds 1 weights that a LlamaForCausalLM .* does not have .extra.weight.")


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "lm_head.bias"),
        ("gpt2", "score.weight"),
        ("gpt2", "v_head.summary.weight"),
        ("bert", "classifier.weight"),
        ("bert", "bert.encoder.layer.0.attention.self.distance_embedding.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias2"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, family, name):
    weights(save(tmp_path, family), lambda held: held | {name: torch.ones(4)})
    assert name in refused(tmp_path, "would be left out")


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize(
    "family, extra",
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}),
        ("gpt2", {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}),
        ("bert", {"bert.embeddings.position_ids": torch.arange(64)[None]}),
        ("bert", {"bert.pooler.dense.weight": torch.ones(16, 16), "bert.pooler.dense.bias": torch.ones(16)}),
        ("bert", {"cls.seq_relationship.weight": torch.ones(2, 16), "cls.seq_relationship.bias": torch.ones(2)}),
        ("roberta", {"roberta.pooler.dense.weight": torch.ones(16, 16)}),
        ("roberta", {"roberta.embeddings.position_ids": torch.arange(64)[None]}),
    ],
)
def test_weights_that_no_result_depends_on_may_be_there(tmp_path, family, extra):
    before = load(save(tmp_path, family))
    weights(tmp_path, lambda held: held | extra)
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(load(tmp_path).model(ids).logits, before.model(ids).logits)


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize(
    "family, copy, of",
    [
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("roberta", "lm_head.decoder.bias", "lm_head.bias"),
    ],
)
def test_a_copy_of_a_tied_weight_must_be_equal(tmp_path, family, copy, of):
    before = load(save(tmp_path, family))
    weights(tmp_path, lambda held: held | {copy: held[of].clone()})
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(load(tmp_path).model(ids).logits, before.model(ids).logits)
    weights(tmp_path, lambda held: held | {copy: held[of] + 1})
    refused(tmp_path, f"ties {copy} to {of}, but both are there and differ; set 'tie_word_embeddings' to false")


@pytest.mark.kind("unexpected-weights")
def test_weights_of_another_shape_are_refused_with_both_shapes(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    weights(folder, lambda held: held | {name: held[name][:20].contiguous()})
    refused(folder, f"holds {name} of shape \\(20, 16\\), expected \\(24, 16\\): config.json is that of another model")


@pytest.mark.kind("unexpected-weights", own=True)
def test_a_configuration_with_another_vocabulary_or_width_is_refused_with_both_shapes(folder):
    rewrite(folder, vocab_size=tiny.VOCAB + 1)
    refused(folder, f"of shape \\({tiny.VOCAB}, 16\\), expected \\({tiny.VOCAB + 1}, 16\\)")
    rewrite(folder, vocab_size=tiny.VOCAB, intermediate_size=32)
    refused(folder, r"of shape \(16, 24\), expected \(16, 32\)")


@pytest.mark.kind("unexpected-weights")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_refused_even_for_a_known_type(folder, name):
    rewrite(folder, name, auto_map={"AutoModelForCausalLM": "theirs.Model", "AutoTokenizer": ["theirs.Tok", None]})
    checked_early(folder, f"asks for code of its own .'auto_map' in {name}: .*theirs.*which is not run")


@pytest.mark.kind("unexpected-weights")
@pytest.mark.parametrize(
    "family, named",
    [("gpt2", "GPT2ForSequenceClassification"), ("llama", "LlamaForTokenClassification"), ("bert", "BertLMHeadModel")],
)
def test_a_configuration_that_names_another_kind_of_model_is_refused(tmp_path, family, named):
    rewrite(save(tmp_path, family), architectures=[named])
    refused(tmp_path, f"says {named} .'architectures'., expected one of .*Give a language model")


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize(
    "family, named",
    [
        ("gpt2", ["GPT2Model"]),
        ("bert", ["BertForPreTraining"]),
        ("bert", ["BertForMaskedLM"]),
        ("llama", None),
        ("llama", []),  # as configurations without weights have it
        ("roberta", ["RobertaForMaskedLM", "Another"]),
    ],
)
def test_a_configuration_that_names_the_language_model_or_nothing_is_fine(tmp_path, family, named):
    rewrite(save(tmp_path, family), architectures=named)
    load(tmp_path)


@pytest.mark.kind("unexpected-weights")
def test_shards_that_the_index_names_and_are_not_there_are_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    checked_early(folder, "names 1 of 2 files that are not there .model-00002-of-00002.safetensors.; copy or fetch")


@pytest.mark.kind("unexpected-weights")
def test_weights_in_one_file_and_in_shards_are_refused(folder):
    one = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(one)
    checked_early(folder, "has its weights twice, in model.safetensors and in the 2 files of .*remove one of the two")


@pytest.mark.kind("unexpected-weights")
@pytest.mark.parametrize(
    "name, said",
    [
        ("model.safetensors", "model.safetensors' is damaged .it is empty"),
        ("config.json", "config.json in .* is no JSON .* save it anew"),
        ("tokenizer_config.json", "tokenizer_config.json in .* is no JSON"),
        (
            "tokenizer.json",
            "the tokenizer in .* cannot be loaded .* save it there anew with `tokenizer.save_pretrained`",
        ),
    ],
)
def test_an_empty_file_is_named(folder, name, said):
    (folder / name).write_bytes(b"")
    refused(folder, said)


@pytest.mark.kind("unexpected-weights", own=True)
def test_an_index_that_does_not_fit_its_files_is_refused(folder):
    shard(folder, unlisted=["lm_head.weight"])
    checked_early(folder, "does not fit its files: lm_head.weight stand in one alone")


@pytest.mark.kind("unexpected-weights", own=True)
def test_a_weight_in_two_shards_is_refused(folder):
    shard(folder)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second, metadata={"format": "pt"})
    checked_early(folder, f"has the weight {name} twice, in {first.name} and in {second.name}")


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize(
    "index, said",
    [
        ("", "is no JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"metadata": {}}', "is damaged: expected a file for each weight under 'weight_map'"),
        ('{"metadata": {}, "weight_map": {}}', "is damaged"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "is damaged"),
        ('{"weight_map": {"a": "model.safetensors"}}', "is damaged"),
    ],
)
def test_a_damaged_index_is_named(folder, index, said):
    (folder / "model.safetensors.index.json").write_text(index)
    checked_early(folder, f"model.safetensors.index.json in .* {said}")


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", "`save_pretrained`"),
        ("model.pt", "`save_pretrained`"),
        ("consolidated.00.pth", "`save_pretrained`"),
        ("model.gguf", "name that file itself"),
        ("other.safetensors", "`save_pretrained`"),
    ],
)
def test_weights_in_other_files_are_named(folder, name, remedy):
    (folder / "model.safetensors").rename(folder / name)
    checked_early(folder, f"no weights in safetensors: expected model.safetensors.*{name}.*{remedy}")


@pytest.mark.kind("unexpected-weights", own=True)
def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    checked_early(folder, "is a pointer of Git LFS and not the weights; fetch them with `git lfs pull`")


@pytest.mark.kind("unexpected-weights", own=True)
def test_a_configuration_that_leads_to_other_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "better.safetensors")
    rewrite(folder, transformers_weights="better.safetensors")
    checked_early(folder, "has its weights in 'better.safetensors'; rename that")


@pytest.mark.kind("unexpected-weights", own=True)
def test_parts_of_a_distributed_checkpoint_are_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    checked_early(folder, "holds parts of a distributed checkpoint")


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_weight_that_is_not_finite_is_named(folder, number, dtype):
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(held):
        held[name][3, 5] = number
        return held

    weights(folder, spoil)
    refused(folder, f"{name} holds numbers that are not finite .NaN or infinity.", dtype=dtype)


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_weight_too_large_for_the_dtype_is_named_and_loads_in_another(folder, stored):
    name = "model.layers.0.mlp.down_proj.weight"

    def spoil(held):
        held[name][3, 5] = 2.0**20
        return {key: tensor.to(stored) for key, tensor in held.items()}

    weights(folder, spoil)
    refused(
        folder, f"{name} reaches 1.05e\\+06, more than float16 holds .6.55e\\+04.; load it as bfloat16", dtype="float16"
    )
    load(folder, dtype="bfloat16")
    load(folder)


@pytest.mark.kind("not-a-number", own=True)
def test_weights_whose_sum_alone_overflows_are_finite(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = torch.full((16, 24), 3e38)
    assert checkpoint._finite(tensor) and not tensor.sum().isfinite()
    assert checkpoint._finite(torch.full((300,), 6e4, dtype=torch.float16))
    weights(folder, lambda held: held | {name: held[name] * 1e-3})
    load(folder)


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rms_norm_eps": float("nan")}, "gives logits that are not finite for three tokens"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "inv_freq is not finite, computed from"),
    ],
)
def test_a_configuration_that_makes_numbers_not_finite_is_refused(folder, settings, said):
    rewrite(folder, **settings)
    refused(folder, said)


@pytest.mark.kind("not-a-number", own=True)
def test_weights_that_stay_on_disk_are_checked_too(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    load(folder, device_map=places)
    name = "model.layers.1.mlp.down_proj.weight"
    weights(folder, lambda held: held | {name: held[name] / 0})
    refused(folder, f"{name} holds numbers that are not finite", device_map=places)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}


@pytest.mark.kind("longrope")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rotations_that_change_with_the_longest_prompt_are_refused(tmp_path, family):
    rope = {**LONGROPE, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
    rewrite(save(tmp_path, family), rope_parameters=rope)
    refused(tmp_path, "rotary embeddings of type 'longrope', which change with the longest prompt of a batch")


@pytest.mark.kind("longrope", own=True)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("old", [True, False])
def test_dynamic_rotations_are_refused_as_they_are_written_now_and_before(tmp_path, family, old):
    content = json.loads((save(tmp_path, family) / "config.json").read_text())
    new = {"rope_parameters": content.pop("rope_parameters") | {"rope_type": "dynamic", "factor": 2.0}}
    before = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(content | (before if old else new)))
    refused(tmp_path, "rotary embeddings of type 'dynamic'")


@pytest.mark.kind("longrope", own=True)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_rotations_give_the_same_numbers_in_a_batch_as_alone(folder, rope):
    rewrite(folder, rope_parameters={"rope_theta": 10000.0, **rope})
    lm = load(folder)
    long, short = torch.arange(5, 25).repeat(3)[None, :60], torch.tensor([[5, 9, 11]])
    alone = lm.model(short).logits
    ids = torch.cat([long, torch.cat([short, torch.zeros(1, 57, dtype=torch.long)], 1)])
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    torch.testing.assert_close(lm.model(ids, attention_mask=mask).logits[1, :3], alone[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lm.model(short).logits, alone)


def ordinary(lm):
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    assert all(not t.is_inference() and t.device.type == "cpu" for t in tensors)
    assert all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
    weight = lm.blocks[0].mlp.down_proj.weight if lm.spec.family == "llama" else lm.blocks[0].mlp.c_proj.weight
    with torch.enable_grad():
        weight.requires_grad_(True)
        lm.model(torch.tensor([[5, 9, 11]])).logits.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.kind("ambient-state")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "inside",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["inference", "no_grad", "meta", "autocast"],
)
def test_a_model_is_ordinary_whatever_context_it_is_loaded_in(tmp_path, family, inside):
    save(tmp_path, family)
    with inside():
        lm = load(tmp_path, device="cpu")
    ordinary(lm)


@pytest.mark.kind("ambient-state")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_is_ordinary_whatever_the_default_dtype(folder, dtype):
    ids = torch.tensor([[5, 9, 11]])
    expected = load(folder).model(ids).logits
    try:
        torch.set_default_dtype(dtype)
        lm = load(folder)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(lm.model(ids).logits, expected)
    ordinary(lm)


@pytest.mark.kind("ambient-state")
def test_the_default_device_meta_is_refused_unless_another_is_given(folder):
    try:
        torch.set_default_device("meta")
        with pytest.raises(ValueError, match="device 'meta' cannot be used here"):
            load(folder)
        lm = load(folder, device="cpu")
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    ordinary(lm)


@pytest.mark.kind("ambient-state", own=True)
def test_contexts_that_put_something_else_in_the_place_of_weights_are_refused(folder):
    import accelerate
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="inside a dispatch mode of PyTorch.*leave it"):
        load(folder)
    with accelerate.init_empty_weights(), pytest.raises(ValueError, match="leave init_empty_weights"):
        load(folder)
    ordinary(load(folder))


@pytest.mark.kind("ambient-state", own=True)
def test_what_is_written_into_a_folder_later_does_not_reach_a_loaded_model(folder):
    lm, ids = load(folder), torch.tensor([[5, 9, 11]])
    before = lm.model(ids).logits
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(lm.model(ids).logits, before) and not lm.is_modified


@pytest.mark.kind("ambient-state", own=True)
def test_a_folder_that_is_written_while_it_is_read_is_refused(folder, monkeypatch):
    check = checkpoint.check_direction

    def written(*given):
        check(*given)
        weights(folder, lambda held: {name: tensor * 2 for name, tensor in held.items()})

    monkeypatch.setattr(checkpoint, "check_direction", written)
    refused(folder, "were written while they were read; load the model again")


@pytest.mark.kind("adapters-and-quantised", own=True)
@pytest.mark.parametrize("name", ["explorations.safetensors", "adaptation.bin", "lora.md", "adapter_notes.txt"])
def test_files_that_are_no_adapter_are_fine(folder, name):
    (folder / name).write_text("{}")
    load(folder)


@pytest.mark.kind("unexpected-weights", own=True)
@pytest.mark.parametrize("named", ["LlamaForCausalLM", [3], {"a": 1}])
def test_architectures_that_are_no_list_of_names_are_refused(folder, named):
    rewrite(folder, architectures=named)
    checked_early(folder, "'architectures' is .*, expected a list of names; correct it")


@pytest.mark.kind("attention-direction")
def test_models_that_come_with_the_package_pass():
    for name in ("controlled-gpt2", "controlled-llama", "controlled-bert"):
        assert load(name).name == name
