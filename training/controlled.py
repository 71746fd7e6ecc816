"""Train a controlled model: a small BERT, GPT-2 or LLaMA on the corpus of `knpaper.corpus`, and nothing else.

    python training/controlled.py gpt2 --seed 0

writes config, tokenizer, weights (float16), training.tsv, evaluation.tsv and a card to
kncore/weights/controlled-gpt2. A run that was interrupted goes on from its last checkpoint.
"""

import argparse
import itertools
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from trainer import Trainer, filled, markdown, shares

import kncore
from kncore import predictions, zoo
from kncore.store import disk
from knpaper import corpus, grammar, stats, tasks

BLOCKS, HIDDEN, HEADS, CONTEXT = 4, 128, 4, 96
SHAPES = ((192, 16), (128, 24), (32, 96))  # sequences in a batch, tokens in a sequence; the first: one sentence each
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# epochs, learning rate, warm-up (share of the steps)
PLAN = {"gpt2": (3, 2e-3, 0.05), "llama": (3, 2e-3, 0.05), "bert": (7, 1e-3, 0.1)}
PATIENCE = 60  # seconds between checkpoints
MASKED = {"target": 0.8, "other": 0.12}


def tokenizer(kind: str):
    """Words and marks of the corpus, the frequent ones first, as whole tokens."""
    seen = Counter(word for sentence in corpus.sentences() for word in corpus.split(sentence.text))
    words = SPECIAL + sorted(seen, key=lambda word: (-seen[word], word))
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if kind == "bert":
        ends = [(mark, words.index(mark)) for mark in ("[CLS]", "[SEP]")]
        tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=CONTEXT, **special)


