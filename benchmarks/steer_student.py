"""The student of ``benchmarks/prefer.py`` and ``benchmarks/control.py``: latent consistency distillation of the digits, 1, 2 and 4 calls.

It takes about a minute to train and is kept in the folder for temporary files: ``python benchmarks/steer_student.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import distill_teacher
import torch

from fewstep.distill import LCM, Student, distill
from fewstep.train.recipes import digits

FOLDER = Path(tempfile.gettempdir()) / "fewstep_steer" / "student"
TRAINING = {"iterations": 1500, "batch_size": 128, "ema": 0.995, "learning_rate": 1e-3, "seed": 0}


def load() -> Student:
    """The student, trained if it is not there."""
    teacher = distill_teacher.load()
    if not (FOLDER / "student.json").exists():
        student = distill(teacher, method=LCM(), data=digits("train"), steps=(1, 2, 4), compare=None, **TRAINING)
        student.save(FOLDER)
    return Student.load(FOLDER, teacher)


def main() -> int:
    torch.set_num_threads(1)
    print(load().card["training"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
