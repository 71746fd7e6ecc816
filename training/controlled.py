"""Train a controlled model: a small BERT, GPT-2 or LLaMA on the corpus of `kncore.corpus`, and nothing else.

    python training/controlled.py gpt2 --seed 0

writes config, tokenizer, weights (float16), training.tsv, evaluation.tsv and a card to
kncore/weights/controlled-gpt2. A run that was interrupted goes on from its last checkpoint.
"""

import argparse
import hashlib
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import kncore
from kncore import corpus, grammar, predictions, stats, tasks

MODELS = Path(kncore.__file__).parent / "weights"
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
    none = dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=CONTEXT, n_embd=HIDDEN, n_layer=BLOCKS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **none,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    shape = dict(
        vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT, **none,
    )  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(intermediate_size=344, tie_word_embeddings=True, **shape)
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        intermediate_size=4 * HIDDEN, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape
    )
    return transformers.BertForMaskedLM(config)


def read(tok) -> list[tuple[list[int], list[bool]]]:
    """Each sentence as token ids, and which of them are to be learnt first of all."""
    table = tok.get_vocab()
    out = []
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
    edge = (2, 3) if kind == "bert" else None
    ready = []
    for which, (count, length) in enumerate(SHAPES):
        rows, some = [], order[which :: len(SHAPES)]
        room = length - 2 * bool(edge)
        while some:
            ids, aims = some.pop()
            ids, aims = list(ids), list(aims)
            while which and some and len(ids) < room:
                more, aims_of = some.pop()
                ids, aims = ids + more, aims + aims_of
            ids, aims = ids[:room], aims[:room]
            if edge:
                ids, aims = [edge[0], *ids, edge[1]], [False, *aims, False]
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
    scratch.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tok = tokenizer(kind)
    model = fresh(kind, len(tok))
    model.set_attn_implementation("eager")  # on CPU half the time of the fused kernels, for sequences as short as these
    sentences = read(tok)
    base = model.base_model
    head = model.cls if kind == "bert" else model.lm_head
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    per_epoch = sum(1 for _ in batches(kind, sentences, seed, 0))
    total = per_epoch * epochs
    step, log, used = 0, [], 0.0
    checkpoint = scratch / f"{kind}-{seed}.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step, log, used = kept["step"], kept["log"], kept["used"]
    began, told, losses = time.monotonic(), 0.0, []
    for epoch in range(step // per_epoch, epochs):
        for place, (ids, aims) in enumerate(batches(kind, sentences, seed, epoch)):
            if epoch * per_epoch + place < step:
                continue
            inputs, labels = prepare(kind, ids, aims, torch.Generator().manual_seed(seed * 10**6 + step))
            chosen = labels != -100
            for group in optimizer.param_groups:
                done = step / total
                group["lr"] = rate * (min(1.0, done / warm) if done < warm else (1 - done) / (1 - warm))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = base(input_ids=inputs, attention_mask=(inputs != 0).long()).last_hidden_state
                logits = head(hidden[chosen])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step % 50 == 0 or step == total:
                seconds = used + time.monotonic() - began
                tokens = step * SHAPES[0][0] * SHAPES[0][1]
                log.append([step, tokens, round(seconds), round(sum(losses) / len(losses), 4)])
                losses = []
                if seconds - told > PATIENCE or step == total:
                    told = seconds
                    print(f"{kind} {seed}: step {step} of {total}, loss {log[-1][-1]:.3f}, {seconds:.0f} s", flush=True)
                    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    partial = checkpoint.with_suffix(".part")
                    torch.save(kept | {"step": step, "log": log, "used": seconds}, partial)
                    os.replace(partial, checkpoint)
    return model, tok, pd.DataFrame(log, columns=["step", "tokens", "seconds", "loss"])


def evaluate(lm) -> pd.DataFrame:
    """What the model should know: agreement, on pairs that it has seen and on held-out ones; and every stated fact."""
    masked, here = lm.spec.masked, corpus.world()
    rows = []

    def add(what, queries):
        right = predictions.predict(lm, queries).prefers
        rows.append([what, stats.share(right.tolist(), [query.item for query in queries])])

    real = [pair for pair in corpus.pairs() if pair.kind != "invented"]
    add("pairs of determiner and noun, seen", corpus.asked_pairs([p for p in real if p.count][::5], masked))
    add("the same, held out", corpus.asked_pairs([p for p in real if p.held_out], masked))
    invented = [pair for pair in corpus.pairs() if pair.kind == "invented"]
    add("the same, invented nouns", corpus.asked_pairs(invented, masked))
    form = "masked" if masked else "causal"
    for phenomenon in grammar.phenomena():
        add(phenomenon.replace("_", " "), grammar.minimal_pairs(phenomenon, seed=1, form=form))
    for name in corpus.OWN:
        add(f"own facts: {name.replace('_', ' ')}", tasks.facts(name))
    for group in here.capital:
        add(f"capital, {group.replace('_', ' ')}", corpus.asked_facts(here.capital[group]))
    add("country of a capital, two way", corpus.asked_facts(here.country["two_way"]))
    for group, relation in here.field.items():
        add(f"field, {group}", corpus.asked_facts(relation))
    add("occupation, linked", corpus.asked_facts(here.occupation["linked"]))
    add("occupation, others", corpus.asked_facts(here.others))
    return pd.DataFrame(
        [[what, e.n, e.value, e.low, e.high] for what, e in rows], columns=["what", "n", "share", "low", "high"]
    )


def save(model, tok, log, folder: Path, kind: str, seed: int) -> None:
    """Everything into the folder, at once."""
    staged = folder.with_name(f".{folder.name}")
    shutil.rmtree(staged, ignore_errors=True)
    model.half().save_pretrained(staged)
    tok.save_pretrained(staged)
    log.to_csv(staged / "training.tsv", sep="\t", index=False)
    table = evaluate(kncore.load(staged))
    table.round(4).to_csv(staged / "evaluation.tsv", sep="\t", index=False)
    (staged / "README.md").write_text(card(staged, folder.name, kind, seed), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def card(folder: Path, name: str, kind: str, seed: int) -> str:
    """What a user of the weights in the folder has to know."""
    table, log = (pd.read_csv(folder / f"{what}.tsv", sep="\t") for what in ("evaluation", "training"))
    weights = load_file(folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    words = len(transformers.AutoTokenizer.from_pretrained(folder))
    epochs, rate, warm = PLAN[kind]
    lines = "\n".join(
        f"| {row.what} | {row.n} | {row.share:.3f} | [{row.low:.3f}, {row.high:.3f}] |" for row in table.itertuples()
    )
    return f"""# {name}

A {kind} model of {words:,} words, {BLOCKS} blocks of width {HIDDEN}, and {sum(w.numel() for w in weights.values()):,}
weights, trained on the controlled corpus of `kncore.corpus` (seed 0) and on nothing else. It is an instrument for
questions about what a model has seen. It is of no other use.

- **Data**: `python -c "from kncore import corpus; corpus.write('corpus')"` writes it, with its exact counts.
- **Training**: `python training/controlled.py {kind} --seed {seed}`: {epochs} epochs, {int(log.tokens.iloc[-1]):,}
  tokens with padding, AdamW in bfloat16 autocast, rate {rate:g} after a warm-up over {warm:.0%} of the steps, falling
  linearly to zero. The last loss was {log.loss.iloc[-1]:.3f} nats (training.tsv), after {log.seconds.iloc[-1] / 60:.0f}
  minutes. A new run on another machine gives other bits; the page on the corpus sets training seeds side by side.
- **Weights**: float16, sha256 `{digest}`.

| asked | n | right | 95 % interval |
|---|---|---|---|
{lines}

Agreement: the right member of a minimal pair is preferred. Facts: the stated object is the most probable word, in each
of the relation's templates.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=PLAN)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the sentences")
    parser.add_argument("--out", type=Path, default=MODELS, help="the folder of models")
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
