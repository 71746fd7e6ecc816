"""The state of a model and of the process while something is computed: whose it is, what it holds, what is pinned.

Three things decide a number besides the arguments: what the model holds and does (`content`), settings of PyTorch that
act from outside (`pinned`), and other threads or interventions that use the same model (`Session`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kncore import products

if TYPE_CHECKING:
    from kncore.models import LM

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(name for name in vars(nn_module) if name.startswith("_global_") and name.endswith("_hooks"))
SCALARS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# What PyTorch and transformers keep on modules for their own use, and what `pinned` looks at.
IGNORED = (
    "training name_or_path gradient_checkpointing _is_full_backward_hook _is_hf_initialized _compiled_call_impl"
).split()


class Session:
    """Keeps a model to one thread at a time, and its interventions in order.

    A thread owns the model while it computes or has an intervention open. Another thread that computes waits for a
    computation to end, and is refused while an intervention is open: that may stay open for as long as it likes.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: int | None = None
        self._depth = 0
        self._pinned = 0
        self._open: list[contextlib.ExitStack] = []

    def __reduce__(self):  # a copy is free
        return Session, ()

    @property
    def computing_here(self) -> bool:
        """Whether this thread is inside `computing` already."""
        return self._owner == threading.get_ident() and self._pinned > 0

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Keep the model to this thread. Raises RuntimeError where another thread has an intervention open."""
        self._acquire()
        self._pinned += 1
        try:
            yield
        finally:
            self._pinned -= 1
            self._release()

    @contextlib.contextmanager
    def intervention(self) -> Iterator[contextlib.ExitStack]:
        """Keep the model to this thread, and undo at the end what was pushed on the stack that this yields.

        Interventions end in the reverse order of their beginning. Raises RuntimeError where another thread has one
        open, and where one ends before another that began later; then all from this one on are undone.
        """
        self._acquire()
        undo = contextlib.ExitStack()
        undo.callback(self._release)
        self._open.append(undo)
        try:
            yield undo
        finally:
            if undo in self._open:  # else it was undone already, by one that ended too early
                self._close(self._open.index(undo))

    def _close(self, first: int) -> None:
        """Undo the open interventions from `first` on, the last one first."""
        later = len(self._open) - first - 1
        with contextlib.ExitStack() as stacks:
            while len(self._open) > first:
                stacks.push(self._open.pop(first))
        if later:
            raise RuntimeError(
                f"an intervention ended before {later} that began after it: all of them are undone, and the model is "
                "as it was before; end them in the reverse order, as nested `with` blocks do"
            )

    def _acquire(self) -> None:
        me = threading.get_ident()
        with self._free:
            while self._owner not in (None, me):
                if self._open:
                    raise RuntimeError(
                        "another thread has an intervention open on this model, which would act here too: end it "
                        "first, or load the model once more for this thread"
                    )
                self._free.wait()
            self._owner, self._depth = me, self._depth + 1

    def _release(self) -> None:
        with self._free:
            self._depth -= 1
            if not self._depth:
                self._owner = None
            self._free.notify_all()


@contextlib.contextmanager
def plain(device: torch.device) -> Iterator[contextlib.ExitStack]:
    """Open a context without autocast, and with PyTorch's own default dtype and device; it yields what undoes that."""
    with contextlib.ExitStack() as outside:
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                outside.enter_context(torch.autocast(kind, enabled=False))
        outside.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            outside.enter_context(torch.device("cpu"))
        yield outside


