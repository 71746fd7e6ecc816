"""Where a subject is, and what a model is really asked: against token counts by hand, and plain forward passes."""

import copy
import itertools
import json
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import BYTES, GPT2_BYTES, MASKED_BYTES, ROBERTA_BYTES
from tokenizers import processors

from kncore import Query, ablation, editors, neurons, predictions, rome, tokens, tracing, zoo
from kncore.arch import spec_for
from kncore.models import LM
from kncore.query import locate, subject_start
from kncore.tokens import encode, span
from knpaper import cases, criteria, grammar, stimuli, tasks, traceable
from knpaper.datasets import counterfact, known_1000, pararel

LLAMA, GPT2, BERT, ROBERTA = (tiny.lm(family) for family in ("llama", "gpt2", "bert", "roberta"))
ID = {word: i for i, word in enumerate(tiny.SPECIAL + tiny.WORDS)}
CLS, SEP, MASK = 2, 3, 4


def ids(text):
    return tuple(ID[word] for word in text.split())


def around(family, before="", after=""):
    """A tiny model whose tokenizer puts special tokens around every text."""
    tokenizer = tiny.tokenizer(masked=False)
    names = [(name, ID[name]) for name in (before, after) if name]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=names
    )
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    return replace(tiny.lm(family), tokenizer=tokenizer)


def sized(family, tokenizer, seed=0):
    """A tiny model with the vocabulary of a tokenizer."""
    config = copy.deepcopy(tiny.CONFIGS[family])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(seed)
    spec = spec_for(family)
    auto = transformers.AutoModelForMaskedLM if spec.masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return LM(f"sized-{family}", "0", model, tokenizer, spec)


def spelled(lm, query):
    """What the tokens of a query's span say."""
    first, last = span(lm, query)
    return lm.tokenizer.decode(list(encode(lm, query).ids[first : last + 1])).strip()


# ----------------------------------------------------------------------------- the subject and the mask


@pytest.mark.kind("subject-not-in-mask")
@pytest.mark.parametrize("subject", ["K", "S", "MA"])
def test_a_subject_whose_letters_are_in_the_mask_is_found_in_the_prompt(subject):
    query = Query(f"The chemical symbol {subject} stands for the element [MASK].", "red", subject)
    assert span(BERT, query) == (4, 4)  # [CLS] The chemical symbol
    assert span(BERT, replace(query, prompt=query.prompt.removesuffix(" [MASK]."))) == (4, 4)


@pytest.mark.kind("subject-not-in-mask", own=True)
@pytest.mark.parametrize("lm", [BERT, ROBERTA_BYTES], ids=["words", "bytes"])
def test_any_part_of_a_mask_can_be_a_subject_before_and_after_it(lm):
    subjects = ["M", "A", "ASK", "mask", "s", "<", "["] if lm is ROBERTA_BYTES else ["M", "A", "ASK", "MASK"]
    templates = "{} is [MASK] .", "[MASK] is {} in", "a {} is [MASK] in", "{} saw"
    for subject, target, template in itertools.product(subjects, ["red", "red cat book"], templates):
        query = Query(template.replace("{}", subject), target, subject)
        if lm is ROBERTA_BYTES:
            assert spelled(lm, query) == subject
        else:
            words = query.prompt.replace("[MASK]", "[MASK] " * len(target.split())).split()
            assert span(lm, query) == (words.index(subject) + 1,) * 2


@pytest.mark.kind("subject-not-in-mask", own=True)
def test_a_subject_that_is_nowhere_but_in_the_mask_is_refused():
    for subject in ("K", "MASK", "[", "[MASK]", "is [MASK]"):
        with pytest.raises(ValueError, match="does not occur in the prompt|holds \\[MASK\\]"):
            Query("The symbol is [MASK].", "red", subject)


def counted(lm, queries):
    """Spans counted without offsets: how many tokens the template has before {}, and with the subject in its place."""
    lefts = [query.template.split("{}")[0] for query in queries]
    if lm.spec.masked:
        lefts = [
            left.replace("[MASK]", lm.tokenizer.mask_token * len(lm.tokenizer.tokenize(query.target)))
            for left, query in zip(lefts, queries, strict=True)
        ]
    whole = [left + query.subject for left, query in zip(lefts, queries, strict=True)]
    before, upto = (
        lm.tokenizer(some, add_special_tokens=False)["input_ids"] for some in ([x.rstrip() for x in lefts], whole)
    )
    start = int(lm.spec.masked)
    blank = [lm.tokenizer.decode(b[len(a)]).isspace() for a, b in zip(before, upto, strict=True)]  # a token of its own
    return [(start + len(a) + alone, start + len(b) - 1) for a, b, alone in zip(before, upto, blank, strict=True)]


