"""The second moment of keys against the mean of outer products, token by token."""

import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import whole

from kncore import covariance, prose
from kncore.generation import generate
from kncore.store import cache

MODELS = {family: tiny.lm(family) for family in tiny.FAMILIES}
on_all_families = pytest.mark.parametrize("family", tiny.FAMILIES)
TEXTS = [
    "Anna saw the cats in France . the capital of France is Paris",
    "these red books of Anna",
    "the " * 200,
    "in Spain",
]


@pytest.fixture(autouse=True)
def models_stay_as_they_were():
    yield
    assert not any(lm.is_modified for lm in MODELS.values())


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    return tmp_path


def files():
    return sorted(cache.scores_folder().rglob("*.safetensors"))


def naive(lm, pieces, block):
    """Mean of k kᵀ, one text after the other."""
    keys = []
    hook = whole.projection(lm, block).register_forward_hook(lambda module, args, out: keys.append(args[0][0].double()))
    with torch.no_grad():
        for piece in pieces:
            lm.model(torch.tensor([piece]))
    hook.remove()
    keys = torch.cat(keys)
    return torch.stack([torch.outer(k, k) for k in keys]).mean(0)


def pieces(lm, length):
    """Token ids of TEXTS by hand, cut to `length`."""
    table = lm.tokenizer.get_vocab()
    out = []
    for text in TEXTS:
        ids = [table[word] for word in text.split()]
        ids = [2, *ids, 3] if lm.spec.masked else ids
        out += [ids[i : i + length] for i in range(0, len(ids), length)]
    return [piece for piece in out if len(piece) > 1]


@on_all_families
def test_the_covariance_is_the_mean_of_outer_products(family, folder):
    lm = MODELS[family]
    limit = 64 - (lm.tokenizer.pad_token_id + 1 if family == "roberta" else 0)
    for block in range(3):
        got = covariance.covariance(lm, block, str(folder))
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, naive(lm, pieces(lm, limit), block), atol=1e-6, rtol=1e-4)


@on_all_families
def test_texts_that_are_given_are_those_of_a_folder(family, folder, tmp_path):
    lm = MODELS[family]
    got = covariance.covariance(lm, 1, TEXTS)
    assert torch.equal(got, covariance.covariance(lm, 1, str(folder)))
    assert not torch.equal(got, covariance.covariance(lm, 1, TEXTS[:2]))
    with pytest.raises(ValueError, match="no two tokens in a row"):
        covariance.covariance(lm, 1, [])
    with pytest.raises(ValueError, match="or a folder of text files; got"):
        covariance.covariance(lm, 1, ["the cat", 3])


def test_blocks_above_are_not_run(folder):
    lm = MODELS["gpt2"]
    runs = Counter()
    hooks = [
        block.register_forward_hook(lambda *_, number=number: runs.update([number]))
        for number, block in enumerate(lm.blocks)
    ]
    try:
        covariance.covariance(lm, 1, str(folder))
    finally:
        for hook in hooks:
            hook.remove()
    assert runs[0] >= 1 and runs[1] == runs[2] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_samples_are_the_models_own_text(family, monkeypatch):
    monkeypatch.setattr(covariance, "SAMPLES", 6)
    lm = MODELS[family]
    starts = [lm.tokenizer(text)["input_ids"][:3] for text in prose.passages()[:6]]
    want = generate(lm, torch.tensor(starts), 64, seed=4).tolist()
    got = covariance.covariance(lm, 1, seed=4)
    torch.testing.assert_close(got, naive(lm, want, 1), atol=1e-6, rtol=1e-4)
    assert not torch.equal(got, covariance.covariance(lm, 1, seed=5))


def test_text_means_the_passages():
    lm = MODELS["bert"]
    got = covariance.covariance(lm, 0, "text")
    ids = [lm.tokenizer(text)["input_ids"] for text in prose.passages()]
    assert all(len(one) < 64 for one in ids)
    torch.testing.assert_close(got, naive(lm, ids, 0), atol=1e-6, rtol=1e-4)


def test_identity_needs_no_text():
    assert covariance.covariance(MODELS["gpt2"], 1, "identity") is None
    assert not files()


def test_it_is_computed_once_for_each_text_block_and_model(folder, monkeypatch):
    lm = MODELS["llama"]
    computed = []
    moment = covariance._moment
    monkeypatch.setattr(covariance, "_moment", lambda *args: computed.append(args[1]) or moment(*args))
    first = covariance.covariance(lm, 1, str(folder))
    assert torch.equal(first, covariance.covariance(lm, 1, str(folder))) and computed == [1]
    other = covariance.covariance(lm, 2, str(folder))
    assert not torch.equal(first, other) and computed == [1, 2]
    covariance.covariance(replace(lm, revision="other"), 1, str(folder))
    (folder / "more.txt").write_text("the cat is red")
    changed = covariance.covariance(lm, 1, str(folder))
    assert not torch.equal(first, changed) and computed == [1, 2, 1, 1]
    assert len(files()) == 4


def test_samples_are_drawn_once(monkeypatch):
    monkeypatch.setattr(covariance, "SAMPLES", 4)
    lm = MODELS["gpt2"]
    first = [covariance.covariance(lm, block) for block in (0, 1)]
    monkeypatch.setattr(covariance, "generate", functools.wraps(generate)(lambda *_: pytest.fail("drawn again")))
    again = [covariance.covariance(lm, block) for block in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("left", [0, 7, 1000])
def test_a_half_written_entry_is_computed_again(folder, left):
    lm = MODELS["llama"]
    want = covariance.covariance(lm, 1, str(folder))
    (file,) = files()
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:left])
    assert torch.equal(covariance.covariance(lm, 1, str(folder)), want)
    assert file.read_bytes() == whole_file


