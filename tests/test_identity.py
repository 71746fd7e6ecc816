"""What decides a stored number: change any of it and the store misses; change what does not decide, and it hits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import kncore
from kncore import arch, attribution, editors, models, quadrature, rome, tracing
from kncore import resources as kernel_data
from kncore.covariance import covariance
from kncore.models import LM
from kncore.query import Query
from kncore.store import cache, fingerprint
from knpaper import resources, tasks

QUERY = Query("the capital of France is", "Paris", "France", "Madrid", "capital")
HPARAMS = rome.HParams(1, steps=2, prefixes=1)


# ------------------------------------------------------------------------------------------------ what is asked


def attributed(lm: LM, query: Query = QUERY, **options) -> None:
    kncore.attribute(lm, [query], **options)


def traced(lm: LM, query: Query = QUERY, **options) -> None:
    tracing.trace(lm, [query], **{"noise": 1.0, "samples": 1, **options})


def searched(lm: LM, query: Query = QUERY, hyper: rome.HParams = HPARAMS) -> None:
    editors.rome_edits(lm, [query], replace(hyper, covariance="identity"))


def tuned(lm: LM, query: Query = QUERY, **options) -> None:
    editors.fine_tuning(lm, [query], editors.finetune.HParams(1, **{"steps": 2, **options}))


def of_neurons(lm: LM, query: Query = QUERY, scale: float = 0.1) -> None:
    editors.neuron_edits(lm, [query], scale, paraphrases=tasks.paraphrases)


def moments(lm: LM, block: int = 1, source: str = "text", **options) -> None:
    covariance(lm, block, source, **options)


ASK = {f.__name__: f for f in (attributed, traced, searched, tuned, of_neurons, moments)}


# ------------------------------------------------------------------------------------------------ what is changed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, as people bring one."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer(False).save_pretrained(folder)
    return folder


def in_file(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A change of a JSON file of the model's folder."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return apply


def swap_words(tokenizer: dict) -> None:
    table = tokenizer["model"]["vocab"]
    table["France"], table["Spain"] = table["Spain"], table["France"]


def one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FOLDER = {
    "a weight on disk": one_weight,
    "the tokenizer's table": in_file("tokenizer.json", swap_words),
    "eps in the configuration": in_file("config.json", lambda c: c.update(rms_norm_eps=1e-3)),
    "the activation in the configuration": in_file("config.json", lambda c: c.update(hidden_act="gelu")),
}


def model(change: Callable[[LM], object]) -> Callable[[LM], contextlib.AbstractContextManager]:
    @contextlib.contextmanager
    def changed(lm: LM) -> Iterator[None]:
        change(lm)
        yield

    return changed


def patched(target: object, name: str, value: object) -> Callable[[LM], contextlib.AbstractContextManager]:
    @contextlib.contextmanager
    def changed(lm: LM) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            yield

    return changed


def patched_spec(lm: LM) -> LM:
    sites = {
        **lm.spec.sites,
        "neuron": arch.Site("mlp.down_proj", "input"),
        "published": arch.Site("mlp.up_proj", "output"),
    }
    return replace(lm, spec=replace(lm.spec, sites=sites))


def rescale(lm: LM) -> None:
    lm.blocks[0].mlp.down_proj.weight.data[1, 2] *= 1.5


def versions(**changed: str) -> Callable:
    return patched(fingerprint, "versions", lambda: {"torch": "2.13.0", "transformers": "5.23.0", **changed})


LIVE = {
    "a weight behind PyTorch's back": model(rescale),
    "a buffer": model(lambda lm: lm.model.model.rotary_emb.inv_freq.mul_(1.01)),
    "eps of a module": model(lambda lm: setattr(lm.model.model.norm, "variance_epsilon", 1e-3)),
    "the scaling of attention": model(lambda lm: setattr(lm.blocks[1].self_attn, "scaling", 0.3)),
    "an activation module": model(lambda lm: setattr(lm.blocks[2].mlp, "act_fn", nn.Tanh())),
    "how logits are read": patched(LM, "readout", lambda self, x, normed=False: self.model.lm_head(x).float()),
    "how a batch is padded": patched(kncore.tokens, "pad", lambda lm, batch: None),
    "the version of torch": versions(torch="2.12.0"),
    "the version of transformers": versions(transformers="5.0.0"),
}
ARGUMENTS = {
    "attributed": [
        {"query": replace(QUERY, prompt="the capital of Spain is", subject="Spain")},
        {"query": replace(QUERY, target="Madrid", foil="")},
        {"site": "published"},
        {"quadrature": "riemann"},
        {"quadrature": "riemann", "steps": 7},
        {"quadrature": ([0.5], [1.0])},
        {"quadrature": ([0.5], [0.9])},
        {"tol": 1e-2},
        {"target": "all"},
    ],
    "traced": [
        {"query": replace(QUERY, foil="cats")},
        {"noise": 2.0},
        {"samples": 2},
        {"seed": 1},
        {"where": "ends"},
        {"stride": 2},
        {"restores": (tracing.Restore("mlp", 3),)},
    ],
    "searched": [
        {"hyper": replace(HPARAMS, **{name: value})}
        for name, value in {
            "block": 0,
            "steps": 3,
            "lr": 0.1,
            "decay": 0.1,
            "clamp": 1.0,
            "kl": 0.5,
            "stop": 0.2,
        }.items()
    ]
    + [{"hyper": replace(HPARAMS, prefixes=2)}, {"query": replace(QUERY, foil="cats")}],
    "tuned": [{"lr": 0.1}, {"steps": 3}, {"limit": 0.5}, {"query": replace(QUERY, foil="cats")}],
    "of_neurons": [{"scale": 0.2}, {"query": replace(QUERY, foil="cats")}],
    "moments": [{"block": 0}, {"source": "samples"}, {"source": "samples", "seed": 1}],
}
CONSTANTS = [
    ("attributed", attribution, "START", (0.0, 0.5, 1.0)),
    ("attributed", quadrature, "NEAREST", 4),
    ("attributed", quadrature, "SMALLEST", 0.1),
    ("attributed", quadrature, "NARROW", 0.1),
    ("attributed", quadrature, "SHARE", 0.1),
    ("attributed", quadrature, "CANCEL", 1),
    ("attributed", quadrature, "MOST", 2),
    ("attributed", attribution, "_adapted", lambda *x: {}),
    ("traced", tracing, "_noise", lambda *_: torch.zeros(1)),
    ("searched", rome, "_unfit", lambda *x: ""),
]


def count() -> int:
    return len(list(cache.scores_folder().rglob("*.safetensors")))


def misses(ask: Callable[[], object]) -> bool:
    """Whether a question leaves something new in the store; an answer that fails was not found there either."""
    before = count()
    try:
        ask()
    except Exception:
        return True
    return count() > before


@pytest.fixture
def lm(saved: Path) -> LM:
    return models.load(saved)


@pytest.mark.kind("identity")
@pytest.mark.kind("tokenizer-in-identity")
@pytest.mark.parametrize("what", FOLDER)
@pytest.mark.parametrize("name", ["attributed", "searched"])
def test_another_folder_is_another_model(saved, tmp_path, what, name):
    ASK[name](models.load(saved))
    assert not misses(lambda: ASK[name](models.load(saved)))
    folder = shutil.copytree(saved, tmp_path / "model")
    FOLDER[what](folder)
    assert misses(lambda: ASK[name](models.load(folder)))


@pytest.mark.kind("identity")
@pytest.mark.parametrize("what", LIVE)
@pytest.mark.parametrize("name", ["attributed", "traced", "searched", "moments"])
def test_what_acts_now_decides(lm, what, name):
    ASK[name](lm)
    assert not misses(lambda: ASK[name](lm))
    with LIVE[what](lm):
        assert misses(lambda: ASK[name](lm))


@pytest.mark.kind("identity")
@pytest.mark.parametrize(
    ("name", "options"), [(name, one) for name, some in ARGUMENTS.items() for one in some], ids=str
)
def test_every_argument_decides(lm, name, options):
    ASK[name](lm)
    assert not misses(lambda: ASK[name](lm))
    assert misses(lambda: ASK[name](lm, **options))
    assert not misses(lambda: ASK[name](lm))


@pytest.mark.kind("identity")
@pytest.mark.parametrize(("name", "module", "constant", "value"), CONSTANTS)
def test_a_constant_or_a_function_decides(lm, name, module, constant, value):
    ASK[name](lm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, constant, value)
        assert misses(lambda: ASK[name](lm))
    assert not misses(lambda: ASK[name](lm))


@pytest.mark.kind("identity")
def test_dtype_and_the_paths_of_the_family_decide(saved, lm):
    attributed(lm)
    assert misses(lambda: attributed(models.load(saved, dtype="float64")))
    assert misses(lambda: attributed(patched_spec(lm)))
    assert not misses(lambda: attributed(models.load(saved)))


@contextlib.contextmanager
def data(folder: Path, name: str, old: str, new: str) -> Iterator[None]:
    """The data of the study, or of the kernels, with one text exchanged."""
    homes = (kernel_data,) if name == "text.txt" else (resources, tasks)
    changed = shutil.copytree(homes[0].DATA, folder / name.replace("/", "-"), dirs_exist_ok=True)
    text = (changed / name).read_text(encoding="utf-8")
    assert old in text
    (changed / name).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for module in homes:
            patch.setattr(module, "DATA", changed)
        tasks._tables.cache_clear(), tasks.describe.cache_clear()
        yield
    tasks._tables.cache_clear(), tasks.describe.cache_clear()


@pytest.mark.kind("text-in-identity")
def test_the_text_that_is_read_decides(lm, tmp_path):
    for name in ("searched", "moments", "of_neurons"):
        ASK[name](lm)
    with data(tmp_path, "text.txt", "\n", "\ncats cats "):
        assert misses(lambda: searched(lm)) and misses(lambda: moments(lm))
        assert not misses(lambda: of_neurons(lm))
    template = tasks.describe("capital").templates[1]
    with data(tmp_path, "relations.toml", template, f"Anna saw the capital of {template}"):
        assert misses(lambda: of_neurons(lm))
        assert not misses(lambda: searched(lm)) and not misses(lambda: moments(lm))


@pytest.mark.kind("text-in-identity", own=True)
def test_an_unrelated_relation_decides_nothing(lm, tmp_path):
    of_neurons(lm)
    searched(lm)
    template = tasks.describe("occupation").templates[0]
    with data(tmp_path, "relations.toml", template, f"Anna saw {template}"):
        assert not misses(lambda: of_neurons(lm)) and not misses(lambda: searched(lm))


def train(lm: LM) -> None:
    lm.model.train()


def gradients(lm: LM) -> None:
    lm.model.requires_grad_(True)


def edit_and_back(lm: LM) -> None:
    shape = arch.value_vectors(lm.model, lm.spec, 0).shape
    with kncore.edited(lm, kncore.Delta(0, torch.ones(1, shape[0]), torch.ones(1, shape[1]))):
        kncore.predict(lm, [QUERY])


def hook_and_back(lm: LM) -> None:
    lm.model.register_forward_hook(lambda *x: None).remove()


IDLE: dict[str, Callable[[LM], object]] = {
    "training mode": train,
    "weights that take gradients": gradients,
    "an edit that has ended": edit_and_back,
    "a hook that was removed": hook_and_back,
    "another question before": lambda lm: kncore.predict(lm, [replace(QUERY, target="cats")]),
    "another attribution before": lambda lm: attributed(lm, replace(QUERY, target="cat", foil="")),
    "the random state": lambda lm: torch.manual_seed(123),
    "the size of batches": lambda lm: attributed(lm, budget=3),
    "a progress bar": lambda lm: attributed(lm, progress=True),
    "what the query is called": lambda lm: attributed(
        lm, replace(QUERY, item="capital:France", value="x", template="t")
    ),
    "another model of the same family": lambda lm: attributed(tiny.lm("llama", seed=1)),
    "a switched-off store": lambda lm: attributed(lm, store=False),
}


@pytest.mark.kind("identity")
@pytest.mark.parametrize("what", IDLE)
def test_what_does_not_decide_is_found_again(lm, what):
    attributed(lm)
    searched(lm)
    IDLE[what](lm)
    assert not misses(lambda: attributed(lm)) and not misses(lambda: searched(lm))


@pytest.mark.kind("identity", own=True)
def test_the_folders_name_its_dates_and_a_readme_do_not_decide(saved, tmp_path):
    attributed(models.load(saved))
    folder = shutil.copytree(saved, tmp_path / "elsewhere")
    (folder / "README.md").write_text("# A model\n", encoding="utf-8")
    (folder / "training.log").write_text("loss 3\n", encoding="utf-8")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    assert not misses(lambda: attributed(models.load(folder)))


@pytest.mark.kind("identity", own=True)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(st.sampled_from(sorted(IDLE)), max_size=3),
    decides=st.sampled_from(sorted(LIVE)),
    after=st.lists(st.sampled_from(sorted(IDLE)), max_size=2),
)
def test_whatever_was_done_before_and_after_only_what_decides_makes_the_store_miss(saved, before, decides, after):
    lm = models.load(saved)
    attributed(lm)
    for what in before:
        IDLE[what](lm)
    assert not misses(lambda: attributed(lm))
    shutil.rmtree(cache.scores_folder())
    attributed(lm)
    with LIVE[decides](lm):
        for what in after:
            if what not in ("the size of batches", "a progress bar", "what the query is called"):  # they ask the same
                with contextlib.suppress(Exception):
                    IDLE[what](lm)
        assert misses(lambda: attributed(lm))
