"""`make test` spreads tests over workers; the tests of a group, which share slow fixtures, run on the same one."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("here")
def test_a_group_is_known_to_the_scheduler(request: pytest.FixtureRequest) -> None:
    """The scheduler finds the group at the end of a test's id, where pytest-xdist puts it."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not a worker of --dist loadgroup")
    assert request.node.nodeid.endswith("@here")