@pytest.mark.kind("subject-not-in-mask")
def test_the_span_of_every_own_query_equals_a_count_of_tokens():
    folder = zoo.SHIPPED / "controlled-bert"
    masked = replace(BERT, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))
    for lm, form in ((GPT2_BYTES, "causal"), (masked, "masked")):
        queries = [query for name in tasks.relations() for query in tasks.facts(name)]
        queries += [query for name in grammar.phenomena() for query in grammar.minimal_pairs(name, form=form)]
        assert len(queries) > 10_000
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = [span(lm, query) for query in queries]
        assert got == counted(lm, queries)


@pytest.mark.kind("subject-in-causal-mask")
def test_a_causal_model_finds_the_subject_in_what_it_reads():
    query = Query("The symbol K stands for [MASK].", "red", "K")
    assert span(LLAMA, query) == (2, 2) and len(encode(LLAMA, query).ids) == 5


@pytest.mark.kind("subject-in-causal-mask", own=True)
@pytest.mark.parametrize("lm", [LLAMA, GPT2_BYTES, around("gpt2", "[CLS]")], ids=["words", "bytes", "bos"])
def test_the_span_of_a_causal_prompt_lies_in_its_ids_whatever_its_mask(lm):
    ends = " [MASK]", " [MASK].", " [MASK] .", ""
    for subject, end in itertools.product(["a", "A", "M", "MASK", "France", "a France"], ends):
        query = Query(f"saw {subject} in{end}", "cat", subject)
        first, last = span(lm, query)
        assert 0 <= first <= last < len(encode(lm, query).ids)
        assert (first, last) == span(lm, Query(f"saw {subject} in", "cat", subject))
        if lm is GPT2_BYTES:
            assert spelled(lm, query) == subject


@pytest.mark.kind("subject-in-causal-mask", own=True)
def test_a_subject_after_the_mask_of_a_causal_model_is_refused():
    query = Query("Anna saw the [MASK] .", "cat", ".")
    with pytest.raises(ValueError, match="'.' of .* stands after the mask, and tiny-llama reads only"):
        span(LLAMA, query)
    assert span(BERT, query) == (5, 5)


