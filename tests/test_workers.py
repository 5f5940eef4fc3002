"""`make test` spreads tests over workers: those of a group, which share what takes long to make, stay together."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("here")
def test_a_group_is_known_to_the_scheduler(request: pytest.FixtureRequest) -> None:
    """It finds the group at the end of a test's id, where pytest-xdist has to put it."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not a worker of --dist loadgroup")
    assert request.node.nodeid.endswith("@here")
