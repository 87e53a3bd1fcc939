"""Environmental variables of a place: names, units, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geofm.errors import AuxiliaryError

__all__ = ["Variable", "auxiliary_table"]

# Units whose values tell when they were not meant.
TENTHS_OF_DEGREE = "0.1 degC"
PERMILLE = "0.001 m3/m3"
# Temperatures that differ by more than a season: if all are below 60 in tenths of a degree, the
# warmest month stays below 6 degC, where no tree grows.
_LARGEST_CELSIUS = 60.0


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


def auxiliary_table(values: Any, variables: Sequence[Variable], check_units: bool = True) -> Tensor:
    """Environmental variables as a table in a model's order, checked against their units.

    Args:
        values: (N, variables) in that order, tensor or array; or a dict of columns (numbers or
            sequences of one length); or a list of dicts. None or NaN where a value is missing;
            a variable may be left out altogether.
        variables: What the model takes.
        check_units: Refuse values that cannot be in their unit.

    Returns:
        float32, (N, variables), NaN where missing.

    Raises:
        AuxiliaryError: A name is unknown, the shape is wrong, or a value cannot be in its unit.
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
        _check_limits(here, variables)
        _check_scales(here, variables)
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


def _check_limits(table: Tensor, variables: Sequence[Variable]) -> None:
    low = torch.tensor([variable.minimum for variable in variables])
    high = torch.tensor([variable.maximum for variable in variables])
    # NaN compares as neither.
    wrong = (table < low) | (table > high)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        variable = variables[column]
        raise AuxiliaryError(
            f"{variable.name} of sample {row} is {float(table[row, column]):g}, but in "
            f"{variable.unit} it is from {variable.minimum:g} to {variable.maximum:g}; is it in "
            f"another unit, or a no-data value (then None)?"
        )


def _check_scales(table: Tensor, variables: Sequence[Variable]) -> None:
    """Refuse degrees for tenths of a degree, and fractions for thousandths."""
    degrees = [i for i, v in enumerate(variables) if v.unit == TENTHS_OF_DEGREE]
    fractions = [i for i, v in enumerate(variables) if v.unit == PERMILLE]
    for number, row in enumerate(table):
        known = [i for i in degrees if math.isfinite(float(row[i]))]
        broken = [i for i in known if float(row[i]) != round(float(row[i]))]
        if broken and all(abs(float(row[i])) < _LARGEST_CELSIUS for i in known):
            variable = variables[broken[0]]
            raise AuxiliaryError(
                f"{variable.name} of sample {number} is {float(row[broken[0]]):g}: that looks like "
                f"degrees Celsius, but the model takes tenths of a degree (WorldClim 1 integers); "
                f"multiply temperatures by 10"
            )
        small = [i for i in fractions if 0 < float(row[i]) <= 1]
        if small:
            variable = variables[small[0]]
            raise AuxiliaryError(
                f"{variable.name} of sample {number} is {float(row[small[0]]):g}: that looks like "
                f"a fraction, but the model takes {variable.unit}; multiply soil moisture by 1000"
            )
