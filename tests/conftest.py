"""Its place makes the helpers beside it (pod) importable from the tests in every directory below."""

import pytest
from hypothesis import settings

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("tpvpn", deadline=None)
settings.load_profile("tpvpn")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A process of several has temporary directories like any other: deeper ones are too long for a socket's path."""
    if hasattr(config, "workerinput"):
        config.option.basetemp = None
