"""Commands: one module each with `main(arguments)`, called by launch/ and cli.py."""
