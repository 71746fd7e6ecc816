"""Tokenisation against tables of ids written by hand, tokenizers trained here, and the models' own limits."""

from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from kncore import Query, tokens, zoo
from kncore.tokens import Encoded, encode, longest, pad, span, steps

ID = {word: i for i, word in enumerate(tiny.SPECIAL + tiny.WORDS)}
PAD, CLS, SEP, MASK = 0, 2, 3, 4
WORD = st.sampled_from([word for word in tiny.WORDS if word.isalpha()])
PROMPT, TARGET = st.lists(WORD, min_size=1, max_size=12), st.lists(WORD, min_size=1, max_size=4)
FEW = st.lists(WORD, min_size=1, max_size=3)  # for tokenizers that spell words out: the context is 64 tokens
LLAMA, GPT2, BERT, ROBERTA = (tiny.lm(family) for family in ("llama", "gpt2", "bert", "roberta"))

CORPUS = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "Paris is in France, Madrid is in Spain. Anna saw these books, Anna saw this book.",
] * 4


def byte_level(masked: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the kind GPT-2 and RoBERTa have: a word's token holds the space before it."""
    core = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as RoBERTa's: it takes the space before it
    special = ["<s>", "<pad>", "</s>", mask]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {}
    if masked:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        names = dict(mask_token=mask)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **names)


BYTES, MASKED_BYTES = byte_level(), byte_level(masked=True)
GPT2_BYTES, ROBERTA_BYTES = replace(GPT2, tokenizer=BYTES), replace(ROBERTA, tokenizer=MASKED_BYTES)


def ids(words):
    return tuple(ID[word] for word in words)


# Causal models


@settings(deadline=None)
@given(PROMPT, TARGET)
def test_causal_ids_are_the_words_and_the_last_predicts_the_target(prompt, target):
    found = encode(LLAMA, Query(" ".join(prompt), " ".join(target)))
    assert found == Encoded(ids(prompt), len(prompt) - 1, ids(target))


@settings(deadline=None)
@given(PROMPT, TARGET, TARGET)
def test_another_target_changes_the_target_alone(prompt, target, foil):
    query = Query(" ".join(prompt), " ".join(target))
    assert encode(LLAMA, query, " ".join(foil)) == replace(encode(LLAMA, query), target=ids(foil))


@settings(deadline=None)
@given(PROMPT, TARGET)
def test_a_target_has_no_bos_though_the_prompt_has(prompt, target):
    tokenizer = tiny.tokenizer(masked=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", CLS)]
    )
    found = encode(replace(LLAMA, tokenizer=tokenizer), Query(" ".join(prompt), " ".join(target)))
    assert found == Encoded((CLS, *ids(prompt)), len(prompt), ids(target))


def test_the_target_carries_its_leading_space():
    encoded = encode(GPT2_BYTES, Query("The capital of France is", "Paris"))
    assert BYTES.convert_ids_to_tokens(list(encoded.target)) == ["ĠParis"]
    assert BYTES.convert_tokens_to_ids("Paris") not in (*encoded.target, None, BYTES.unk_token_id)
    assert BYTES.decode(encoded.ids + encoded.target) == "The capital of France is Paris"


@settings(deadline=None)
@given(FEW, FEW)
def test_prompt_and_target_decode_to_the_sentence(prompt, target):
    sentence, word = " ".join(prompt), " ".join(target)
    encoded = encode(GPT2_BYTES, Query(sentence, word))
    assert BYTES.decode(list(encoded.ids)) == sentence
    assert BYTES.decode(list(encoded.target)) == f" {word}"
    assert encoded.position == len(encoded.ids) - 1


def test_a_prompt_that_does_not_end_at_a_token_boundary_is_refused():
    core = Tokenizer(kinds.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4, "c": 5}, [("a", " "), ("a ", "b")]))
    lm = replace(LLAMA, tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=core))
    assert encode(lm, Query("c", "b")) == Encoded((5,), 0, (1, 2))
    with pytest.raises(ValueError, match="tokens of 'a' change when 'b' follows.*end the prompt with a whole word"):
        encode(lm, Query("a", "b"))


@pytest.mark.parametrize("end", [" [MASK]", " [MASK].", " [MASK] ."])
def test_a_mask_at_the_end_of_a_causal_prompt_is_cut(end):
    plain = encode(LLAMA, Query("the capital of France is", "Paris"))
    assert encode(LLAMA, Query(f"the capital of France is{end}", "Paris")) == plain


@pytest.mark.parametrize("prompt", ["Anna saw [MASK] books .", "[MASK] is the capital", "[MASK] .", "[MASK]"])
def test_a_mask_with_text_after_it_or_none_before_is_refused_by_a_causal_model(prompt):
    with pytest.raises(ValueError, match="tiny-llama reads from left to right.*the mask must come last"):
        encode(LLAMA, Query(prompt, "these"))


# Masked models


