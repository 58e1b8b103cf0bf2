"""Is a run that was killed and resumed the run that was not? ``python benchmarks/kills.py`` writes ``benchmarks/results/kills.json``.

A small network learns digits, with dropout and batch normalisation, AdamW, two averages, snapshots of them, a batch in two pieces, and a
checkpoint every third step. Each trial starts it in a process of its own, ends that by SIGKILL at a random moment between its start and the
time a whole run takes, starts it again in another process to the end, and compares with the whole run: weights, averages, optimizer,
log and snapshots, bit for bit. Last, one run is killed again and again, at random moments, until it is through.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from fewstep.schedules import Flow
from fewstep.train import DenoisingLoss, PowerFunction, fit
from fewstep.train.checkpoints import CHECKPOINT, digest, frozen, read_checkpoint
from fewstep.train.logs import LOG
from fewstep.train.recipes import digits

RESULTS = Path(__file__).parent / "results" / "kills.json"
STEPS, BATCH = 60, 16
OPTIONS = {
    "ema": (0.99, PowerFunction(0.1)),
    "accumulate": 2,
    "checkpoint_every": 3,
    "log_every": 5,
    "snapshot_every": 20,
    "warmup": 10,
}


class Network(nn.Module):
    """Draws from the ambient generator, and has buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(65, 96), nn.BatchNorm1d(96), nn.SiLU(), nn.Dropout(0.1), nn.Linear(96, 64))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x.flatten(1), time[:, None]], 1)).view_as(x)


def train(folder: Path, data: dict[str, torch.Tensor]) -> None:
    """The run."""
    fit(DenoisingLoss(Flow(), "flow"), Network(), data, steps=STEPS, batch_size=BATCH, folder=folder, **OPTIONS)


def start(folder: Path, data: dict[str, torch.Tensor]) -> int:
    """Train in another process; returns its number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(folder, data)
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """The exit status of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left(folder: Path) -> dict[str, str]:
    """Digests of everything that a run leaves: of the checkpoint what it says, for the order of a file's entries is not fixed."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    assert {CHECKPOINT, LOG} <= found.keys()
    settings, state = read_checkpoint(folder / CHECKPOINT)
    return {**found, CHECKPOINT: digest(json.dumps(settings, sort_keys=True) + frozen(state)[0], frozen(state)[1])}


def killed(folder: Path, data: dict[str, torch.Tensor], after: float) -> dict[str, object]:
    """Start a run and kill it; what it was doing."""
    begun = time.perf_counter()
    pid = start(folder, data)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.perf_counter() - begun < after:
        time.sleep(min(0.002, max(0.0, after - (time.perf_counter() - begun))))
    after = time.perf_counter() - begun
    os.kill(pid, signal.SIGKILL)
    status = ended(pid)
    path = folder / CHECKPOINT
    writing = any(folder.glob(".*.tmp")) if folder.exists() else False
    step = read_checkpoint(path)[1]["step"] if path.exists() else 0
    return {"seconds": round(after, 4), "killed": status == -signal.SIGKILL, "checkpoint": step, "while_writing": writing}


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training run at random moments, resume it and compare.")
    parser.add_argument("--trials", type=int, default=50, help="runs that are killed once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    moments, data, place = random.Random(options.seed), {"x": digits()["x"]}, Path(tempfile.mkdtemp())
    first = time.perf_counter()
    train(place / "warm", data)  # loads what a first run loads, so that it is there in every process that is started
    begun = time.perf_counter()
    assert ended(start(place / "whole", data)) == 0
    seconds, wanted = time.perf_counter() - begun, left(place / "whole")
    trials: list[dict[str, object]] = []
    early = 0
    while len(trials) < options.trials:
        folder = place / str(len(trials) + early)
        told = killed(folder, data, moments.uniform(0.0, seconds))
        if not told["killed"]:  # it was quicker than those before it: moments are drawn from its time from now on
            early += 1
            seconds = min(seconds, float(str(told["seconds"])))
            shutil.rmtree(folder)
            continue
        assert ended(start(folder, data)) == 0
        trials.append({**told, "identical": left(folder) == wanted})
        shutil.rmtree(folder)
    folder, kills = place / "again", 0
    while True:
        told = killed(folder, data, moments.uniform(0.1 * seconds, 0.4 * seconds))
        kills += bool(told["killed"])
        if told["checkpoint"] == STEPS:
            break
    assert ended(start(folder, data)) == 0
    again = {"kills": kills, "identical": left(folder) == wanted}
    shutil.rmtree(place)
    report = {
        "command": "python benchmarks/kills.py",
        "machine": "one core of a 2-core machine",
        "seed": options.seed,
        "steps": STEPS,
        "seconds_of_a_whole_run": round(seconds, 3),
        "trials": len(trials),
        "not_counted_for_they_ended_first": early,
        "killed_while_writing": sum(bool(trial["while_writing"]) for trial in trials),
        "killed_before_the_first_checkpoint": sum(trial["checkpoint"] == 0 for trial in trials),
        "identical": sum(bool(trial["identical"]) for trial in trials),
        "one_run_killed_again_and_again": again,
        "moments": trials,
        "seconds": round(time.perf_counter() - first, 1),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in report.items():
        if name != "moments":
            print(f"{name}: {value}")
    return 0 if report["identical"] == len(trials) and again["identical"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