@pytest.mark.kind("subject-in-causal-mask", own=True)
def test_a_trace_of_a_causal_prompt_with_a_mask_is_that_of_the_prompt_without():
    query = Query("the capital of A is in [MASK].", "Paris", "A", "Madrid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (cut,) = tracing.trace(GPT2, [query])
        (plain,) = tracing.trace(GPT2, [replace(query, prompt="the capital of A is in")])
    assert cut.subject == plain.subject == (3, 3) and torch.equal(cut.restored, plain.restored)
    assert not torch.equal(cut.clean, cut.corrupted)


# ------------------------------------------------------------------------ the template, and whole words


@pytest.mark.kind("subject-by-template")
def test_the_subject_is_where_the_template_has_it():
    prompt = "Niger borders Nigeria, and its capital is"
    query = Query(prompt, "red", "Niger", template="{} borders Nigeria, and its capital is")
    assert subject_start(query) == 0 and span(LLAMA, query) == (0, 0)
    assert subject_start(replace(query, template="")) == 0


@pytest.mark.kind("subject-by-template", own=True)
@pytest.mark.parametrize("prefix", ["", "Niger is far. ", "In Niger and Nigeria: ", "Nigeria"])
@pytest.mark.parametrize(
    ("template", "subject"),
    [
        ("{} lies next to Niger and Nigeria in", "Niger"),  # the subject stands in the fixed text, too
        ("Niger borders {} and Nigeria, not Niger", "Niger"),
        ("the {}-Congo languages and Niger are", "Niger"),
        ("what is said of {}", "Niger"),
        ("'{}' is", "(Niger)"),
        ("the {}{{}} {{}} of".replace("{{}}", "()"), "()"),
    ],
)
def test_a_template_says_where_whatever_else_reads_like_the_subject(prefix, template, subject):
    left = template.index("{}")
    query = Query(prefix + template.replace("{}", subject, 1), "cat", subject, template=template)
    assert subject_start(query) == len(prefix) + left
    if template.count("{}") == 1:
        first, last = span(GPT2_BYTES, query)
        offsets = BYTES(query.prompt, return_offsets_mapping=True)["offset_mapping"]
        assert offsets[first][0] <= len(prefix) + left < offsets[first][1]
        assert offsets[last][0] < len(prefix) + left + len(subject) <= offsets[last][1]


@pytest.mark.kind("subject-by-template", own=True)
def test_a_subject_that_begins_the_template_may_have_its_capital():
    query = Query("The cat saw the cat, and the cat is", "red", "the cat", template="{} saw the cat, and the cat is")
    assert subject_start(query) == 0 and span(LLAMA, query) == (0, 1)


@pytest.mark.kind("subject-by-template", own=True)
def test_a_template_that_does_not_give_the_prompt_is_refused_and_one_without_a_gap_is_a_name():
    query = Query("the capital of France is", "Paris", "France", template="the flag of {} is")
    with pytest.raises(ValueError, match="'the flag of {} is' with the subject 'France' is not what the prompt"):
        span(LLAMA, query)
    for name in ("", "t", "{} and {}"):
        assert span(LLAMA, replace(query, template=name)) == (3, 3)


@pytest.mark.kind("subject-by-template", own=True)
@pytest.mark.parametrize(
    ("text", "subject", "start"),
    [
        ("Niger borders Nigeria", "Niger", 0),
        ("Nigeria is in Africa", "Niger", 0),  # only inside a word
        ("Niger, Niger and Nigeria", "Niger", 7),
        ("Niger's river and Nigeria's", "Niger", 0),
        ("Jean met Jean-Paul in", "Jean", 0),
        ("Paul met Jean-Paul in", "Paul", 0),
        ("can that, for one can't", "can", 0),
        ("l\u2019Italie et l\u2019Italie", "Italie", 14),
        ("\u00c9mile et Zo\u00e9, Zo et", "Zo", 14),
        ("Cafe, Cafe\u0301 and", "Cafe", 0),  # an accent of its own belongs to the word
        ("\u0939\u093f\u0902\u0926 \u0939\u093f\u0902\u0926\u0940", "\u0939\u093f\u0902\u0926", 0),  # a vowel sign, too
        ("\u4e2d\u56fd\uff0c\u4e2d\u56fd\u7684\u9996\u90fd\u662f", "\u4e2d\u56fd", 3),  # no blanks: the last one
        ("\u5143\u7d20K\u7684, OK", "K", 2),
        ("route 1, 10 and 21", "1", 6),
        ("a_b b a_b", "b", 4),
        ("C++ and C are", "C", 8),
        ("C and C++ are", "C++", 6),
        ("x (a) x(a)", "(a)", 7),
        ("nothing here", "Niger", -1),
    ],
)
def test_without_a_template_a_subject_is_the_last_whole_word_and_else_the_last_letters(text, subject, start):
    assert locate(text, subject) == start


WORD = st.text(st.sampled_from("ab\u00e9"), min_size=1, max_size=3)


@pytest.mark.kind("subject-by-template", own=True)
@given(st.lists(WORD, min_size=1, max_size=8), WORD)
def test_among_words_between_blanks_the_last_equal_one_is_found(words, subject):
    text = " ".join(words)
    equal = [i for i, word in enumerate(words) if word == subject]
    want = len(" ".join([*words[: equal[-1]], ""])) if equal else text.rfind(subject)
    assert locate(text, subject) == want


@pytest.mark.kind("subject-by-template", own=True)
def test_a_span_is_the_same_whether_offsets_hold_the_blank_and_whether_special_tokens_stand_before():
    tokenizer = copy.deepcopy(BYTES)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    template = "the capital of {} is in France"
    query = Query("the capital of France is in France", "Paris", "France", template=template)
    found = tokenizer(query.prompt, return_offsets_mapping=True)["offset_mapping"]
    assert any(query.prompt[start:end].startswith(" ") for start, end in found if end - start > 1)
    assert span(replace(GPT2, tokenizer=tokenizer), query) == span(GPT2_BYTES, query)
    assert span(around("llama", "[CLS]", "[SEP]"), query) == (4, 4)


@pytest.mark.kind("subject-by-template", own=True)
def test_rome_edits_at_the_subject_of_the_template_in_every_context():
    template = "{} is far from Nigeria , Niger is in"
    request = Query(template.replace("{}", "Niger"), "red", "Niger", "cat", template=template)
    *asked, essence = rome.contexts(request, 3)
    for query in asked:
        words = query.prompt.replace(".", " .").replace(",", " ,").split()
        at = len(words) - len(template.split())
        assert words[at] == "Niger" and subject_start(query) == len(query.prompt) - len(request.prompt)
    for subject in ("a", "is"):
        *_, essence = rome.contexts(Query(f"saw {subject} in", "red", subject, "cat"), 1)
        assert essence.prompt == f"{subject} is a" and span(LLAMA, essence) == (0, 0)


@pytest.mark.kind("subject-by-template", own=True)
def test_replacements_and_traces_use_the_place_of_the_template():
    template = "{} is in France , and France is"
    queries = [
        Query(template.replace("{}", subject), target, subject, foil, template=template)
        for subject, target, foil in (("France", "red", "cat"), ("Spain", "cat", "red"))
    ]
    assert traceable.replacements(LLAMA, queries) == queries[::-1]
    (got,) = tracing.trace(LLAMA, queries[:1], others=queries[1:], store=False)
    assert got.subject == (0, 0)


@pytest.mark.kind("subject-by-template", own=True)
def test_public_subjects_lie_where_the_file_has_them(tmp_path):
    flat = {
        "case_id": 1,
        "prompt": "Niger borders Nigeria, the capital of",
        "target_new": "blue",
        "subject": "Niger",
        "ground_truth": "red",
        "rephrase_prompt": "Nigeria and Niger are Nigeria's and",
        "locality_prompt": "Utopia is",
        "locality_ground_truth": "green",
    }
    full = {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "Niger, {} and Niger",
            "relation_id": "P1",
            "target_new": {"str": "blue"},
            "target_true": {"str": "red"},
            "subject": " Niger",
        },
        "paraphrase_prompts": [flat["rephrase_prompt"]],
        "neighborhood_prompts": ["Utopia is"],
    }
    known = {
        "subject": "Niger",
        "attribute": "red",
        "template": "{} is near Niger",
        "prompt": "Niger is near Niger and",
        "relation_id": "P1",
    }
    for name, record in (("flat", flat), ("full", full), ("known", known)):
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
    (one,), (other,) = (counterfact.read(tmp_path / f"{name}.json") for name in ("flat", "full"))
    assert one.rewrite.template == "{} borders Nigeria, the capital of"
    assert one.paraphrases[0].template == other.paraphrases[0].template == "Nigeria and {} are Nigeria's and"
    assert other.rewrite.prompt == "Niger,  Niger and Niger" and other.rewrite.subject == "Niger"
    assert subject_start(other.rewrite) == 8
    (fact,) = known_1000.read(tmp_path / "known.json")
    assert fact.template == "{} is near Niger and" and subject_start(fact) == 0
    for query in (one.rewrite, other.rewrite, *one.paraphrases, fact):
        assert query.template.replace("{}", query.subject) == query.prompt


