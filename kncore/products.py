"""Which library multiplies matrices: what PyTorch takes by itself, or oneDNN where that is measured to be faster.

On some CPUs that are not Intel's, MKL gives float32 products half the speed that oneDNN, in the same PyTorch, has. On
others it is the faster one, so that a measurement chooses; `$KNCORE_PRODUCTS` says it instead.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kncore import checks

if TYPE_CHECKING:
    from kncore.models import LM

MKL, ONEDNN = "mkl", "onednn"  # the first: what PyTorch does by itself, whatever it was built with
GAIN = 1.25  # how many times as fast oneDNN must be; below, a measurement of another moment could say otherwise
ROWS, WEIGHTS = 32, 2**14  # fewer do not pay: the weights are brought into oneDNN's order for every product
MEASURED, ROUNDS = (128, 512, 1024), 12  # rows, inputs, outputs: a millisecond or two for each of the rounds


def asked() -> str:
    """Return what `$KNCORE_PRODUCTS` says, "" where it is unset. Raises ValueError for what cannot be had here."""
    name = os.environ.get("KNCORE_PRODUCTS", "")
    if name and name not in (MKL, ONEDNN):
        raise checks.unknown("KNCORE_PRODUCTS", name, (MKL, ONEDNN), "Leave it unset to have it measured.")
    if name == ONEDNN and not torch.backends.mkldnn.is_available():
        raise ValueError("KNCORE_PRODUCTS is 'onednn', which this PyTorch was built without; leave it unset")
    return name


def chosen() -> str:
    """Return "onednn" or "mkl": what is asked for, else what is faster here with as many threads as now."""
    return asked() or _measured(torch.get_num_threads())


@cache
def _measured(threads: int) -> str:
    """Return what is faster; `threads` is only what the answer is kept by."""
    # With instructions no wider than those of AVX2 MKL has no handicap.
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return MKL
    rows, inputs, outputs = MEASURED
    x, weight = torch.full((rows, inputs), 0.5), torch.full((outputs, inputs), 0.5)
    lost = 0
    with torch.no_grad():
        for i in range(1 + ROUNDS):
            ordinary = _seconds(lambda: nn.functional.linear(x, weight))
            gained = ordinary > GAIN * _seconds(lambda: _onednn(x, weight, None))
            lost += i > 0 and not gained  # the first round prepares
            if lost > ROUNDS // 4:
                return MKL
    return ONEDNN


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds that this thread computed: by the clock, other processes on a busy machine would choose."""
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def path(lm: LM) -> str:
    """Return which library a model's products go through here: "onednn" only for float32 on a CPU."""
    return chosen() if lm.dtype == torch.float32 and lm.device.type == "cpu" and _undisturbed() else MKL


def noted(lm: LM) -> dict[str, str]:
    """Return what records and stores say of the path: nothing of PyTorch's own, which all earlier ones were made by."""
    return {} if (found := path(lm)) == MKL else {"products": found}


@contextlib.contextmanager
def faster(lm: LM) -> Iterator[None]:
    """Open a context in which the linear layers of a model go through oneDNN where `path` says so.

    It is this thread's alone, and nothing is kept: a weight that was edited in place counts at the next product.
    """
    with _Products() if path(lm) == ONEDNN else contextlib.nullcontext():
        yield


class _Products(TorchFunctionMode):
    """Sends products of the kind of `nn.Linear` and of transformers' `Conv1D` through oneDNN where that pays."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not kwargs and function is nn.functional.linear and _fit(*args):
            x, weight, bias = (*args, None)[:3]
            return product(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
        if not kwargs and function is torch.addmm and len(args) == 3 and _fit(args[1], args[2].t(), args[0]):
            return product(args[1], args[2].t(), args[0])
        return function(*args, **(kwargs or {}))


def _undisturbed() -> bool:
    """Return whether tensors are what they seem: no vmap or other transform, no fake tensors, no autocast."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not (transformed or _get_current_dispatch_mode_stack() or torch.is_autocast_enabled("cpu"))


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether a product is one that oneDNN takes, and that is large enough; all others go the ordinary way."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    alike = all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in tensors)
    if not alike or any(t.layout != torch.strided for t in tensors) or weight.dim() != 2 or x.dim() < 2:
        return False
    shapes = x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    large = x.numel() >= max(1, ROWS * x.shape[-1]) and weight.numel() >= max(1, WEIGHTS)
    return shapes and large and _undisturbed()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch._C._nn.mkldnn_linear(x.contiguous().to_mkldnn(), weight.contiguous(), bias).to_dense()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b by oneDNN, with gradients, of rows [row, input], weights [output, input] and a bias [output]."""
    wanted = any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _Product.apply(x, weight, bias) if wanted and torch.is_grad_enabled() else _onednn(x, weight, bias)


class _Product(torch.autograd.Function):
    """`product`, whose own backward pass in PyTorch refuses weights in the ordinary order."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            product(grad, weight.t()) if of_x else None,
            grad.t() @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
