"""Bands, sensors, and matching one to the other: bands are names, not positions."""

from geofm.spectral.bands import Band, Sensor
from geofm.spectral.indices import NormalizedDifference
from geofm.spectral.matching import Match, match_bands, missing_message, resolve_bands
from geofm.spectral.names import refuse_string
from geofm.spectral.sensors import SENSORS, sensor

__all__ = [
    "SENSORS",
    "Band",
    "Match",
    "NormalizedDifference",
    "Sensor",
    "match_bands",
    "missing_message",
    "refuse_string",
    "resolve_bands",
    "sensor",
]
