"""Text that a model writes, against the probabilities of full passes."""

import pytest
import tiny
import torch

from kncore.generation import generate

MODELS = {family: tiny.lm(family) for family in tiny.CAUSAL}


@pytest.mark.kind("raw-errors", own=True)
def test_a_model_without_probabilities_writes_no_text():
    lm = tiny.lm("llama")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[3] = float("nan")
    for seed in (0, None):
        with pytest.raises(ValueError, match="probabilities of tiny-llama are not numbers"):
            generate(lm, torch.tensor([[5, 6]]), 5, seed=seed)
    with pytest.raises(ValueError, match="the context of tiny-gpt2 is 64"):
        generate(MODELS["gpt2"], torch.tensor([[5, 6]]), 65)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_samples_follow_the_models_distribution(family):
    """Two tokens after one prompt: shares of 4000 samples against probabilities of full passes."""
    lm, n = MODELS[family], 4000
    prompt = lm.tokenizer("the capital of")["input_ids"]
    drawn = generate(lm, torch.tensor([prompt] * n), 5)
    assert drawn.shape == (n, 5) and drawn[:, :3].tolist() == [prompt] * n
    with torch.no_grad():
        first = lm.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        then = lm.model(torch.tensor([[*prompt, i] for i in range(tiny.VOCAB)])).logits[:, -1].softmax(-1)
    wanted = first[:, None] * then
    got = torch.zeros_like(wanted).index_put_((drawn[:, 3], drawn[:, 4]), torch.tensor(1 / n), accumulate=True)
    error = (got - wanted) / (wanted * (1 - wanted) / n).sqrt().clamp_min(1e-4)
    assert error[wanted > 5 / n].abs().max() < 5
    assert float((got - wanted).abs().sum()) < 2 * float((2 / torch.pi * wanted / n).sqrt().sum())


def test_samples_depend_on_the_seed_alone():
    lm = MODELS["llama"]
    prompts = torch.tensor([lm.tokenizer("the cats")["input_ids"]] * 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(lm, prompts, 12, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(generate(lm, prompts, 12, seed=1), first)
    assert not torch.equal(generate(lm, prompts, 12, seed=2), first)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_without_a_seed_the_most_probable_token_comes_also_after_padding(family):
    lm = MODELS[family]
    texts = ["the capital of France", "Anna", "these red books"]
    ids = [lm.tokenizer(text)["input_ids"] for text in texts]
    padded = torch.tensor([[0] * (4 - len(one)) + one for one in ids])
    real = torch.tensor([[False] * (4 - len(one)) + [True] * len(one) for one in ids])
    got = generate(lm, padded, 10, seed=None, real=real)
    for row, one in zip(got.tolist(), ids, strict=True):
        one = list(one)
        for _ in range(6):
            with torch.no_grad():
                one.append(int(lm.model(torch.tensor([one])).logits[0, -1].argmax()))
        assert row[-len(one) :] == one
