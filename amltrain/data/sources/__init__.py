"""Readers of annotations, one file per origin; every one yields the same source rows."""
