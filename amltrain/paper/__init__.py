"""The AML paper: its tables, figures and analyses. Nothing else in the package imports this."""
