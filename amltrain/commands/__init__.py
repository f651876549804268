"""What the command lines do: one module each, `main(arguments)`; launch/ and cli.py only call them."""
