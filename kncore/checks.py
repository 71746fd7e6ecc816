"""Numbers as arguments: taken alike from Python, NumPy, PyTorch and pandas, or refused with one line that says why."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
from torch import Tensor


def whole(x, what: str, low: int | None = None, high: int | None = None) -> int:
    """A whole number as Python's int, from Python, NumPy or PyTorch.

    Raises ValueError for anything else, booleans and 3.0 too, and for a number that is not from `low` to `high`.
    """
    if isinstance(x, np.ndarray | Tensor) and x.ndim == 0:
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise ValueError(f"{what} must be a whole number, got {x!r:.80}")
    if (low is not None and x < low) or (high is not None and x > high):
        limits = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise ValueError(f"{what} must be {limits}, got {x}")
    return int(x)


def finite(x, what: str, dtype: torch.dtype = torch.float64) -> float:
    """A number as Python's float (True is 1.0). Raises ValueError for anything else, and where `dtype` has no such
    finite number."""
    if isinstance(x, np.ndarray | Tensor) and x.ndim == 0:
        x = x.item()
    if not isinstance(x, numbers.Real | np.bool_) or not _fits(x, dtype):
        raise ValueError(f"{what} must be a finite number{_limit(dtype)}, got {x!r:.80}")
    return float(x)


def finites(x, what: str, dtype: torch.dtype = torch.float64) -> list[float]:
    """A list of numbers as Python's floats. Raises ValueError as `finite` does."""
    found = reals(x, what).tolist()
    if not all(_fits(value, dtype) for value in found):
        raise ValueError(f"{what} must be finite numbers{_limit(dtype)}, got {found!r:.80}")
    return found


def _fits(x, dtype: torch.dtype) -> bool:
    try:
        return abs(float(x)) <= torch.finfo(dtype).max
    except OverflowError:
        return False


def _limit(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float64 else f" of {dtype}"


def reals(values, what: str = "values", least: int = 1) -> np.ndarray:
    """A list, array, tensor or column of numbers as float64 `[value]`; what is missing (None, NA) becomes nan.

    Raises ValueError for text, complex numbers and dates, for masked values, for anything that is not one list, and for
    fewer than `least` numbers.
    """
    values = _listed(values)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.numpy() if values.dtype != torch.bfloat16 else values.float().numpy()
    if np.ma.is_masked(values):
        raise ValueError(f"{int(np.ma.getmaskarray(values).sum())} {what} are masked; drop them first")
    try:
        found = np.asarray(values)
        if found.dtype.kind == "O" and found.ndim == 1:
            found = np.array([_real(value, what) for value in found], dtype=float)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{what}: expected a list of numbers; {str(error).splitlines()[0]}") from error
    if found.ndim != 1 or len(found) < least:
        raise ValueError(f"{what}: expected a list of numbers, got shape {found.shape}")
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{what}: expected a list of numbers, got {found.dtype}")
    return found.astype(float)


def _listed(values):
    """Iterators and views as lists; what has an order or a dtype of its own stays as it is."""
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"expected a list of numbers, got {type(values).__name__} {values!r:.80}")
    return values if isinstance(values, Sequence) or hasattr(values, "__array__") else list(values)


def _real(value, what: str) -> float:
    if value is None or value is pd.NA:
        return math.nan
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, float | int | Fraction | np.number | np.bool_) or isinstance(value, np.complexfloating):
        raise ValueError(f"{value!r:.80} is no number")
    return float(value)


def tensor(x, axes: str, what: str) -> Tensor:
    """Numbers, one axis per word of `axes`, as a tensor of a floating dtype (that of `x` if it has one, else float64).

    Raises ValueError for another number of axes, an empty one, complex numbers, and numbers that are not finite.
    """
    try:
        found = x if isinstance(x, Tensor) else torch.as_tensor(x)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"expected numbers as {what} ({axes}): {str(error).splitlines()[0]}") from error
    if found.dim() != len(axes.split()) or not found.numel():
        raise ValueError(f"{what} have shape {tuple(found.shape)}, expected {', '.join(axes.split())}, none of them 0")
    if found.is_complex():
        raise ValueError(f"{what} are complex, expected real numbers")
    found = found if found.is_floating_point() else found.double()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{what} are not all finite; recompute them, or leave out those that are not numbers")
    return found


def items(given, kind: type, what: str) -> list:
    """Things of one kind as a list, from any iterable. Raises TypeError for a single one, and where one is another."""
    if isinstance(given, kind | str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"expected a list of {kind.__name__} as {what}, got {type(given).__name__} {given!r:.80}")
    found = list(given)
    for thing in found:
        if not isinstance(thing, kind):
            raise TypeError(
                f"expected a list of {kind.__name__} as {what}, but it holds {type(thing).__name__} {thing!r:.80}"
            )
    return found
