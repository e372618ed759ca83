"""Its place makes the modules beside it importable."""
