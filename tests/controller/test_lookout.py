"""A Lookout: how long there was no node."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from achilles.controller.lookout import Lookout
from achilles.errors import NoNodesError


@pytest.mark.parametrize("minutes", [1, 60])
def test_what_was_before_nobody_looked_does_not_count(minutes):
    """A pool that works or rests for an hour looks at nothing; then its cluster is started anew."""
    cluster = SimpleNamespace(connected=True, workers=lambda: (0, 0), settings=SimpleNamespace(host="here", port=1))
    lookout = Lookout(cluster, wait_for_nodes=30)
    lookout.look()

    def wait(seconds):
        lookout._looked -= seconds
        lookout._lonely_since -= seconds

    wait(60 * minutes)
    lookout.look()
    for _ in range(29):
        wait(1)
        lookout.look()
    wait(1)
    with pytest.raises(NoNodesError, match="within 30 s"):
        lookout.look()