def fresh(kind: str, vocabulary: int) -> transformers.PreTrainedModel:
    """A model with random weights. The three have the same shape; the three MLP matrices of LLaMA are narrower."""
    shape = {"vocab_size": vocabulary, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
    shape |= {"max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape)
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama":
        config = transformers.LlamaConfig(intermediate_size=344, tie_word_embeddings=True, **shape)
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        intermediate_size=4 * HIDDEN, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape
    )
    return transformers.BertForMaskedLM(config)


def read(tok) -> list[tuple[list[int], list[bool]]]:
    """Each sentence as token ids, and which of them are to be learnt first of all."""
    table, out = tok.get_vocab(), []
    for text, target in corpus.sentences():
        words, aim = corpus.split(text), corpus.split(target)
        places = [i for i in range(len(words)) if aim and words[i : i + len(aim)] == aim]
        chosen = {places[-1] + k for k in range(len(aim))} if places else set()
        out.append(([table[word] for word in words], [i in chosen for i in range(len(words))]))
    return out


def batches(kind: str, sentences: list, seed: int, epoch: int):
    """Token ids and targets of one epoch. A third of the sentences stand alone, the others are joined to sequences."""
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(sentences, len(sentences))
    begin, end = ([SPECIAL.index("[CLS]")], [SPECIAL.index("[SEP]")]) if kind == "bert" else ([], [])
    ready = []
    for which, (count, length) in enumerate(SHAPES):
        rows, some = [], order[which :: len(SHAPES)]
        room = length - len(begin + end)
        while some:
            ids, aims = some.pop()
            while which and some and len(ids) < room:
                more, aims_of = some.pop()
                ids, aims = ids + more, aims + aims_of
            ids, aims = begin + ids[:room] + end, [False] * len(begin) + aims[:room]
            rows.append((ids + [0] * (length - len(ids)), aims + [False] * (length - len(aims))))
        ready += [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
    rng.shuffle(ready)
    for rows in ready:
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([aims for _, aims in rows])


def prepare(kind: str, ids, aims, rng: torch.Generator):
    """Inputs, and the label of every position, -100 where there is none."""
    if kind != "bert":
        labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
        return ids, labels.masked_fill(labels == 0, -100)
    chance = torch.where(aims, MASKED["target"], MASKED["other"]) * (ids >= len(SPECIAL))
    chosen = torch.rand(ids.shape, generator=rng) < chance
    return ids.masked_fill(chosen, SPECIAL.index("[MASK]")), ids.masked_fill(~chosen, -100)


def train(kind: str, seed: int, scratch: Path, epochs: int, rate: float, warm: float):
    """The trained model, its tokenizer and the log (step, tokens, seconds, loss in nats per predicted token)."""
    torch.manual_seed(seed)
    tok = tokenizer(kind)
    model = fresh(kind, len(tok))
    model.set_attn_implementation("eager")  # on CPU half the time of the fused kernels, for sequences as short as these
    sentences = read(tok)
    head = model.cls if kind == "bert" else model.lm_head
    per_epoch = sum(1 for _ in batches(kind, sentences, seed, 0))
    run = Trainer(model, scratch / f"{kind}-{seed}.pt", per_epoch * epochs, rate, warm, decay=0.1)
    said = 0.0
    for epoch in range(run.step // per_epoch, epochs):
        done = max(0, run.step - epoch * per_epoch)  # where a run was interrupted
        for ids, aims in itertools.islice(batches(kind, sentences, seed, epoch), done, None):
            inputs, labels = prepare(kind, ids, aims, torch.Generator().manual_seed(seed * 10**6 + run.step))
            chosen = labels != -100
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mask = (inputs != 0).long()
                hidden = model.base_model(input_ids=inputs, attention_mask=mask).last_hidden_state
                logits = head(hidden[chosen])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen])
            run.update(loss, SHAPES[0][0] * SHAPES[0][1])
            if run.due(50):
                seconds = run.seconds()
                run.log.append([run.step, run.tokens, round(seconds), round(run.mean_loss(), 4)])
                if seconds - said > PATIENCE or run.step == run.total:
                    said, progress = seconds, f"step {run.step} of {run.total}, loss {run.log[-1][-1]:.3f}"
                    print(f"{kind} {seed}: {progress}, {seconds:.0f} s", flush=True)
                    run.keep()
    return model, tok, pd.DataFrame(run.log, columns=["step", "tokens", "seconds", "loss"])


def evaluate(lm) -> pd.DataFrame:
    """What the model should know: agreement, on pairs that it has seen and on held-out ones; and every stated fact."""
    masked, here = lm.spec.masked, corpus.world()
    real = [pair for pair in corpus.pairs() if pair.kind != "invented"]
    pairs = {
        "pairs of determiner and noun, seen": [pair for pair in real if pair.count][::5],
        "the same, held out": [pair for pair in real if pair.held_out],
        "the same, invented nouns": [pair for pair in corpus.pairs() if pair.kind == "invented"],
    }
    asked = {what: corpus.pair_queries(some, masked) for what, some in pairs.items()}
    form = "masked" if masked else "causal"
    for phenomenon in grammar.phenomena():
        asked[phenomenon.replace("_", " ")] = grammar.minimal_pairs(phenomenon, seed=1, form=form)
    for name in corpus.OWN:
        asked[f"own facts: {name.replace('_', ' ')}"] = tasks.facts(name)
    facts = {f"capital, {group.replace('_', ' ')}": relation for group, relation in here.capital.items()}
    facts["country of a capital, two way"] = here.country["two_way"]
    facts |= {f"field, {group}": relation for group, relation in here.field.items()}
    facts |= {"occupation, linked": here.occupation["linked"], "occupation, others": here.others}
    asked |= {what: corpus.fact_queries(relation) for what, relation in facts.items()}
    right = {what: predictions.predict(lm, queries).prefers.tolist() for what, queries in asked.items()}
    return shares({what: stats.share(right[what], [query.item for query in asked[what]]) for what in asked})


def save(model, tok, log, folder: Path, kind: str, seed: int) -> None:
    """Everything into the folder, at once."""
    staged = folder.with_name(f".{folder.name}")
    shutil.rmtree(staged, ignore_errors=True)
    model.half().save_pretrained(staged)
    tok.save_pretrained(staged)
    log.to_csv(staged / "training.tsv", sep="\t", index=False)
    evaluate(kncore.load(staged)).to_csv(staged / "evaluation.tsv", sep="\t", index=False)
    (staged / "README.md").write_text(card(staged, folder.name, kind, seed), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def card(folder: Path, name: str, kind: str, seed: int) -> str:
    """What a user of the weights in the folder has to know."""
    table, log = (pd.read_csv(folder / f"{what}.tsv", sep="\t") for what in ("evaluation", "training"))
    weights = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    words = len(transformers.AutoTokenizer.from_pretrained(folder))
    epochs, rate, warm = PLAN[kind]
    return filled(
        __file__,
        name=name,
        kind=kind,
        seed=seed,
        words=words,
        blocks=BLOCKS,
        hidden=HIDDEN,
        weights=weights,
        epochs=epochs,
        rate=rate,
        warm=warm,
        last=log.iloc[-1],
        minutes=log.seconds.iloc[-1] / 60,
        table=markdown(table),
        digest=disk.digest(folder / "model.safetensors"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=PLAN)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the sentences")
    parser.add_argument("--out", type=Path, default=zoo.SHIPPED, help="the folder of models")
    parser.add_argument("--scratch", type=Path, default=Path("_build/training"), help="where checkpoints are kept")
    parser.add_argument("--epochs", type=int, help="another number of passes over the corpus")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    epochs, rate, warm = PLAN[chosen.kind]
    model, tok, log = train(chosen.kind, chosen.seed, chosen.scratch, chosen.epochs or epochs, rate, warm)
    name = f"controlled-{chosen.kind}" + (f"-{chosen.seed}" if chosen.seed else "")
    save(model, tok, log, chosen.out / name, chosen.kind, chosen.seed)


if __name__ == "__main__":
    main()
