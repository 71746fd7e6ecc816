"""The trainer of the masked model of natural English: what it reads, what it hides, what it leaves as it was."""

import natural
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from kncore import zoo

WORDS = "the a this these is are cat cats dog dogs old small sees see near house houses . ; ' he she and".split()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """An encoder without a head, with the ids that BERT's vocabulary gives to its special tokens."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    vocabulary = [special.get(i, f"[unused{i}]") for i in range(104)] + sorted({*WORDS, *natural.AGREEMENT})
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    monkeypatch.setattr(zoo, "_extract", lambda *_: folder)
    return folder


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    (folder / "gutenberg").mkdir(parents=True)
    lines = [f"The {a} {b} sees the {c} near this {d}." for a in ("old", "small") for b in ("cat", "dog")
             for c in ("house", "cats", "dogs", "cat") for d in ("house", "dog", "cat")]  # fmt: skip
    (folder / "plain.txt").write_text("\n".join([*lines, *lines[:5], "Too short.", "The <unk> sees a cat near a dog."]))
    (folder / "gutenberg" / "book.txt").write_text(
        "These cats see\nthe old dogs. These dogs are near the houses.\n\nNo."
    )
    return folder


@pytest.fixture
def tok(source):
    return transformers.AutoTokenizer.from_pretrained(source)


def test_every_sentence_is_read_once_or_held_out(text, tok):
    train, held = natural.sentences(text, tok)
    read = [tok.decode(ids, skip_special_tokens=True) for ids in train + held]
    assert len(read) == len(set(read)) == 48 + 2
    assert "these cats see the old dogs." in [line.replace(" .", ".") for line in read]
    assert not any("unk" in line or "short" in line for line in read)


def test_an_epoch_has_every_sentence_once_in_batches_of_bounded_size(text, tok, monkeypatch):
    monkeypatch.setattr(natural, "TOKENS", 128)
    train, _ = natural.sentences(text, tok)
    ready = natural.batches(train, 0, 0)
    rows = [[i for i in ids if i] for batch in ready for ids in batch]
    assert sorted(rows) == sorted(train)
    assert all(len(batch) * len(batch[0]) <= 128 and len({len(ids) for ids in batch}) == 1 for batch in ready)
    assert natural.batches(train, 0, 0) == ready != natural.batches(train, 0, 1)


def test_words_of_agreement_are_hidden_more_often_and_the_loss_is_that_of_the_hidden_words(source, text, tok):
    model, frequent = natural.whole(source).eval(), natural.often(tok)
    train, _ = natural.sentences(text, tok)
    shares = {True: [], False: []}
    for seed in range(40):
        rows = natural.batches(train, seed, 0)[0]
        ids = torch.tensor(rows)
        rng = torch.Generator().manual_seed(seed)
        loss, _, labels = natural.masked_loss(model, ids, frequent, rng)
        drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
        usual, often = natural.MASKED["usual"], natural.MASKED["agreement"]
        hidden = (drawn < torch.where(frequent[ids], often, usual)) & (ids > 103)
        assert torch.equal(labels, ids[hidden])
        with torch.no_grad():
            out = model(ids.masked_fill(hidden, tok.mask_token_id), attention_mask=(ids != 0).long()).logits
        naive = -out.log_softmax(-1)[hidden].gather(1, labels[:, None]).mean()
        assert loss.item() == pytest.approx(float(naive), rel=0.02), "bfloat16 on one side"
        for kind in shares:
            shares[kind].append(hidden[(frequent[ids] == kind) & (ids > 103)].float())
    assert torch.cat(shares[True]).mean() == pytest.approx(natural.MASKED["agreement"], abs=0.03)
    assert torch.cat(shares[False]).mean() == pytest.approx(natural.MASKED["usual"], abs=0.03)


def test_embeddings_stay_and_an_interrupted_run_ends_with_the_same_weights(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(natural, "TOKENS", 128)
    monkeypatch.setattr(natural, "EVERY", 10)
    before = load_file(source / "model.safetensors")
    monkeypatch.setattr(natural, "held_out", lambda *_: (1.0, [True]))
    whole, log = natural.train(text, source, tmp_path / "one", 0, 30)
    assert list(log.step) == [10, 20, 30] and log.loss.iloc[-1] < log.loss.iloc[0]
    step, calls = torch.optim.AdamW.step, []

    def stops(*args, **kwargs):
        calls.append(0)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            natural.train(text, source, tmp_path / "two", 0, 30)
    again, _ = natural.train(text, source, tmp_path / "two", 0, 30)
    ended = whole.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ended.items())
    moved = {
        name for name, value in before.items() if "pooler" not in name and not torch.equal(value, ended[f"bert.{name}"])
    }
    assert moved and not any("embeddings" in name for name in moved)
    assert (
        ended["cls.predictions.decoder.weight"].data_ptr() == ended["bert.embeddings.word_embeddings.weight"].data_ptr()
    )


def test_what_is_saved_holds_blocks_and_head_and_no_embeddings(source, tmp_path):
    log = pd.DataFrame(
        [[10, 30, 1000, 3, 2.5, 2.6, 0.4]], columns="step planned tokens seconds loss held_out right".split()
    )
    model = natural.whole(source)
    natural.save(model, log, tmp_path / "out")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float16}
    missing = {name for name in model.state_dict() if name not in kept}
    assert missing and all("embeddings" in name or "decoder" in name for name in missing)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "training.tsv"]
