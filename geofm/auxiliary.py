"""Environmental variables of a place: names, units, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geofm.errors import AuxiliaryError

__all__ = ["Variable", "auxiliary_table"]

# Units whose values tell when they were not meant.
TENTHS_OF_DEGREE = "0.1 degC"
PERMILLE = "0.001 m3/m3"
# Maximum of the warmest month and mean of the warmest quarter (WorldClim). In tenths of a degree
# they are below 60 only where summer stays below 6 degC and no tree grows, in degrees Celsius
# everywhere. The others tell nothing: an annual mean of 4.5 degC is 45 in tenths.
_WARMEST = ("bio05", "bio10")
_LARGEST_CELSIUS = 60.0
# What rasters usually mark missing values with.
_NO_DATA = (-999.0, -999.9, -9999.0, -32768.0, -3.4028234663852886e38)


@dataclass(frozen=True)
class Variable:
    """One environmental variable of a model.

    Attributes:
        name: For example ``"bio01"``.
        unit: For example ``"0.1 degC"``.
        group: The model's group of variables it belongs to.
        low: Lower end of the training range, for the normalization.
        high: Upper end of it.
        minimum: Values below are impossible in the unit.
        maximum: Values above are impossible in the unit.
        about: What it is, in words.
    """

    name: str
    unit: str
    group: str
    low: float
    high: float
    minimum: float = -math.inf
    maximum: float = math.inf
    about: str = ""


def auxiliary_table(
    values: Any,
    variables: Sequence[Variable],
    check_units: bool = True,
    *,
    sample: Callable[[int], str] = "sample {}".format,
) -> Tensor:
    """Environmental variables as a table in a model's order, checked against their units.

    Args:
        values: (N, variables) in that order, tensor or array; or a dict of columns (numbers or
            sequences of one length); or a list of dicts. None or NaN where a value is missing;
            a variable may be left out altogether.
        variables: What the model takes.
        check_units: Refuse values that cannot be in their unit, and no-data values such as -999
            below the training range. Degrees Celsius in place of tenths are recognised by the
            warmest month and quarter alone.
        sample: What to call a row in messages, from its number.

    Returns:
        float32, (N, variables), NaN where missing.

    Raises:
        AuxiliaryError: A name is unknown, the shape is wrong, or a value cannot be in its unit or
            marks a missing one.
    """
    names = [variable.name for variable in variables]
    if isinstance(values, Mapping):
        table = _of_columns(values, names)
    elif isinstance(values, Sequence) and all(isinstance(row, Mapping) for row in values):
        for row in values:
            _check_names(row, names)
        table = _of_rows(values, names)
    else:
        table = torch.as_tensor(values, dtype=torch.float32)
        table = table[None] if table.ndim == 1 else table
        if table.ndim != 2 or table.shape[1] != len(names):
            raise AuxiliaryError(
                f"auxiliary must be (N, {len(names)}), in the order {', '.join(names)}; got "
                f"{tuple(table.shape)}. A dict of columns needs no order"
            )
    if check_units:
        # The limits are on the CPU; the values may be on a GPU.
        here = table.detach().cpu()
        _check_no_data(here, variables, sample)
        _check_limits(here, variables, sample)
        _check_scales(here, variables, sample)
    return table


def _of_columns(columns: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    _check_names(columns, names)
    lists = {
        name: list(column) if isinstance(column, Iterable) else [column]
        for name, column in columns.items()
    }
    lengths = {len(column) for column in lists.values()}
    if len(lengths) != 1:
        found = ", ".join(f"{name} {len(column)}" for name, column in lists.items())
        raise AuxiliaryError(f"auxiliary columns have different lengths: {found}")
    count = lengths.pop()
    return _of_rows([{k: column[i] for k, column in lists.items()} for i in range(count)], names)


def _of_rows(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Tensor:
    table = [[_number(row.get(name)) for name in names] for row in rows]
    return torch.tensor(table, dtype=torch.float32).reshape(len(rows), len(names))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _check_names(given: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = [str(name) for name in given if name not in names]
    if unknown or not given:
        raise AuxiliaryError(
            f"auxiliary has unknown variables: {', '.join(unknown) or 'none are given'}; known are "
            f"{', '.join(names)}. Leave out, or set to None, what is not known"
        )


def _check_no_data(
    table: Tensor, variables: Sequence[Variable], sample: Callable[[int], str]
) -> None:
    """Refuse what marks missing values, where it lies below all that the model was trained on."""
    low = torch.tensor([variable.low for variable in variables])
    marks = torch.isin(table, torch.tensor(_NO_DATA, dtype=table.dtype))
    wrong = marks & (table < low)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        variable = variables[column]
        raise AuxiliaryError(
            f"{variable.name} of {sample(row)} is {float(table[row, column]):g}, a usual no-data "
            f"value; the model was trained on {variable.low:g} to {variable.high:g} "
            f"{variable.unit}. Say None or NaN where a value is missing"
        )


def _check_limits(
    table: Tensor, variables: Sequence[Variable], sample: Callable[[int], str]
) -> None:
    low = torch.tensor([variable.minimum for variable in variables])
    high = torch.tensor([variable.maximum for variable in variables])
    # NaN compares as neither.
    wrong = (table < low) | (table > high)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        variable = variables[column]
        raise AuxiliaryError(
            f"{variable.name} of {sample(row)} is {float(table[row, column]):g}, but in "
            f"{variable.unit} it is from {variable.minimum:g} to {variable.maximum:g}; is it in "
            f"another unit, or a no-data value (then None)?"
        )


def _check_scales(
    table: Tensor, variables: Sequence[Variable], sample: Callable[[int], str]
) -> None:
    """Refuse degrees for tenths of a degree, and fractions for thousandths."""
    degrees = torch.tensor([v.unit == TENTHS_OF_DEGREE for v in variables])
    warmest = degrees & torch.tensor([v.name in _WARMEST for v in variables])
    known = degrees & torch.isfinite(table)
    broken = known & (table != table.round())
    small = (~known | (table.abs() < _LARGEST_CELSIUS)).all(dim=1, keepdim=True)
    wrong = broken & small & (known & warmest).any(dim=1, keepdim=True)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise AuxiliaryError(
            f"{variables[column].name} of {sample(row)} is {float(table[row, column]):g}: that "
            f"looks like degrees Celsius, but the model takes tenths of a degree (WorldClim 1 "
            f"integers); multiply temperatures by 10. If these are tenths, of a place "
            f"without summer, round them"
        )
    fractions = torch.tensor([v.unit == PERMILLE for v in variables])
    wrong = fractions & (table > 0) & (table <= 1)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        variable = variables[column]
        raise AuxiliaryError(
            f"{variable.name} of {sample(row)} is {float(table[row, column]):g}: that looks like a "
            f"fraction, but the model takes {variable.unit}; multiply soil moisture by 1000"
        )
