from __future__ import annotations

import gc
import warnings

import pytest


@pytest.fixture(scope="session")
def ray_here():
    """A session of Ray on this machine, shared by all tests that need one."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `scale` brings it")
    from fewstep.scale.actors import ray_session

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for the processes that it ends
        with ray_session(None, 2):
            yield ray
        gc.collect()
