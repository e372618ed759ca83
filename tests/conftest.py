"""Its place makes the helpers beside it (pod) importable from the tests in every directory below."""

from hypothesis import settings

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("tpvpn", deadline=None)
settings.load_profile("tpvpn")
