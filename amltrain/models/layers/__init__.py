"""Layers that several models share, or that would make a model's file too long."""
