"""Its place makes the helpers beside it (pod) importable from the tests in every directory below."""
