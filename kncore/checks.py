"""Arguments: taken alike from Python, NumPy, PyTorch and pandas, or refused with one line that says why."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kncore.models import LM


def whole(x, what: str, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number of Python, NumPy or PyTorch as Python's int. Raises ValueError for anything else, booleans
    and 3.0 too, and for a number that is not from `low` to `high`."""
    x = _scalar(x)
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise ValueError(f"{what} must be a whole number, got {x!r:.80}")
    if (low is not None and x < low) or (high is not None and x > high):
        limits = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise ValueError(f"{what} must be {limits}, got {x}")
    return int(x)


def finite(x, what: str, dtype: torch.dtype = torch.float64) -> float:
    """Return a number as Python's float (True is 1.0). Raises ValueError for anything else, and where `dtype` has no
    such finite number."""
    x = _scalar(x)
    try:
        if isinstance(x, numbers.Real | np.bool_) and abs(float(x)) <= torch.finfo(dtype).max:
            return float(x)
    except OverflowError:
        pass
    limit = "" if dtype == torch.float64 else f" of {dtype}"
    raise ValueError(f"{what} must be a finite number{limit}, got {x!r:.80}")


def finites(x, what: str, dtype: torch.dtype = torch.float64) -> list[float]:
    """Return a list of numbers as Python's floats. Raises ValueError as `finite` does."""
    return [finite(value, what, dtype) for value in reals(x, what).tolist()]


def setting(x, what: str, *, above: bool = False, endless: bool = False, most: float = math.inf) -> float:
    """Return a setting as Python's float. Raises ValueError unless it is a number of at least 0 (`above`: more than 0),
    at most `most`, and finite unless it may be `endless`."""
    if endless and isinstance(x, float) and x == math.inf:
        return math.inf
    value = math.nan if isinstance(x, bool) else finite(x, what, torch.float32)
    if not (value > 0 if above else value >= 0) or value > most:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{what} must be {'positive' if above else 'at least 0'}{limit}, got {x!r:.80}")
    return value


def share(x, what: str) -> float:
    """Return a share as Python's float. Raises ValueError unless it is a number from 0 to below 1."""
    value = finite(x, what)
    if not 0 <= value < 1:
        raise ValueError(f"{what} must be from 0 to below 1, got {value:g}")
    return value


def block(lm: LM, x) -> int:
    """Return the number of a block as Python's int. Raises ValueError for one that the model does not have."""
    number = whole(x, "block")
    if not 0 <= number < len(lm.blocks):
        raise ValueError(f"block {number} does not exist; {lm.name} has blocks 0 to {len(lm.blocks) - 1}")
    return number


def _scalar(x):
    return x.item() if isinstance(x, np.ndarray | Tensor) and x.ndim == 0 else x


def reals(values, what: str = "values", least: int = 1) -> np.ndarray:
    """Return a list, array, tensor or column of numbers as float64 `[value]`; what is missing (None, NA) becomes nan.

    Raises ValueError for text, complex numbers and dates, for masked values, for anything that is not one list, and for
    fewer than `least` numbers.
    """
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"expected a list of numbers, got {type(values).__name__} {values!r:.80}")
    if not isinstance(values, Sequence) and not hasattr(values, "__array__"):
        values = list(values)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.numpy() if values.dtype != torch.bfloat16 else values.float().numpy()
    if np.ma.is_masked(values):
        raise ValueError(f"{int(np.ma.getmaskarray(values).sum())} {what} are masked; drop them first")
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O" and array.ndim == 1:
            array = np.array([_real(value) for value in array], dtype=float)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{what}: expected a list of numbers; {str(error).splitlines()[0]}") from error
    if array.ndim != 1 or len(array) < least:
        raise ValueError(f"{what}: expected a list of numbers, got shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what}: expected a list of numbers, got {array.dtype}")
    return array.astype(float)


def _real(value) -> float:
    if value is None or value is pd.NA:
        return math.nan
    value = _scalar(value)
    if not isinstance(value, float | int | Fraction | np.number | np.bool_) or isinstance(value, np.complexfloating):
        raise ValueError(f"{value!r:.80} is no number")
    return float(value)


def tensor(x, axes: str, what: str) -> Tensor:
    """Return numbers, one axis per word of `axes`, as a tensor of a floating dtype (that of `x`, or float64).

    Raises ValueError for another number of axes, an empty one, complex numbers, and numbers that are not finite.
    """
    try:
        values = x if isinstance(x, Tensor) else torch.as_tensor(x)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"expected numbers as {what} ({axes}): {str(error).splitlines()[0]}") from error
    if values.dim() != len(axes.split()) or not values.numel():
        raise ValueError(f"{what} have shape {tuple(values.shape)}, expected {', '.join(axes.split())}, none of them 0")
    if values.is_complex():
        raise ValueError(f"{what} are complex, expected real numbers")
    values = values if values.is_floating_point() else values.double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{what} are not all finite; recompute them, or leave out those that are not numbers")
    return values


def items(given, kind: type, what: str, least: int = 0) -> list:
    """Return objects of one kind, from any iterable, as a list.

    Raises TypeError for a single object, and where one is of another kind; ValueError for fewer than `least`.
    """
    expected = f"expected a list of {kind.__name__} as {what}"
    if isinstance(given, kind | str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{expected}, got {type(given).__name__} {given!r:.80}")
    objects = list(given)
    for item in objects:
        if not isinstance(item, kind):
            raise TypeError(f"{expected}, but it holds {type(item).__name__} {item!r:.80}")
    if len(objects) < least:
        raise ValueError(f"no {what} given; give at least {'one' if least == 1 else least}")
    return objects


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> ValueError:
    """Return the error for a name that is not among the known ones; it suggests the close ones."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.{remedy and ' ' + remedy}")
