"""The environment of each pixel, from numbers, arrays and functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from geofm.auxiliary import Variable, auxiliary_table
from geofm.errors import AuxiliaryError
from geofm.series.cube import Cube, xarray_module

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Given", "Sites"]

Floats: TypeAlias = NDArray[np.float64]
Given: TypeAlias = "float | xr.DataArray | Callable[[Floats, Floats], Any] | None"

_PLACE = ("longitude", "latitude")


class Sites:
    """Environmental variables of the pixels of a cube.

    Args:
        given: By name: a number for all pixels, None for one that is not known, a DataArray (y, x)
            of the same pixels, NaN where not known, or a function of the longitudes and the
            latitudes, (n,) each, that returns (n,) values. What is left out is not known, but for
            longitude and latitude, which the georeference tells.
        variables: What the model takes.
        cube: The pixels.

    Raises:
        AuxiliaryError: A name is unknown, or an array is not of these pixels.
        RasterError: Longitude and latitude are needed, and there is no reference system.
    """

    def __init__(
        self, given: Mapping[str, Given] | None, variables: Sequence[Variable], cube: Cube
    ) -> None:
        self.given = dict(given or {})
        self.variables = tuple(variables)
        self.names = tuple(variable.name for variable in variables)
        self.cube = cube
        unknown = [str(name) for name in self.given if name not in self.names]
        if unknown:
            raise AuxiliaryError(
                f"auxiliary has unknown variables: {', '.join(unknown)}; known are "
                f"{', '.join(self.names)}"
            )
        for name, values in self.given.items():
            self._check(name, values)
        self.located = any(callable(v) for v in self.given.values()) or any(
            name in self.names and name not in self.given for name in _PLACE
        )
        if self.located:
            # Now, not after an hour.
            cube.lonlat(np.zeros(1), np.zeros(1))

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the variables that are given or told by the georeference."""
        return tuple(
            name
            for name in self.names
            if self.given.get(name) is not None or (name in _PLACE and name not in self.given)
        )

    def table(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Variables of pixels.

        Args:
            rows: (n,).
            columns: (n,).

        Returns:
            (n, variables) in the model's order, NaN where not known.

        Raises:
            AuxiliaryError: A function returns something else than a value for each pixel, or a
                value cannot be in its unit; the message names the pixel.
        """
        out = np.full((len(rows), len(self.names)), np.nan, np.float32)
        places = self.cube.lonlat(rows, columns) if self.located else None
        for column, name in enumerate(self.names):
            values = self.given.get(name)
            if name in _PLACE and name not in self.given:
                assert places is not None
                out[:, column] = places[_PLACE.index(name)]
            elif isinstance(values, xarray_module().DataArray):
                out[:, column] = _picked(values, rows, columns)
            elif callable(values):
                assert places is not None
                out[:, column] = _called(name, values, *places)
            elif values is not None:
                out[:, column] = values

        def pixel(number: int) -> str:
            return f"the pixel at row {rows[number]}, column {columns[number]}"

        # The model checks them, too, but does not know which pixels they are of.
        auxiliary_table(out, self.variables, sample=pixel)
        return out

    def _check(self, name: str, values: Any) -> None:
        if isinstance(values, xarray_module().DataArray):
            _check_grid(name, values, self.cube.array)
        elif values is None or callable(values):
            return
        elif isinstance(values, bool | str) or not np.isscalar(values):
            raise AuxiliaryError(
                f"{name} is a {type(values).__name__}; expected a number, a DataArray (y, x) of "
                f"the same pixels, a function of longitudes and latitudes, or None"
            )


def _check_grid(name: str, values: Any, like: Any) -> None:
    sizes = {"y": like.sizes["y"], "x": like.sizes["x"]}
    if {str(dim): n for dim, n in values.sizes.items()} != sizes:
        raise AuxiliaryError(
            f"{name} has {dict(values.sizes)} values, the images have {sizes} pixels; resample it, "
            f"for example with values.interp_like(monthly)"
        )
    for dim in ("y", "x"):
        if dim not in values.coords:
            continue
        wanted, found = like.coords[dim].values, values.coords[dim].values
        step = abs(float(wanted[1] - wanted[0]))
        if not np.allclose(wanted, found, rtol=0, atol=step / 4):
            raise AuxiliaryError(
                f"{name} lies elsewhere than the images: {dim} begins at {found[0]:g}, theirs at "
                f"{wanted[0]:g}; resample it, for example with values.interp_like(monthly)"
            )


def _picked(values: Any, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
    """Of a lazy array only the part around the pixels is computed."""
    top, left = int(rows.min()), int(columns.min())
    part = values.transpose("y", "x")[top : int(rows.max()) + 1, left : int(columns.max()) + 1]
    fill = values.attrs.get("_FillValue")
    found: NDArray[Any] = part.values[rows - top, columns - left]
    # A plain number is compared in the type of the values.
    return found if fill is None else np.where(found == float(fill), np.nan, found)


def _called(name: str, function: Any, longitudes: Floats, latitudes: Floats) -> NDArray[Any]:
    values = np.asarray(function(longitudes, latitudes))
    if values.shape != longitudes.shape or values.dtype.kind not in "iuf":
        raise AuxiliaryError(
            f"the function for {name} was given {len(longitudes)} longitudes and latitudes and "
            f"returned {values.dtype} of shape {values.shape}; expected a number for each "
            f"(numpy.vectorize makes one of a function of two numbers)"
        )
    return values
