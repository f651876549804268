"""The analyses of the AML paper: tables and pictures from scores, maps and logs."""
