"""The model families. They know no files, no network and no cards."""

# Before the families: importing timm registers them there (geofm._timm_hook), which imports them,
# and a family that is itself in the middle of importing timm could not be.
import timm  # noqa: F401
