"""The trainer of the controlled models: what it reads, what it hides, and that an interrupted run ends as any other."""

import controlled
import pandas as pd
import pytest
import torch

import kncore
from knpaper import corpus

KINDS = sorted(controlled.PLAN)


@pytest.fixture(scope="module")
def first() -> list[corpus.Sentence]:
    return corpus.sentences()[:1500]


@pytest.fixture
def small(monkeypatch, first):
    some = list(first)
    monkeypatch.setattr(corpus, "sentences", lambda seed=0: some)
    monkeypatch.setattr(controlled, "SHAPES", ((12, 16), (8, 24), (6, 32)))
    return some


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_reads_whole_sentences_and_nearly_all_of_them(kind, small):
    tok = controlled.tokenizer(kind)
    words = {i: word for word, i in tok.get_vocab().items()}
    known = {tuple(corpus.split(sentence.text)[:14]) for sentence in small}  # longer ones are cut
    alone = read = 0
    for ids, aims in controlled.batches(kind, controlled.read(tok), 0, 0):
        assert ids.shape == aims.shape and not aims[ids < len(controlled.SPECIAL)].any()
        for row in ids.tolist():
            found = [words[i] for i in row if i >= len(controlled.SPECIAL)]
            read += found.count(".")
            if ids.shape[1] == 16:
                alone += 1
                assert tuple(found[:14]) in known
    assert alone >= len(small) / 3 - 12 and read > 0.8 * len(small)


def test_the_masked_model_learns_from_hidden_words_alone_and_targets_are_hidden_most(small):
    tok = controlled.tokenizer("bert")
    hidden, rng = {True: [], False: []}, torch.Generator().manual_seed(0)
    for ids, aims in controlled.batches("bert", controlled.read(tok), 0, 0):
        inputs, labels = controlled.prepare("bert", ids, aims, rng)
        chosen = labels != -100
        assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])
        assert (inputs[chosen] == tok.mask_token_id).all() and not chosen[ids < len(controlled.SPECIAL)].any()
        for aim in hidden:
            hidden[aim].append(chosen[(aims == aim) & (ids >= len(controlled.SPECIAL))])
    shares = {aim: torch.cat(parts).float().mean() for aim, parts in hidden.items()}
    assert shares[True] == pytest.approx(controlled.MASKED["target"], abs=0.03)
    assert shares[False] == pytest.approx(controlled.MASKED["other"], abs=0.03)


def test_a_causal_model_learns_every_word_from_those_before_it(small):
    ids, aims = next(controlled.batches("gpt2", controlled.read(controlled.tokenizer("gpt2")), 0, 0))
    inputs, labels = controlled.prepare("gpt2", ids, aims, torch.Generator())
    assert torch.equal(inputs, ids)
    real = ids[:, 1:] != 0
    assert torch.equal(labels[:, :-1][real], ids[:, 1:][real]) and (labels[:, :-1][~real] == -100).all()
    assert (labels[:, -1] == -100).all()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(kind, small, tmp_path, monkeypatch):
    for name, size in {"HIDDEN": 32, "BLOCKS": 2, "HEADS": 2}.items():
        monkeypatch.setattr(controlled, name, size)
    whole, tok, log = controlled.train(kind, 0, tmp_path / "one", 1, 1e-3, 0.1)
    assert log.step.iloc[-1] > 50 and log.loss.iloc[-1] < log.loss.iloc[0]
    step = torch.optim.AdamW.step
    calls = []

    def stops(*args, **kwargs):
        calls.append(0)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(controlled, "PATIENCE", 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            controlled.train(kind, 0, tmp_path / "two", 1, 1e-3, 0.1)
    again, _, other = controlled.train(kind, 0, tmp_path / "two", 1, 1e-3, 0.1)
    assert list(other.step) == list(log.step)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_saved_loads_by_folder_with_its_card_and_tables(small, tmp_path, monkeypatch):
    table = pd.DataFrame([["something", 3, 0.5, 0.1, 0.9]], columns=["what", "n", "share", "low", "high"])
    monkeypatch.setattr(controlled, "evaluate", lambda lm: table)
    tok = controlled.tokenizer("gpt2")
    model = controlled.fresh("gpt2", len(tok))
    log = pd.DataFrame([[50, 1000, 3, 2.5]], columns=["step", "tokens", "seconds", "loss"])
    controlled.save(model, tok, log, tmp_path / "controlled-gpt2", "gpt2", 0)
    lm = kncore.load(tmp_path / "controlled-gpt2")
    assert lm.dtype == torch.float32 and lm.tokenizer("the castle").input_ids == tok("the castle").input_ids
    card = (tmp_path / "controlled-gpt2" / "README.md").read_text()
    assert "| something | 3 | 0.500 | [0.100, 0.900] |" in card and "2.500 nats" in card
    assert [path.name for path in tmp_path.iterdir()] == ["controlled-gpt2"]