@pytest.mark.kind("subject-by-template", own=True)
@pytest.mark.parametrize("then", ["", " today"])
def test_the_phrase_of_a_sentence_is_that_around_the_subject_of_its_template(then):
    template = "the {} of the kings"
    query = Query("the king of the kings", "is", "king", "are", "subject_verb_distractor", template=template)
    phrase = traceable._phrase(query, then)
    assert phrase.subject == "the king of the kings" and subject_start(phrase) == 0
    query = replace(query, task="anaphor_number")
    phrase = traceable._phrase(query, then)
    assert (phrase.subject, phrase.template) == ("the king", "{} of the kings" + then)
    query = replace(query, prompt="bathe king of the kings", template="bathe {} of the kings")
    assert traceable._phrase(query, then) is None


# ------------------------------------------------------------------------------------- candidates


@pytest.mark.kind("candidates-per-prompt")
def test_candidates_are_tokenised_as_targets_of_each_prompt():
    lm = sized("roberta", MASKED_BYTES)
    words = ["Paris", "Madrid", "France", "Spain"]
    prompts = ["[MASK] is in France .", "Anna saw [MASK] .", "Anna saw ([MASK]) in Spain", "the capital is"]
    queries = [Query(prompt, word) for prompt in prompts for word in words]
    logp = predictions.log_probabilities(lm, queries)
    table = predictions.predict(lm, queries, words)
    for query, row, got in zip(queries, logp, table.itertuples(), strict=True):
        text = query.prompt if query.masked else f"{query.prompt} [MASK]."
        spaced = " " if text.partition("[MASK]")[0].endswith(" ") else ""
        first = {word: MASKED_BYTES(spaced + word, add_special_tokens=False)["input_ids"][0] for word in words}
        own = first[query.target]
        rivals = [row[token] for token in first.values() if token != own]
        assert got.margin == pytest.approx(float(row[own] - max(rivals)), abs=1e-5)
        assert got.prefers == (row[own] > max(rivals))


@pytest.mark.kind("candidates-per-prompt", own=True)
def test_candidates_of_one_template_are_tokenised_by_how_each_prompt_ends():
    """With one name for all, a joined query among spaced ones: what was found for the first is not taken for all."""
    lm = sized("gpt2", BYTES)
    words = ["Paris", "Madrid"]
    queries = [Query('Anna saw "', "Paris", template="t", joined=joined) for joined in (False, True)]
    for some in (queries, queries[::-1]):
        logp = predictions.log_probabilities(lm, some)
        table = predictions.predict(lm, some, words)
        held = ablation.read(ablation.capture_prompts(lm, some, [words] * 2), [])
        for query, row, got in zip(some, logp, table.itertuples(), strict=True):
            blank = "" if query.joined else " "
            own, other = (BYTES(f'"{blank}{word}')["input_ids"][1] for word in words)
            assert got.margin == pytest.approx(float(row[own] - row[other]), abs=1e-5)
        assert held is not None


