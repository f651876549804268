"""A run as typed values: what can be set (schema), how it is read (parse, files) and what is allowed (ranges)."""
