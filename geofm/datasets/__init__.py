"""Datasets for demonstrations and tests: plausible Sentinel-2 scenes made by arithmetic alone."""