@pytest.mark.kind("candidates-per-prompt", own=True)
def test_words_that_are_held_are_tokenised_by_how_each_prompt_ends():
    lm = sized("gpt2", BYTES)
    queries = [Query('Anna saw "', "Paris", template="t", joined=joined) for joined in (False, True)]
    held = ablation.capture_prompts(lm, queries, [["Madrid"]] * 2)
    want = [[BYTES(f'"{blank}{word}')["input_ids"][1] for word in ("Paris", "Madrid")] for blank in (" ", "")]
    assert held.words.tolist() == want


@pytest.mark.kind("candidates-per-prompt", own=True)
def test_prompts_that_end_alike_share_their_candidates(monkeypatch):
    calls = []
    own = tokens.encode
    monkeypatch.setattr(tokens, "encode", lambda *args: calls.append(args) or own(*args))
    words = ["Paris", "Madrid", "France"]
    asked = [Query(f"the capital of {x} is", "Paris", template=x) for x in ("France", "Spain", "Madrid")]
    predictions.predict(LLAMA, asked, words)
    assert len([call for call in calls if len(call) == 3]) == len(words)


# -------------------------------------------------------------------------------- targets without a space


CHINESE = "\u6cd5\u56fd\u7684\u9996\u90fd\u662f"
PARIS = "\u5df4\u9ece"


@pytest.mark.kind("target-without-space")
@pytest.mark.parametrize(("prompt", "target"), [('Anna saw "', "Paris"), ("Madrid-", "Spain"), (CHINESE, PARIS)])
def test_a_joined_target_follows_the_prompt_as_it_is(prompt, target):
    query = Query(prompt, target, joined=True)
    found = encode(GPT2_BYTES, query)
    assert list(found.ids + found.target) == BYTES(prompt + target)["input_ids"]
    assert BYTES.decode(list(found.target)) == target
    spaced = encode(GPT2_BYTES, replace(query, joined=False))
    assert list(spaced.ids + spaced.target) == BYTES(f"{prompt} {target}")["input_ids"]
    assert query != replace(query, joined=False) and len({query, replace(query, joined=False)}) == 2
    assert encode(GPT2_BYTES, query, "cat").target == tuple(BYTES(prompt + "cat")["input_ids"][len(found.ids) :])


@pytest.mark.kind("target-without-space", own=True)
@pytest.mark.parametrize("prompt", ['Anna saw "', "Madrid-", "Anna saw (", CHINESE])
def test_a_joined_target_of_a_masked_model_is_read_in_its_sentence(prompt):
    for text in (prompt, f"{prompt}[MASK]."):
        found = encode(ROBERTA_BYTES, Query(text, "Paris", joined=True))
        filled = list(found.ids)
        filled[found.position : found.position + len(found.target)] = found.target
        assert filled == MASKED_BYTES(f"{prompt}Paris.")["input_ids"]


@pytest.mark.kind("target-without-space", own=True)
def test_a_mask_without_a_blank_before_it_is_joined_for_causal_models():
    for end in ("[MASK]", "[MASK]."):
        found = encode(GPT2_BYTES, Query(f'Anna saw "{end}', "Paris"))
        assert list(found.ids + found.target) == BYTES('Anna saw "Paris')["input_ids"]
    spaced = encode(GPT2_BYTES, Query('Anna saw " [MASK]', "Paris"))
    assert list(spaced.ids + spaced.target) == BYTES('Anna saw " Paris')["input_ids"]


@pytest.mark.kind("target-without-space", own=True)
def test_a_word_that_is_no_token_of_its_own_beside_what_it_is_joined_to_is_refused():
    pieces = "[UNK] [CLS] [SEP] [MASK] un ##happy happy unfair ##ly fair . ly".split()
    lm = replace(BERT, tokenizer=wordpieces({piece: i for i, piece in enumerate(pieces)}))
    found = encode(lm, Query("un[MASK] .", "happy"))
    assert (found.ids, found.target) == ((1, 4, 3, 10, 2), (5,))  # ##happy, as in the sentence
    for prompt, target in (("un[MASK] .", "fair"), ("un [MASK]ly .", "happy")):
        with pytest.raises(ValueError, match="the tokens around the mask of .* change when"):
            encode(lm, Query(prompt, target))
    with pytest.raises(ValueError, match="no token boundary .* do not join the target to it"):
        encode(GPT2_BYTES, Query("Anna saw the capital of Fr", "ance", joined=True))