@contextlib.contextmanager
def pinned(lm: LM, grad: bool | None = None) -> Iterator[None]:
    """Compute in one thread, in evaluation mode, and without what PyTorch was set to outside: autocast, default dtype
    and device, the precision of float32 products; with gradients switched on or off if `grad` says so, and with the
    faster products of this CPU (see `kncore.products`).

    Raises RuntimeError where a number could not be trusted: in inference mode, with compiled modules (they may skip
    hooks), and while another thread has an intervention open.
    """
    if lm.session.computing_here:
        with contextlib.nullcontext() if grad is None else torch.set_grad_enabled(grad):
            yield
        return
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inside torch.inference_mode() no gradient can be taken and no state kept; leave it, or use torch.no_grad()"
        )
    for name, module in lm.model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise RuntimeError(f"{lm.name} is compiled ({name or 'as a whole'}), which may skip hooks; load it anew")
    with lm.session.computing(), plain(lm.device) as outside:
        for module in lm.model.modules():
            if module.training:  # dropout would act, and checkpoints would run the blocks, and their hooks, again
                outside.callback(setattr, module, "training", True)
                module.training = False
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            outside.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        if grad is not None:
            outside.enter_context(torch.set_grad_enabled(grad))
        outside.enter_context(products.faster(lm))
        yield


def computes(grad: bool | None = None) -> Callable[[Callable], Callable]:
    """Decorator of a function that computes with its first argument, a model or what holds one as `lm`: see `pinned`.

    Raises TypeError where that argument is something else, besides what `pinned` raises.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(first, *args, **kwargs):
            lm = getattr(first, "lm", first)
            if not hasattr(lm, "session"):
                raise TypeError(
                    f"expected a loaded model, as kncore.load gives it, got {type(first).__name__} {first!r:.60}"
                )
            with pinned(lm, grad):
                return function(first, *args, **kwargs)

        return run

    return decorate


def content(model: nn.Module) -> str | None:
    """Return the hash of what decides what a model computes: weights, buffers, types of modules, and the scalars they
    act with.

    Weights count by the exact sums of their bits over rows and over columns, so that one changed bit is seen wherever
    it is written. None where that cannot be told: with hooks on a module or on all, with modules or functions put in
    the place of the model's own `forward`, compiled, or inside a dispatch mode of PyTorch.
    """
    if any(getattr(nn_module, name) for name in GLOBAL_HOOKS) or _get_current_dispatch_mode_stack():
        return None
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in HOOKS) or _replaced(module):
            return None
        digest.update(f"\0{name}\0{type(module).__module__}.{type(module).__qualname__}".encode())
        for key, value in sorted(vars(module).items()):
            if key not in IGNORED and (shown := _shown(value)) is not None:
                digest.update(f"\0{key}={shown}".encode())
    if (config := getattr(model, "config", None)) is not None:
        ignored = ("_name_or_path", "transformers_version", "use_cache")
        acting = [(key, value) for key, value in config.to_dict().items() if key not in ignored]
        digest.update((repr(sorted(acting, key=str)) + str(getattr(config, "_attn_implementation", ""))).encode())
    with torch.no_grad():
        for kind, tensors in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in tensors:
                digest.update(f"\0{kind} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                if not tensor.is_meta:  # weights on disk are read anew for every pass, and cannot be written
                    digest.update(_sums(tensor.detach()))
    return digest.hexdigest()


def _replaced(module: nn.Module) -> bool:
    """Return whether a module does not run the `forward` of its class, or the class not its own."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's, of a model spread over devices
        return True
    forward = inspect.unwrap(type(module).forward)
    known = getattr(forward, "__name__", None) in ("forward", "_forward_unimplemented")
    homes = {cls.__module__ for cls in type(module).__mro__}
    return not known or forward.__module__ not in homes or module._compiled_call_impl is not None


def _shown(value: object) -> str | None:
    """Return a scalar, a sequence of scalars or a function as text; None for what is no setting."""
    parts = value if isinstance(value, tuple | list) else (value,)
    if all(isinstance(part, SCALARS) for part in parts):
        return repr(value)
    if not callable(value) or isinstance(value, nn.Module | type):
        return None
    code = getattr(value, "__code__", None)
    acts = hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest() if code else ""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)} {acts}"


def _sums(tensor: Tensor) -> bytes:
    """Return sums of the bits of a tensor, as whole numbers, along its last dimension and across it."""
    table = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    table = table.contiguous()
    width = table.shape[1] * table.element_size()
    whole = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if width % kind.itemsize == 0)
    table = table.view(torch.uint8).view(whole)
    return torch.cat([table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64)]).cpu().numpy().tobytes()
