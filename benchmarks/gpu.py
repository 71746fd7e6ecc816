"""What attribution, a trace and an edit cost on a GPU: models with random weights in the shapes of published ones.

Prints a table in Markdown. Cost depends on shapes, and on how many nodes and steps were taken, which the table counts;
what random weights say means nothing. Without a GPU it says so; `--tiny` runs it on the CPU on models of a few neurons.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import transformers
from report import parser, show, table, timed
from tokenizers import Tokenizer, models, pre_tokenizers

import kncore
from kncore import arch, prose, rome, tracing
from kncore.covariance import LENGTH, SAMPLES, covariance
from kncore.models import LM, ran_out
from kncore.query import Query
from knpaper import shapes

MODELS = {"GPT-2 XL": shapes.config("gpt2-xl"), "LLaMA-2-7B": shapes.config("llama-2-7b")}
SETTINGS = {"GPT-2 XL": rome.HPARAMS["gpt2-xl"], "LLaMA-2-7B": rome.HPARAMS["llama-2-7b"]}
PROMPT = "the old capital of {} in these days is called"  # ten tokens, as the facts of the book have on average
COLUMNS = "model | precision | what | seconds a call: median [least, most] | calls | peak, GiB | how much".split(" | ")
CALLS, SECONDS = 7, 12  # no further call of a kind after so many, or so long
NOT = "*not measured*"


class Kind(NamedTuple):
    """A kind of work: what is done for the i-th prompt, and how much it was, in words, from what that returned."""

    name: str
    work: Callable[[int], object]
    amount: Callable[[object], str]


def tiny(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """Return a configuration of the same family for a model of a few neurons."""
    vocabulary = len(words()) + 50
    if config.model_type == "gpt2":
        none = dict(bos_token_id=None, eos_token_id=None)
        return transformers.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=3, n_head=4, n_inner=24, **none)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
    return transformers.LlamaConfig(vocab_size=vocabulary, **sizes)


def words() -> list[str]:
    """Return the words of the prompt and of the prose that edits put before it."""
    return sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join([*prose.passages(), PROMPT, "is a"]))))


def tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, filled up with made-up ones, w0 and so on, to a size."""
    known = ["[PAD]", "[UNK]", "[MASK]", *words()]
    known += [f"w{i}" for i in range(size - len(known))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def random_model(config: transformers.PretrainedConfig, dtype: torch.dtype, device: str) -> LM:
    """Return a model with the random weights that training would begin with, made on its device."""
    torch.manual_seed(0)
    spec = arch.spec_for(config.model_type)
    kind = transformers.AutoModelForMaskedLM if spec.masked else transformers.AutoModelForCausalLM
    with torch.device(device):
        model = kind.from_config(copy.deepcopy(config), dtype=dtype)
    model = model.to(device, dtype).eval().requires_grad_(False)
    return LM("random", "seed 0", model, tokenizer(config.vocab_size), spec)


def query(i: int) -> Query:
    """Return the i-th prompt; all have the same length."""
    subject = f"w{i}"
    return Query(PROMPT.format(subject), f"w{i + 20}", subject, f"w{i + 40}", template=PROMPT)


def texts(lm: LM) -> Iterator[list[str]]:
    """Yield texts of made-up words: as many tokens as the book's covariances have, or twice the neurons if more."""
    made = [word for word in lm.tokenizer.get_vocab() if re.fullmatch(r"w\d+", word)]
    count, rng = max(SAMPLES, math.ceil(2 * lm.n_neurons / LENGTH)), random.Random(0)
    while True:
        yield [" ".join(rng.choices(made, k=LENGTH)) for _ in range(count)]


def attributed(found: kncore.Attribution) -> str:
    return f"{float(found.nodes.double().mean()):.1f} nodes a block"


def kinds(lm: LM, settings: rome.HParams) -> list[Kind]:
    """Return all that is measured of a model; the edit takes the covariance that was measured last."""
    moments, read = [], [of_call for _, of_call in zip(range(1 + CALLS), texts(lm), strict=False)]

    def moment(i: int) -> None:
        moments.clear()  # or two of them would count as the peak
        moments.append(covariance(lm, settings.block, read[i]))

    def edit(i: int) -> rome.Search:
        (found,) = rome.search(lm, [query(i)], settings)
        # How good the change is does not matter here; what it costs to write it does.
        rome.delta(replace(found, failed=""), moments[0] if moments else None, settings.block)
        return found

    def riemann(i: int) -> kncore.Attribution:
        return kncore.attribute(lm, [query(i)], quadrature="riemann", steps=20, store=False)

    def cells(traces: list[tracing.Trace]) -> str:
        first = traces[0].subject[0]
        return f"{traces[0].restored[:, first:, :, 0].numel()} cells of 3 samples"

    amount = f"{len(read[0]) * LENGTH:,} tokens, block {settings.block}"
    return [
        Kind("attribution, adaptive", lambda i: kncore.attribute(lm, [query(i)], store=False), attributed),
        Kind("attribution, 20 Riemann steps", riemann, attributed),
        Kind("causal trace", lambda i: tracing.trace(lm, [query(i)], store=False), cells),
        Kind("covariance of a block", moment, lambda _: amount),
        Kind("ROME edit", edit, lambda found: f"{found.steps} steps, C {'given' if moments else 'left out'}"),
    ]


def measured(kind: Kind, device: str) -> list[str]:
    """Return the cells of a row: seconds, calls, peak of memory, and how much was done; or what went wrong."""
    gpu, seconds = device == "cuda", []

    def call(i: int) -> object:
        result = kind.work(i)
        if gpu:
            torch.cuda.synchronize()
        return result

    try:
        call(0)  # the first call prepares
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        while len(seconds) < CALLS and sum(seconds) < SECONDS:
            took, result = timed(call, len(seconds) + 1)
            seconds.append(took)
    except Exception as error:  # one kind of work that fails is a row, and the others are measured
        why = "out of memory" if ran_out(error) else " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return [NOT, "0", "", why.replace("|", "/")]
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if gpu else NOT
    shown = f"{statistics.median(seconds):.3g} [{min(seconds):.3g}, {max(seconds):.3g}]"
    return [shown, str(len(seconds)), peak, kind.amount(result)]


def rows(configs: dict, device: str) -> Iterator[list[str]]:
    """Yield the rows of every model in every precision; what was held for one is given back before the next."""
    for name, config in configs.items():
        for dtype in (torch.bfloat16, torch.float32):
            begin = [name, str(dtype).removeprefix("torch.")]
            try:
                lm = random_model(config, dtype, device)
            except RuntimeError as error:
                yield [*begin, "the model itself", NOT, "0", "", "out of memory" if ran_out(error) else str(error)[:80]]
                continue
            settings = replace(SETTINGS[name], block=min(SETTINGS[name].block, len(lm.blocks) - 2))
            # A hook that does nothing: of a model with one, nothing is stored, so that no call finds another's result.
            with lm.model.register_forward_hook(lambda *_: None):
                for kind in kinds(lm, settings):
                    yield [*begin, kind.name, *measured(kind, device)]
            del lm, kind
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def apart() -> str:
    """Return how far results on CPU and GPU are apart, of tiny models in float32, in words; or what went wrong."""
    try:
        return f"{max(differences()):.0e} of the largest number of its kind"
    except Exception as error:
        return f"{NOT} ({type(error).__name__}: {str(error)[:80]})"


def differences(other: str = "cuda") -> list[float]:
    """Return the greatest difference of each result on the CPU and another device, as a share of its largest number."""
    found = []
    for name, config in MODELS.items():
        results = []
        for device in ("cpu", other):
            lm = random_model(tiny(config), torch.float32, "cpu")
            lm.model.to(device)
            (trace,) = tracing.trace(lm, [query(1)], store=False)
            scores = kncore.attribute(lm, [query(1)], steps=20, store=False).scores
            (search,) = rome.search(lm, [query(1)], replace(SETTINGS[name], block=1, steps=3))
            results.append([scores, trace.restored, search.change.cpu()])
        for one, two in zip(*results, strict=True):
            found.append(float((one - two).abs().max() / one.abs().max()))
    return found


def page(device: str, small: bool) -> str:
    """Return the page; `device` is "" where there is none to measure on."""
    versions = f"PyTorch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    configs = {name: tiny(config) for name, config in MODELS.items()} if small else MODELS
    if not device:
        machine = "No GPU was there when this was written"
        lines = [[name, "", "all", NOT, "0", "", ""] for name in configs]
    else:
        machine = f"On {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU, as a trial of the script'}"
        lines = list(rows(configs, device))
    same = apart() if device == "cuda" else NOT
    return f"""\
{machine} ({versions}). {"Models of a few neurons" if small else "The shapes are the published ones"}; all weights are \
random (seed 0, as at the beginning of training), and so are the words: what the models say means nothing.
Greatest difference of scores, traces and searches of two tiny models between CPU and GPU, in float32: {same}.

{table(COLUMNS, lines, left=3)}
A call: one prompt of {len(PROMPT.split())} tokens, after a first one that does not count; no more calls than {CALLS}, \
or than begin within {SECONDS} seconds. *Peak*: the most that PyTorch held on the card, weights and all.
*Nodes*: random weights make flat paths; multiply by the nodes of your model over those here.
*Covariance*: time goes with the tokens; the book takes {SAMPLES * LENGTH:,}, sampled from the model, which is not \
counted here.
"""


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--tiny", action="store_true", help="models of a few neurons; on the CPU where there is no GPU")
    args = made.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu" if args.tiny else ""
    show(page(device, args.tiny), args.out)


if __name__ == "__main__":
    main()
