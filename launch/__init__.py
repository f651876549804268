"""Scripts for launchers."""