@settings(deadline=None)
@given(PROMPT, TARGET, PROMPT)
def test_masked_ids_hold_one_mask_per_target_token_and_position_is_the_first(before, target, after):
    found = encode(BERT, Query(f"{' '.join(before)} [MASK] {' '.join(after)}", " ".join(target)))
    masks = (MASK,) * len(target)
    assert found == Encoded((CLS, *ids(before), *masks, *ids(after), SEP), len(before) + 1, ids(target))


@settings(deadline=None)
@given(PROMPT, TARGET)
def test_a_prompt_without_mask_gets_one_at_its_end(prompt, target):
    found = encode(BERT, Query(" ".join(prompt), " ".join(target)))
    assert found.ids == (CLS, *ids(prompt), *[MASK] * len(target), ID["."], SEP)
    assert (found.position, found.target) == (len(prompt) + 1, ids(target))


def test_a_mask_at_the_start_of_the_prompt():
    found = encode(BERT, Query("[MASK] is the capital", "the cat"))
    assert found == Encoded((CLS, MASK, MASK, *ids(["is", "the", "capital"]), SEP), 1, ids(["the", "cat"]))


@settings(deadline=None)
@given(FEW, FEW, FEW)
def test_the_target_fills_the_masks_as_if_it_had_been_in_the_sentence(before, target, after):
    """For a tokenizer whose words hold their space: the masked ids are the sentence's, but for the masks."""
    before, target, after = map(" ".join, (before, target, after))
    found = encode(ROBERTA_BYTES, Query(f"{before} [MASK] {after}", target))
    filled = list(found.ids)
    filled[found.position : found.position + len(found.target)] = found.target
    assert filled == MASKED_BYTES(f"{before} {target} {after}")["input_ids"]
    assert found.ids.count(MASKED_BYTES.mask_token_id) == len(found.target)


def test_a_masked_target_has_a_leading_space_unless_the_sentence_starts_with_it():
    inside, first = (encode(ROBERTA_BYTES, Query(p, "Paris")) for p in ("Anna saw [MASK] .", "[MASK] is in France ."))
    assert MASKED_BYTES.convert_ids_to_tokens(list(inside.target)) == ["ĠParis"]
    assert MASKED_BYTES.decode(list(first.target)) == "Paris"


def test_a_prompt_with_the_tokenizers_own_mask_is_refused():
    with pytest.raises(ValueError, match="holds mask tokens of its own"):
        encode(ROBERTA_BYTES, Query("Anna saw <mask> and [MASK] .", "books"))


# Length


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_the_longest_prompt_that_is_accepted_is_one_the_model_can_read(family):
    lm = tiny.lm(family)
    longest = 0
    for n in range(55, 70):
        try:
            found = encode(lm, Query(" ".join(["the"] * n), "cat"))
        except ValueError as error:
            refused = str(error)
            break
        longest = len(found.ids)
        lm.model(torch.tensor([found.ids]))
    assert longest == (63 if family == "roberta" else 64)
    assert f"has {longest + 1} tokens" in refused
    assert f"the context of tiny-{family} is {longest}" in refused
    if family != "llama":  # rotary positions have no table that ends
        with pytest.raises((IndexError, RuntimeError)):
            lm.model(torch.full((1, longest + 1), ID["the"]))


def test_positions_of_roberta_are_counted_from_its_padding_index():
    config = transformers.RobertaConfig(**(tiny.CONFIGS["roberta"].to_dict() | {"pad_token_id": 1}))
    lm = replace(ROBERTA, model=transformers.RobertaForMaskedLM(config).eval())
    found = encode(lm, Query(" ".join(["the"] * 58), "cat"))
    assert len(found.ids) == 62
    lm.model(torch.tensor([found.ids]))
    with pytest.raises(ValueError, match="has 63 tokens, .* is 62"):
        encode(lm, Query(" ".join(["the"] * 59), "cat"))
    with pytest.raises((IndexError, RuntimeError)):
        lm.model(torch.full((1, 63), ID["the"]))


def test_room_for_all_but_the_last_target_token_is_needed():
    prompt = " ".join(["the"] * 63)
    two = encode(GPT2, Query(prompt, "red cat"))
    assert max(len(step.ids) for step in steps(GPT2, two)) == 64
    with pytest.raises(ValueError, match="with its target has 65 tokens, the context of tiny-gpt2 is 64"):
        encode(GPT2, Query(prompt, "red cat saw"))


# Steps and padding


@settings(deadline=None)
@given(PROMPT, TARGET)
def test_causal_steps_read_the_target_so_far(prompt, target):
    encoded = encode(LLAMA, Query(" ".join(prompt), " ".join(target)))
    found = steps(LLAMA, encoded)
    assert [step.target for step in found] == [(token,) for token in ids(target)]
    for k, step in enumerate(found):
        assert step.ids == ids(prompt + target[:k])
        assert step.position == len(step.ids) - 1


