"""Alignment-aware masked learning: PMME scores, AFM masks, presets, temperature. Knows no model and no data."""
