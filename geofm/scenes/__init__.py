"""Scenes as they come: SAFE folders, folders of bands, STAC items and stacked files."""

from geofm.scenes.open import open_scene
from geofm.scenes.scene import CLOUDY, SCL_CLASSES, Scene, SceneBand, SceneReader

__all__ = ["CLOUDY", "SCL_CLASSES", "Scene", "SceneBand", "SceneReader", "open_scene"]
