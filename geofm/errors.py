"""The errors geofm raises.

Every one derives from `GeofmError` and from the builtin a caller would expect, so both
``except geofm.GeofmError`` and ``except ValueError`` work. A message says what was found, what was
expected and what to do about it.
"""

__all__ = [
    "AuxiliaryError",
    "BandError",
    "CardError",
    "DataNotFoundError",
    "DownloadError",
    "GeofmError",
    "HashMismatchError",
    "LayoutError",
    "MissingExtraError",
    "ModelError",
    "PixelError",
    "RasterError",
    "TaxonError",
    "UnknownModelError",
    "UnsafeFileError",
    "WeightsNotFoundError",
]


class GeofmError(Exception):
    """Base of all errors raised by geofm."""


class AuxiliaryError(GeofmError, ValueError):
    """An environmental variable is unknown, misshapen, or cannot be in its unit."""


class BandError(GeofmError, ValueError):
    """A band is missing, unknown, repeated or ambiguous."""


class CardError(GeofmError, ValueError):
    """A weight card is malformed; the message names the card and the field."""


class DataNotFoundError(GeofmError, FileNotFoundError):
    """A file or folder of data is not where it was said to be."""


class DownloadError(GeofmError, OSError):
    """A file could not be fetched: no network, a server error, a full disk, a truncated body."""


class HashMismatchError(GeofmError, ValueError):
    """A file's sha256 is not the one the card or the first download recorded."""


class LayoutError(GeofmError, ValueError):
    """A checkpoint's keys or shapes match no known layout, or do not match the model exactly."""


class MissingExtraError(GeofmError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class ModelError(GeofmError, ValueError):
    """A model was asked for with arguments it cannot have."""


class PixelError(GeofmError, ValueError):
    """Pixels are not what they were said to be: wrong shape, type, units or product level."""


class RasterError(GeofmError, ValueError):
    """A raster cannot be read, georeferenced or written as asked."""


class TaxonError(GeofmError, ValueError):
    """A taxon is incomplete, unknown or ambiguous, or a list of taxa cannot be read."""


class UnknownModelError(GeofmError, ValueError):
    """No model, tag or card has this name; the message suggests the nearest."""


class UnsafeFileError(GeofmError, ValueError):
    """A checkpoint holds objects that only executing code could rebuild. Nothing was executed."""


class WeightsNotFoundError(GeofmError, FileNotFoundError):
    """No weights are available for what was asked: none published, none cached, none bundled."""
