"""The mark of a finished run. Imports nothing, so that a command can look for it quickly."""

FINISHED_FILE = "finished"
"""An empty file in the folder of a run that has trained all its steps and been evaluated."""
