from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from scale.toy import Toy, toy

from fewstep.errors import FewstepError
from fewstep.scale import BlockError, RayEngine, sample_shards


@pytest.fixture(autouse=True)
def found_by_workers(ray_here):
    """The file of the toy travels by value: workers do not see the folder of the tests."""
    from ray import cloudpickle
    from scale import toy as module

    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_killed_workers_are_replaced_and_the_set_is_that_of_one_process_to_the_byte(tmp_path):
    killed = []

    def told(what: str, process: int) -> None:
        if what == "ready" and not killed:
            killed.append(process)
            os.kill(process, signal.SIGKILL)

    job = toy(400, block=4)
    one = sample_shards(job, tmp_path / "one")
    two = sample_shards(job, tmp_path / "two", engine=RayEngine(2, told=told))
    assert two.checksums == one.checksums
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert killed
    assert two.tally.deaths <= 1  # 0 if the other worker did everything before it was missed


def test_a_block_that_kills_its_workers_is_named_and_what_is_finished_is_kept(tmp_path):
    job = toy(40, block=4, opened=Toy(deadly=20))
    with pytest.raises(BlockError, match="block 5 was given up: 1 workers died"):
        sample_shards(job, tmp_path / "a", engine=RayEngine(1, depth=1, most_deaths=1))  # one at a time: no doubt which one it was
    healthy = toy(40, block=4)
    assert sample_shards(healthy, tmp_path / "a").drawn <= 40 - 4 * 4


def test_an_error_of_the_model_is_told_as_its_own(tmp_path):
    with pytest.raises(ValueError, match="the weights are gone"):
        sample_shards(toy(opened=Toy(fails=True)), tmp_path / "a", engine=RayEngine(1))


def test_a_job_that_no_worker_has_room_for_is_refused(tmp_path):
    with pytest.raises(FewstepError, match="no worker with 4096 processor cores"):
        RayEngine(1).run(toy(threads=4096), None, [0], lambda block, content: None)  # type: ignore[arg-type]
