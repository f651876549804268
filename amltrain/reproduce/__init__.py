"""The AML paper's tables and figures: their definition, the commands that make them, and the files that show them."""