def wordpieces(table):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    core = Tokenizer(kinds.WordPiece(table, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.mark.kind("target-without-space", own=True)
def test_joined_goes_with_a_query_wherever_it_is_asked(tmp_path):
    query = Query('Anna saw "', "Paris", "Anna", "Madrid", joined=True)
    for step, n in zip(tokens.steps(GPT2_BYTES, encode(GPT2_BYTES, query)), range(9), strict=False):
        assert list(step.ids) == BYTES('Anna saw "Paris')["input_ids"][: len(encode(GPT2_BYTES, query).ids) + n]
    assert all(asked.joined for asked in rome.contexts(query, 2)[:-1])
    (edit,) = editors.in_context(GPT2_BYTES, [query])
    assert edit.context == 'Anna saw "Madrid. '
    assert editors.in_context(GPT2_BYTES, [replace(query, joined=False)])[0].context == 'Anna saw " Madrid. '
    lm = sized("gpt2", BYTES)
    case = cases.Case(query, {"reliability": (query,)})
    row = criteria.measure(lm, [case], [editors.Edit()]).iloc[0]
    whole = torch.tensor([BYTES('Anna saw "Paris')["input_ids"]])
    n = len(encode(lm, query).target)
    logp = lm.model(whole).logits[0].double().log_softmax(-1)[-n - 1 : -1]
    assert row.logp_before == pytest.approx(float(logp[range(n), whole[0, -n:]].mean()), abs=1e-4)
    (trace,) = tracing.trace(lm, [query], store=False)
    assert float(trace.clean[0]) == pytest.approx(float(logp[0].exp()[whole[0, -n]]), abs=1e-5)
    bags = [[["flag of A is:[MASK].", "red", "P1"]], [["flag of B is:[MASK].", "blue", "P1"]]]
    (tmp_path / "p.json").write_text(json.dumps({"P1": bags}))
    assert all(q.joined and q.prompt.endswith(":") for q in pararel.read("P1", tmp_path / "p.json", "causal"))


@pytest.mark.kind("target-without-space", own=True)
def test_joined_is_a_bool_and_does_not_contradict_the_mask():
    assert Query(**json.loads('{"prompt": "a-", "target": "b", "joined": true}')).joined is True
    for wrong in ("yes", 1, None):
        with pytest.raises(TypeError, match="joined of a Query must be True or False"):
            Query("a", "b", joined=wrong)
    with pytest.raises(ValueError, match="joined, but white space stands before"):
        Query("Anna saw [MASK].", "cats", joined=True)


# -------------------------------------------------------------------------------------- length


def longest_that_runs(lm):
    """The most tokens that a plain forward pass of the model takes."""
    n = 1
    while True:
        try:
            lm.model(torch.full((1, n + 1), ID["the"]))
        except (IndexError, RuntimeError):
            return n
        n += 1


@pytest.mark.kind("longer-than-context")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_texts_up_to_the_context_are_read_and_longer_ones_refused(family):
    lm = tiny.lm(family)
    limit = tokens.longest(lm)
    if family in ("bert", "roberta", "gpt2"):  # positions are learned: the model has no others
        assert limit == longest_that_runs(lm)
    fits, long = ("the " * (limit - 2 * lm.spec.masked + more) for more in (0, 1))
    refused = rf"has {limit + 1} tokens, the context of tiny-{family} is {limit}; shorten it"
    assert predictions.text_loss(lm, [fits]).isfinite().all()
    with pytest.raises(ValueError, match=refused):
        predictions.text_loss(lm, ["the cat", long])
    neuron = neurons.Neuron(0, 0)
    assert neurons.contexts(lm, [fits], [neuron])[neuron]
    with pytest.raises(ValueError, match=refused):
        neurons.contexts(lm, ["the cat", long], [neuron])
    with pytest.raises(ValueError, match=refused):
        predictions.predict(lm, [Query(("the " * (limit - 2 * lm.spec.masked * 2 + 1)).strip(), "cat")])


@pytest.mark.kind("longer-than-context", own=True)
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_a_generation_ends_within_the_context(family):
    lm = tiny.lm(family)
    prompt = "the " * 59 + "cat"
    (more,) = criteria.generations(lm, [prompt], length=4, seed=None)
    assert len(more.split()) <= 4
    with pytest.raises(ValueError, match=f"after it has 65 tokens, the context of tiny-{family} is 64"):
        criteria.generations(lm, ["the", prompt], length=5)


@pytest.mark.kind("longer-than-context", own=True)
def test_contexts_before_a_prompt_count():
    query = Query("the " * 50 + "capital of France is", "Paris", "France", "Madrid")
    encode(GPT2, query)
    with pytest.raises(ValueError, match="has .* tokens, the context of tiny-gpt2 is 64"):
        rome.search(GPT2, [query], rome.HParams(0, steps=1, prefixes=3))
    case = cases.Case(query, {"reliability": (query,)})
    with pytest.raises(ValueError, match="has 65 tokens, the context of tiny-gpt2 is 64"):
        criteria.measure(GPT2, [case], [editors.Edit(context="the " * 11)])
    criteria.measure(GPT2, [case], [editors.Edit(context="the " * 10)])


@pytest.mark.kind("longer-than-context", own=True)
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_model_without_a_limit_reads_any_length(family):
    lm = tiny.lm(family)
    vars(lm.model.config)["max_position_embeddings"] = None
    assert tokens.longest(lm) is None
    tokens.check_length(lm, 10**9, "a text")


# ------------------------------------------------------------------------------- BOS and EOS


@pytest.mark.kind("tokenizer-appends-eos")
@pytest.mark.parametrize("before", ["", "[CLS]"])
def test_an_appended_end_of_text_is_cut_for_causal_models(before):
    lm, plain = around("llama", before, "[SEP]"), around("llama", before)
    query = Query("the capital of France is", "Paris", "France", "Madrid")
    for word in (None, "Madrid", "red cat"):
        assert encode(lm, query, word) == encode(plain, query, word)
    assert SEP not in encode(lm, query).ids and span(lm, query) == span(plain, query)
    texts = ["the capital of France is Paris", "Anna saw"]
    assert torch.equal(predictions.text_loss(lm, texts), predictions.text_loss(plain, texts))
    assert criteria.generations(lm, texts, length=5) == criteria.generations(plain, texts, length=5)


@pytest.mark.kind("tokenizer-appends-eos", own=True)
def test_an_appended_end_of_text_has_no_part_in_joined_targets_and_empty_prompts():
    lm = around("gpt2", "", "[SEP]")
    assert encode(lm, Query("Anna saw ,", "cat", joined=True)).ids == ids("Anna saw ,")
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        criteria.generations(lm, [""])
    assert tokens.read(around("gpt2", "[CLS]", "[SEP]"), "") == [CLS]
    assert tokens.read(BERT, "Anna saw") == [CLS, *ids("Anna saw"), SEP]  # a masked model reads it


@pytest.mark.kind("tokenizer-appends-eos", own=True)
def test_a_prompt_that_ends_with_the_end_of_a_text_is_refused():
    lm = around("llama", "[CLS]", "[SEP]")
    for ask in (lambda text: encode(lm, Query(text, "cat")), lambda text: criteria.generations(lm, [text])):
        with pytest.raises(ValueError, match=r"ends with \[SEP\], the end of a text for tiny-llama; leave it out"):
            ask("Anna saw [SEP]")


@pytest.mark.kind("bos-in-the-prompt")
def test_a_prompt_that_begins_with_the_token_that_the_tokenizer_puts_there_is_refused():
    lm = around("llama", "[CLS]")
    refused = r"begins with \[CLS\], which the tokenizer of tiny-llama itself puts there; leave it out"
    asks = [
        lambda text: encode(lm, Query(text, "cat")),
        lambda text: predictions.text_loss(lm, [text]),
        lambda text: criteria.generations(lm, [text]),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=refused):
            ask("[CLS] Anna saw the")
    assert encode(LLAMA, Query("[CLS] Anna saw", "cat")).ids == (CLS, *ids("Anna saw"))  # there it is the only one


@pytest.mark.kind("bos-in-the-prompt", own=True)
@pytest.mark.parametrize("text", ["[CLS] Anna saw [MASK] .", "  [CLS]Anna saw [MASK] .", "Anna saw [MASK] . [SEP]"])
def test_a_masked_prompt_with_the_special_tokens_of_its_ends_is_refused(text):
    with pytest.raises(ValueError, match=r"(begins with \[CLS\]|ends with \[SEP\]), which the tokenizer of tiny-bert"):
        encode(BERT, Query(text, "cats"))
    # in the middle it stays
    assert encode(BERT, Query("Anna saw [SEP] the [MASK]", "cat")).ids.count(SEP) == 2
    assert encode(around("gpt2", "[CLS]"), Query("the [CLS] cat", "saw")).ids.count(CLS) == 2


# -------------------------------------------------------------------------------------- raw errors


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("subject", [" ", "France ", " France", "\n"])
def test_a_subject_with_white_space_around_it_is_refused(subject):
    with pytest.raises(ValueError, match="the subject .* has white space around it"):
        Query("the capital of France is in\n the", "cat", subject)


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("word", ["", " ", " Paris", "Paris ", "Paris\n"])
def test_a_candidate_with_white_space_around_it_or_none_is_refused(word):
    query = Query("the capital of France is", "Paris")
    with pytest.raises(ValueError, match="the candidate .* is empty or has white space around it"):
        predictions.predict(LLAMA, [query], ["Madrid", word])
    with pytest.raises(ValueError, match="the target .* is empty or has white space around it"):
        encode(LLAMA, query, word)


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("lm", [LLAMA, BERT, around("llama", "[CLS]", "[SEP]")], ids=["causal", "masked", "bos"])
@pytest.mark.parametrize("word", ["[SEP]", "[CLS] [PAD]", "cat [SEP]", "[UNK]"])
def test_a_target_of_special_tokens_is_refused(lm, word):
    with pytest.raises(ValueError, match="holds special tokens of tiny-.*, which are no words"):
        encode(lm, Query("Anna saw the", word))
    with pytest.raises(ValueError, match="holds special tokens"):
        predictions.predict(lm, [Query("Anna saw the", "cat")], ["cats", word])


@pytest.mark.kind("raw-errors", own=True)
def test_a_target_that_holds_the_mask_is_refused():
    for field in ("target", "foil", "subject"):
        with pytest.raises(ValueError, match=rf"the {field} .*holds \[MASK\]"):
            Query(**{"prompt": "Anna saw the [MASK]", "target": "cat", field: "[MASK]"})


@pytest.mark.kind("raw-errors", own=True)
def test_lists_that_are_none_are_refused():
    query = Query("Anna saw the", "cat")
    with pytest.raises(TypeError, match="expected a list of Query as queries, got Query"):
        predictions.predict(LLAMA, query)
    with pytest.raises(TypeError, match="expected a list of str as candidates, got str 'cats'"):
        predictions.predict(LLAMA, [query], "cats")
    with pytest.raises(TypeError, match="expected a list of str as candidates, but it holds int 3"):
        predictions.predict(LLAMA, [query], ["cats", 3])
    with pytest.raises(TypeError, match="a target must be text, got int 3"):
        encode(LLAMA, query, 3)
    with pytest.raises(ValueError, match="no queries given"):
        predictions.log_probabilities(LLAMA, [])
    with pytest.raises(ValueError, match="no texts given"):
        predictions.text_loss(LLAMA, [])
    with pytest.raises(TypeError, match="expected a list of str as texts, got str"):
        predictions.text_loss(LLAMA, "the cat")
    with pytest.raises(ValueError, match="no prompts given"):
        criteria.generations(LLAMA, [])
    for length in (0, -1, 1.5):
        with pytest.raises(ValueError, match="length must be"):
            criteria.generations(LLAMA, ["the cat"], length=length)
    for n in (0, -2, 2.5):
        with pytest.raises(ValueError, match="n must be"):
            stimuli.known_facts(LLAMA, "capital", n)
        with pytest.raises(ValueError, match="n must be"):
            stimuli.known_pairs(LLAMA, "subject_verb", n)
    assert len(predictions.predict(LLAMA, (q for q in [query, query]), (w for w in ["cats"]))) == 2


@pytest.mark.kind("raw-errors", own=True)
def test_a_subject_that_a_tokenizer_drops_is_refused():
    from tokenizers import normalizers

    tokenizer = tiny.tokenizer(masked=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("*", "")
    query = Query("the * cat is", "red", "*")
    with pytest.raises(ValueError, match=r"the subject '\*' of 'the \* cat is' has no tokens for tiny-llama"):
        span(replace(LLAMA, tokenizer=tokenizer), query)


# --------------------------------------------------------------------------------- not a number


def broken(family, value, dtype=torch.float32):
    lm = tiny.lm(family, dtype=dtype)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[7, 3] = value
    return lm


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_probabilities_that_are_not_numbers_are_no_answer(family, value, monkeypatch):
    lm = broken(family, value)
    refused = rf"of tiny-{family} for '.*' are not numbers; check its weights .* a wider dtype than torch.float32"
    query = Query("the capital of France is", "Paris", "France", "Madrid")
    with pytest.raises(ValueError, match=refused):
        predictions.predict(lm, [query])
    with pytest.raises(ValueError, match=refused):
        predictions.log_probabilities(lm, [query])
    with pytest.raises(ValueError, match=refused):
        predictions.text_loss(lm, ["the capital of France"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=refused):
            stimuli.known_facts(lm, "capital", 2)
        with pytest.raises(ValueError, match=refused):
            stimuli.known_pairs(lm, "subject_verb", 2)


@pytest.mark.kind("not-a-number", own=True)
def test_numbers_that_overflow_a_narrow_dtype_are_named_by_it():
    lm = tiny.lm("gpt2", dtype=torch.float16)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(3e4)
    with pytest.raises(ValueError, match="are not numbers; .* a wider dtype than torch.float16"):
        predictions.predict(lm, [Query("the capital of France is", "Paris")])


@pytest.mark.kind("not-a-number", own=True)
@pytest.mark.parametrize("seed", [None, 0])
def test_no_text_is_generated_from_probabilities_that_are_not_numbers(seed):
    with pytest.raises(ValueError, match="not numbers|not finite"):
        criteria.generations(broken("gpt2", float("nan")), ["the cat"], length=3, seed=seed)


@pytest.mark.kind("not-a-number", own=True)
def test_one_broken_prompt_among_sound_ones_is_found_in_any_batch():
    lm = tiny.lm("llama")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[ID["Spain"]] = float("nan")
    sound, bad = (Query(f"the capital of {x} is", "Paris") for x in ("France", "Spain"))
    assert len(predictions.predict(lm, [sound] * 3)) == 3
    for queries in ([bad], [sound, bad, sound]):
        with pytest.raises(ValueError, match="for 'the capital of Spain is' are not numbers"):
            predictions.predict(lm, queries)
