"""Scale out: many samples as checksummed shards, and many trials, in one process or on a cluster of Ray."""

from fewstep.scale.actors import RayEngine
from fewstep.scale.coordinator import BlockError, Coordinator
from fewstep.scale.job import Job, Opened
from fewstep.scale.reading import read_shards
from fewstep.scale.run import LocalEngine, Summary, sample_shards
from fewstep.scale.trials import RayMap

__all__ = [
    "BlockError",
    "Coordinator",
    "Job",
    "LocalEngine",
    "Opened",
    "RayEngine",
    "RayMap",
    "Summary",
    "read_shards",
    "sample_shards",
]
