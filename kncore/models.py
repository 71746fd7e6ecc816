"""Models: a registry of names and `load`, which gives back model, tokenizer and architecture as one object."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kncore import arch, checkpoint, gguf, zoo
from kncore.store import state

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LM:
    """A loaded language model: frozen weights, evaluation mode, architecture checked.

    `revision` identifies the weights and the tokenizer (hub commit, or a hash of the files); with `name` it goes into
    every record and every store key. `loaded` is the hash of what the model held when it was loaded, see
    `kncore.store.state.content`; `session` keeps it to one thread at a time.
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
        """Return logits of states of the residual stream; `normed` if the final norm has already been applied."""
        if self.spec.norm is not None and not normed:
            hidden = arch.module_at(self.model, self.spec.norm, "final norm")(hidden)
        return arch.module_at(self.model, self.spec.head, "language-model head")(hidden).to(self.device)

    @property
    def is_modified(self) -> bool:
        """True if the model is not as it was loaded: weights or modules were changed, or hooks hang on it."""
        return self.loaded is None or state.content(self.model) != self.loaded


def identity(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the name and the revision of the model that `load` gives; nothing is loaded or fetched.

    A folder or GGUF file is called `<its name>@<first 8 digits of the revision>`, see `kncore.checkpoint.identity`; all
    of its weights are read for that. A path object is one of these; a text that is both means the registered one.

    Raises ValueError for an unknown name and for a folder that `load` refuses for its files; OSError where files cannot
    be read, or a model that comes with this package does not.
    """
    source = _source(name_or_path)
    if own := local(source):
        check(source)
        return gguf.identity(own) if own.is_file() else checkpoint.identity(own)
    return source, zoo.revision(source)


def _source(name_or_path: str | os.PathLike[str]) -> str:
    """Return the text that names a model; a path object becomes an absolute path, which no registered name is."""
    source = str(name_or_path)
    return os.path.abspath(os.path.expanduser(source)) if isinstance(name_or_path, os.PathLike) else source


def load(
    name_or_path: str | os.PathLike[str] = zoo.DEFAULT,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> LM:
    """Load a language model by registered name, as `owner/name@revision` of the hub, from a local folder or GGUF file.

    Weights come from safetensors or GGUF (made into float32 once, see `kncore.gguf`, and then kept in the user cache);
    pickled weights and remote code are refused. `device`
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
    device, dtype = resolve_device("cpu" if device_map else device, dtype)
    source, spread = _source(name_or_path), {}
    own = local(source)
    if own and own.is_dir():
        check(source)
        stamps = checkpoint.stamps(own)
    name, revision = identity(name_or_path)
    if own and own.is_file():
        own, folder = None, zoo.converted(own, revision)
    else:
        folder = own or zoo.fetch(source)
    if device_map is not None:
        # Only weights that are not in the checkpoint as the model has them are written there.
        spread = {"device_map": device_map, "offload_folder": zoo.cache_folder() / "offload" / f"{revision}-{dtype}"}
    if _get_current_dispatch_mode_stack():
        raise ValueError("a model cannot be loaded inside a dispatch mode of PyTorch, such as FakeTensorMode; leave it")
    with torch.inference_mode(False), state.plain(device):
        model, tokenizer, spec = _from_pretrained(folder, dtype, device, spread)
        if own:
            for parameter in model.parameters():  # they may be the file itself, as the memory of the process shows it
                if parameter.device.type == "cpu":
                    parameter.data = parameter.data.clone()
            if checkpoint.stamps(folder) != stamps:
                raise ValueError(f"files in {str(folder)!r} were written while they were read; load the model again")
        return LM(name, revision, model, tokenizer, spec)


def resolve_device(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype that `load` takes for what it was given; ValueError where it cannot be had here.

    The device is asked for and not used: where each has one process only, it stays free for the one that computes.
    """
    wanted = device if device is not None else os.environ.get("KNCORE_DEVICE") or torch.get_default_device()
    try:
        found = torch.device(wanted)
        kind = getattr(torch, found.type, None)
        seen = kind.device_count() if hasattr(kind, "device_count") and kind.is_available() else 0
        reason = f"PyTorch sees {seen} of them" if found.type != "cpu" and (found.index or 0) >= seen else None
    except TypeError:
        reason = "expected a name such as 'cuda:0'"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
    if reason is not None:
        raise ValueError(f"device {str(wanted)!r} cannot be used here: {reason}. 'cpu' always can")
    wanted_dtype = dtype if dtype is not None else os.environ.get("KNCORE_DTYPE") or torch.float32
    numbers = getattr(torch, wanted_dtype, None) if isinstance(wanted_dtype, str) else wanted_dtype
    if numbers not in DTYPES:
        known = ", ".join(str(name).removeprefix("torch.") for name in DTYPES)
        raise ValueError(f"dtype {str(wanted_dtype)!r} cannot be used: a model is computed in one of {known}")
    return found, numbers


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: of Python, of a device, or of PyTorch on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def local(name: str) -> Path | None:
    """Return the folder or GGUF file that a name means, unless it is a registered one; None where there is none."""
    try:
        path = Path(name).expanduser()
        there = path.is_dir() or (path.suffix == ".gguf" and path.is_file())
        return path if name and name not in zoo.REGISTRY and there else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user
        return None


def check(name: str) -> None:
    """Raise ValueError where `load` could not know what a name means: no such name, folder or pinned hub model."""
    if own := local(name):
        try:
            gguf.check(own) if own.is_file() else checkpoint.check_files(own)
        except OSError as error:
            what = "GGUF file" if own.is_file() else "model folder"
            raise ValueError(f"{str(own)!r} is not a {what} that can be read: {error}") from error
    elif name not in zoo.REGISTRY:
        zoo.hub(name)


def _from_pretrained(folder: Path, dtype: torch.dtype, device: torch.device, spread: dict):
    """Model (on its device, frozen), tokenizer and row of the table of families; ValueError where it is not loaded."""
    import transformers

    spec = checkpoint.check_files(folder)
    where, remote = repr(str(folder)), {"trust_remote_code": False}
    with _understood(f"config.json in {where}", "correct it"):
        config = transformers.AutoConfig.from_pretrained(folder, **remote)
    checkpoint.check_rotation(folder, getattr(config, "rope_parameters", None))
    # How an output is wrapped, and computed, is no matter of the checkpoint.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    config.chunk_size_feed_forward = 0
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation = None
    options = {"config": config, "dtype": dtype, "use_safetensors": True, **remote, **spread}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, with their names
    remedy = "correct its config.json or the device map" if spread else "correct its config.json"
    with _understood(f"the model in {where}", remedy), checkpoint.quiet(transformers):
        auto = transformers.AutoModelForMaskedLM if spec.masked else transformers.AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, **options)
    with _understood(f"the tokenizer in {where}", "save it there anew with `tokenizer.save_pretrained`"):
        plain = checkpoint.tokenizer_class(folder) in ("PreTrainedTokenizerFast", "TokenizersBackend")
        kind = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer  # which may know better
        tokenizer = kind.from_pretrained(folder, **remote)
    checkpoint.check_loaded(folder, tokenizer, model, spec, info)
    if not spread and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a model cannot be loaded inside a context that leaves weights out: leave init_empty_weights")
    arch.check(model, spec)
    (model if spread else model.to(device)).eval().requires_grad_(False)
    checkpoint.check_numbers(folder, model, dtype)
    checkpoint.check_direction(folder, tokenizer, model, spec)
    return model, tokenizer, spec


@contextlib.contextmanager
def _understood(what: str, remedy: str) -> Iterator[None]:
    """Open a context that says what could not be loaded, and what to do: transformers raises errors of all kinds."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split())[:200]
        raise kind(f"{what} cannot be loaded ({type(error).__name__}: {reason}); {remedy}") from error