def test_a_changed_model_has_a_covariance_of_its_own(folder):
    lm = tiny.lm("llama")
    want = covariance.covariance(lm, 1, str(folder))
    with torch.no_grad():
        whole.projection(lm, 0).weight.mul_(2)
    for _ in range(2):
        assert not torch.allclose(covariance.covariance(lm, 1, str(folder)), want)
    assert torch.equal(covariance.covariance(tiny.lm("llama"), 1, str(folder)), want)


def test_bad_sources_and_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="masked model and cannot go on with a text; use covariance 'text'"):
        covariance.covariance(MODELS["bert"], 0)
    with pytest.raises(FileNotFoundError, match="no .txt file"):
        covariance.covariance(MODELS["gpt2"], 0, str(tmp_path))
    with pytest.raises(ValueError, match="block 3 does not exist; tiny-gpt2 has blocks 0 to 2"):
        covariance.covariance(MODELS["gpt2"], 3, "text")


@pytest.mark.kind("raw-errors")
def test_sources_that_are_no_folder_of_text_are_named(tmp_path):
    lm, file = MODELS["gpt2"], tmp_path / "some.txt"
    file.write_text("the cat is red")
    with pytest.raises(ValueError, match="is a file; name the folder"):
        covariance.covariance(lm, 0, str(file))
    for wrong in ("", " ", None, 3):
        with pytest.raises(ValueError, match="or a folder of text files"):
            covariance.covariance(lm, 0, wrong)
    assert torch.equal(covariance.covariance(lm, np.int64(1), tmp_path), covariance.covariance(lm, 1, str(tmp_path)))
    for wrong in (True, 1.0, None):
        with pytest.raises(ValueError, match="block must be a whole number"):
            covariance.covariance(lm, wrong, "text")


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize(
    ("family", "texts"),
    [*((family, texts) for family in tiny.FAMILIES for texts in ([""], [" \n", ""])), ("gpt2", ["the"])],
    ids=str,
)
def test_text_of_less_than_two_tokens_has_no_covariance(family, texts, tmp_path):
    """Of a masked model the special tokens that it would put around nothing are no text."""
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    with pytest.raises(ValueError, match="no two tokens in a row"):
        covariance.covariance(MODELS[family], 0, str(tmp_path))
    assert not files()


@pytest.mark.kind("not-a-number", own=True)
def test_an_empty_file_beside_text_adds_nothing(tmp_path, folder):
    lm = MODELS["bert"]
    want = covariance.covariance(lm, 1, str(folder))
    (folder / "empty.txt").write_text("\n")
    assert torch.equal(covariance.covariance(lm, 1, str(folder)), want)


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_text_of_fewer_tokens_than_neurons_is_refused_whatever_its_rounding(family, tmp_path):
    """24 neurons: 23 tokens leave one direction of which nothing is known, and rounding decided whether that showed."""
    lm = MODELS[family]
    words = tiny.WORDS
    for start in range(8):
        n = 21 if lm.spec.masked else 23  # and two special tokens
        text = " ".join(itertools.islice(itertools.cycle(words[start:] + words[:start]), n))
        (tmp_path / "text.txt").write_text(text)
        moment = covariance.covariance(lm, 1, str(tmp_path))
        with pytest.raises(ValueError, match="24 neurons is singular: too little text"):
            covariance.solve(moment, torch.ones(1, 24))


@pytest.mark.kind("not-a-number", own=True)
def test_whether_a_covariance_is_singular_does_not_hang_on_the_units_of_a_neuron():
    rows = torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[:, 2] *= 1e-8
    keys = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = rows.T @ rows / 60
    torch.testing.assert_close(covariance.solve(moment, keys) @ moment, keys, atol=1e-6, rtol=1e-6)
    rows[:, 2] = rows[:, 3] * 1e-8
    with pytest.raises(ValueError, match="singular"):
        covariance.solve(rows.T @ rows / 60, keys)
    rows = rows[:5].float()
    with pytest.raises(ValueError, match="singular"):
        covariance.solve(rows.T @ rows, keys)


def test_a_factor_solves_as_its_moment_does_and_a_moment_that_is_not_square_has_none():
    rows = torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys, moment = rows[:3] + 1, rows.T @ rows / 60
    got = covariance.solve(covariance.factor(moment), keys)
    torch.testing.assert_close(got, torch.linalg.solve(moment, keys.T).T)
    with pytest.raises(ValueError, match=r"shape \(7, 7\) for keys of 6 neurons"):
        covariance.solve(covariance.factor(moment), keys[:, :6])
    with pytest.raises(ValueError, match=r"shape \(6, 7\) is not square"):
        covariance.factor(moment[:6])


@pytest.mark.kind("not-a-number")
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_neurons_that_are_not_numbers_have_no_covariance(family, folder):
    lm = tiny.lm(family)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.get_vocab()["cats"]] = float("nan")
    with pytest.raises(ValueError, match=f"block 1 of tiny-{family} are not finite"):
        covariance.covariance(lm, 1, str(folder))
    assert not files()