@settings(deadline=None)
@given(PROMPT, TARGET, PROMPT)
def test_masked_steps_fill_one_mask_after_the_other(before, target, after):
    encoded = encode(BERT, Query(f"{' '.join(before)} [MASK] {' '.join(after)}", " ".join(target)))
    found = steps(BERT, encoded)
    assert [step.target for step in found] == [(token,) for token in ids(target)]
    for k, step in enumerate(found):
        masks = [MASK] * (len(target) - k)
        assert step.ids == (CLS, *ids(before + target[:k]), *masks, *ids(after), SEP)
        assert step.ids[step.position] == MASK and MASK not in step.ids[: step.position]


@settings(deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=5))
def test_padding_is_to_the_right_and_lengths_are_true(prompts):
    batch = [encode(LLAMA, Query(" ".join(prompt), "cat")) for prompt in prompts]
    padded, lengths = pad(LLAMA, batch)
    assert padded.shape == (len(prompts), max(map(len, prompts)))
    assert lengths.tolist() == [len(prompt) for prompt in prompts]
    for row, prompt in zip(padded.tolist(), prompts, strict=True):
        assert row == [*ids(prompt), *[PAD] * (len(row) - len(prompt))]


def test_a_tokenizer_without_padding_token_pads_with_ids_that_exist():
    lm = replace(GPT2, tokenizer=tiny.tokenizer(masked=False))
    lm.tokenizer.pad_token = None
    padded, lengths = pad(lm, [Encoded((5, 6, 7), 2, (8,)), Encoded((9,), 0, (8,))])
    assert padded.tolist() == [[5, 6, 7], [9, 0, 0]] and lengths.tolist() == [3, 1]


@pytest.mark.model
def test_the_default_tokenizer_keeps_paris_with_its_space_in_one_token():
    entry = zoo.REGISTRY[zoo.DEFAULT]
    folder = zoo.cache_folder() / "models" / f"{zoo.DEFAULT}-{entry.sha256[:16]}"
    if not folder.is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokens.encode(replace(LLAMA, tokenizer=tokenizer), Query("The capital of France is", "Paris"))
    assert tokenizer.convert_ids_to_tokens(list(encoded.target)) == ["ĠParis"]
    assert tokenizer("Paris")["input_ids"] != list(encoded.target)
    assert tokenizer.decode(encoded.ids) == "The capital of France is"
    assert encoded.ids[0] != tokenizer.bos_token_id


# Subjects


@settings(max_examples=40, deadline=None)
@given(st.lists(WORD, max_size=4), st.lists(WORD, min_size=1, max_size=3), st.lists(WORD, max_size=4), st.booleans())
def test_the_span_of_a_subject_counts_its_words(before, subject, after, masked):
    """Words are tokens here, so the place can be counted; of several the last."""
    words, n = [*before, *subject, *after], len(subject)
    if masked:
        query = Query(" ".join([*words, "[MASK]", "."]), "red cats", " ".join(subject))
    else:
        query = Query(" ".join(words), "cats", " ".join(subject))
    # the subject as text may also begin or end inside a longer word; such draws say nothing
    if query.prompt.rindex(query.subject) == len(" ".join(words[: (at := last(words, subject))])) + (at > 0):
        lm = BERT if masked else LLAMA
        assert span(lm, query) == (at + masked, at + n - 1 + masked)


def last(words, subject):
    return max(i for i in range(len(words)) if words[i : i + len(subject)] == subject)


def test_a_subject_that_occurs_twice_is_found_the_last_time():
    assert span(LLAMA, Query("France is France in Spain", "red", "France")) == (2, 2)
    assert span(BERT, Query("France is [MASK] in France", "red", "France")) == (5, 5)
    assert span(BERT, Query("France is [MASK] in red France", "red cats", "red France")) == (6, 7)


def test_the_span_moves_with_the_masks_before_it():
    query = Query("[MASK] is the capital of France", "Paris", "France", "red cats")
    assert span(BERT, query) == (6, 6)
    assert span(BERT, query, query.foil) == (7, 7)
    assert encode(BERT, query, query.foil).ids[7] == ID["France"]


@pytest.mark.parametrize(
    ("lm", "prompt"), [(GPT2_BYTES, "The capital of Spain is"), (ROBERTA_BYTES, "Spain is [MASK].")]
)
def test_the_span_of_byte_level_tokens_spells_the_subject(lm, prompt):
    query = Query(prompt, "Madrid", "Spain")
    first, end = span(lm, query)
    assert lm.tokenizer.decode(encode(lm, query).ids[first : end + 1]).strip() == "Spain"


def test_a_query_without_a_subject_has_no_span():
    with pytest.raises(ValueError, match="has no subject; give the part of it"):
        span(LLAMA, Query("the cats", "red"))


def test_the_longest_text_is_what_the_positions_allow():
    assert longest(GPT2) == longest(LLAMA) == longest(BERT) == 64
    assert longest(ROBERTA) == 63  # counted from behind the padding token, number 0
