"""The import check itself: a small bad tree must be flagged for every rule, a good one for none; and the real tree must pass."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "check_layers.py"


def _load():
    spec = importlib.util.spec_from_file_location("check_layers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_layers"] = module
    spec.loader.exec_module(module)
    return module


layers = _load()


def make_tree(root, files):
    for name, text in {"src/fewstep/__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def faults(root, files):
    make_tree(root, files)
    return layers.check_static(root)


GOOD = {
    "src/fewstep/__init__.py": "from fewstep import schedules, solvers\nfrom fewstep.plan import Plan\n",
    "src/fewstep/__main__.py": "from fewstep.cli import main\n",
    "src/fewstep/numerics.py": "import math\nimport numpy as np\n",
    "src/fewstep/schedules.py": "from fewstep.errors import GridError\nimport torch\n",
    "src/fewstep/errors.py": "",
    "src/fewstep/plan.py": "from fewstep import schedules\nfrom .numerics import phi\n",
    "src/fewstep/noise.py": "from fewstep.plan import Plan\n",
    "src/fewstep/sampler.py": "from fewstep.noise import draw_noise\n\ndef bar():\n    from tqdm import tqdm\n",
    "src/fewstep/solvers/__init__.py": "from fewstep.solvers.ddim import DDIM\nfrom . import unipc\n",
    "src/fewstep/solvers/ddim.py": "from ..plan import Plan\n",
    "src/fewstep/solvers/unipc.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from scipy import stats\n",
    "src/fewstep/train/trainer.py": "from fewstep.train.losses import loss\n",
    "src/fewstep/train/losses.py": "def f():\n    import sklearn\n",
    "src/fewstep/diffusers.py": "import diffusers\n",
    "src/fewstep/cli/sample.py": "import fewstep as fs\nfrom fewstep.train.trainer import fit\n",
    "tests/test_x.py": "import pickle\n",
    "tools/x.py": "import numpy as np\nnp.load('x', allow_pickle=False)\n",
}

BAD = {
    "upwards": ("layer", "src/fewstep/schedules.py", "from fewstep.plan import Plan"),
    "upwards by name": ("layer", "src/fewstep/schedules.py", "from fewstep import plan"),
    "upwards, relative": ("layer", "src/fewstep/schedules.py", "from .plan import Plan"),
    "upwards, inside a function": ("layer", "src/fewstep/schedules.py", "def f():\n    import fewstep.plan"),
    "upwards, for types": ("layer", "src/fewstep/plan.py", "if TYPE_CHECKING:\n    from fewstep.sampler import sample"),
    "upwards, by import_module": ("layer", "src/fewstep/plan.py", 'import importlib\nimportlib.import_module("fewstep.sampler")'),
    "same row": ("layer", "src/fewstep/schedules.py", "from fewstep.predictions import data"),
    "against the table of the same row": ("layer", "src/fewstep/noise.py", "from fewstep.sampler import sample"),
    "sampler takes a solver": ("layer", "src/fewstep/sampler.py", "from fewstep.solvers import DDIM"),
    "integrate takes the loop": ("layer", "src/fewstep/integrate.py", "from fewstep.sampler import sample"),
    "core takes training": ("layer", "src/fewstep/loading.py", "from fewstep.train import fit"),
    "evaluate takes training": ("layer", "src/fewstep/evaluate/report.py", "from fewstep.train import fit"),
    "solver takes a tuner": ("layer", "src/fewstep/solvers/dpm_v3.py", "from fewstep.tuners.statistics import collect"),
    "siblings": ("layer", "src/fewstep/merge/arithmetic.py", "from fewstep.tuners import search"),
    "serve takes act": ("layer", "src/fewstep/serve/engine.py", "import fewstep.act.policy"),
    "serve takes train": ("layer", "src/fewstep/serve/engine.py", "from fewstep.train import trainer"),
    "somebody takes the command line": ("layer", "src/fewstep/serve/engine.py", "from fewstep.cli import main"),
    "the root takes the command line": ("layer", "src/fewstep/__init__.py", "from fewstep.cli import main"),
    "__main__ takes more": ("layer", "src/fewstep/__main__.py", "from fewstep.sampler import sample"),
    "a name from the root": ("layer", "src/fewstep/loading.py", "from fewstep import Denoiser"),
    "the root itself": ("layer", "src/fewstep/loading.py", "import fewstep as fs"),
    "no row": ("layer", "src/fewstep/magic.py", ""),
    "solver takes a solver": ("solver", "src/fewstep/solvers/unipc.py", "from fewstep.solvers.ddim import DDIM"),
    "solver takes a solver, relative": ("solver", "src/fewstep/solvers/unipc.py", "from .ddim import DDIM"),
    "solver takes the package": ("solver", "src/fewstep/solvers/unipc.py", "from fewstep.solvers import make_plan"),
    "host numerics take torch": ("library", "src/fewstep/numerics.py", "def f():\n    import torch"),
    "library at the top": ("library", "src/fewstep/grids.py", "import scipy.stats"),
    "dependency at the top": ("library", "src/fewstep/sampler.py", "from tqdm import tqdm"),
    "library at the top of a class": ("library", "src/fewstep/grids.py", "class A:\n    import sklearn"),
    "library of no extra": ("library", "src/fewstep/grids.py", "def f():\n    import pandas"),
    "library in a module of another": ("library", "src/fewstep/diffusers.py", "import peft"),
    "empty file name": ("name", "src/fewstep/train/utils.py", ""),
    "empty folder name": ("name", "tests/helpers/x.py", ""),
    "empty private name": ("name", "benchmarks/_common.py", ""),
    "pickle": ("pickle", "src/fewstep/artefacts.py", "def f():\n    import pickle"),
    "from pickle": ("pickle", "tools/x.py", "from pickle import loads"),
    "torch.load": ("pickle", "examples/x.py", "import torch\ntorch.load('x')"),
    "from torch": ("pickle", "src/fewstep/loading.py", "from torch import load"),
    "allow_pickle": ("pickle", "benchmarks/x.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    "syntax": ("syntax", "src/fewstep/plan.py", "def"),
}


def test_good_tree_passes(tmp_path):
    assert faults(tmp_path, GOOD) == []


@pytest.mark.parametrize("case", BAD)
def test_bad_tree_is_flagged(tmp_path, case):
    rule, path, text = BAD[case]
    found = faults(tmp_path, {path: text + "\n"})
    assert {fault.rule for fault in found} == {rule}, found
    assert {str(fault.path).removeprefix(str(tmp_path) + "/") for fault in found} == {path}


def test_line_and_module_are_named(tmp_path):
    (fault,) = faults(tmp_path, {"src/fewstep/plan.py": "import math\nfrom fewstep.sampler import sample\n"})
    assert str(fault).startswith("src/fewstep/plan.py:2: [layer] fewstep.plan (row 3) imports fewstep.sampler of the higher row 5.")


def test_same_row_table_has_no_cycle_and_stays_in_its_row():
    order = {}
    for importer, imported in layers.SAME_ROW:
        assert layers._row(importer) == layers._row(imported), (importer, imported)
        order.setdefault(importer, set()).add(imported)

    def reach(name, seen=()):
        assert name not in seen, f"cycle through {name}"
        for following in order.get(name, ()):
            reach(following, (*seen, name))

    for name in order:
        reach(name)


def test_every_library_is_in_its_extra():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for library, (extra, name) in layers.EXTRAS.items():
        listed = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
        assert any(re.match(rf"{name}(\[\w+\])?>=", entry) for entry in listed), f"{library}: {name} is not in {extra}"


def make_package(root, name, init, main):
    make_tree(root, {f"{name}/__init__.py": init, f"{name}/__main__.py": main})


def test_run_time_check_passes_a_good_package(tmp_path):
    make_package(
        tmp_path, "lean", "__all__ = ['x']\ndef __getattr__(name):\n    import torch\n    return torch\n", "print('help')\n"
    )
    assert layers.check_runtime("lean", set(), tmp_path) == []


def test_run_time_check_flags_a_heavy_import(tmp_path):
    (tmp_path / "heavy_library.py").write_text("")
    lazily = "__all__ = ['x']\ndef __getattr__(name):\n    import heavy_library\n    return 1\n"
    make_package(tmp_path, "heavy", lazily, "import torch\n")
    first, second = layers.check_runtime("heavy", set(), tmp_path)
    assert "loads heavy_library besides torch" in first
    assert "--help: [runtime] imports torch" in second


def test_run_time_check_flags_a_broken_package(tmp_path):
    make_package(tmp_path, "broken", "raise ValueError('this one')\n", "")
    first, second = layers.check_runtime("broken", set(), tmp_path)
    assert "this one" in first
    assert "this one" in second


def test_script_exits_with_1_and_prints_the_fault(tmp_path):
    make_tree(tmp_path, {"src/fewstep/misc.py": ""})
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "--static"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "[name] 'misc' names nothing" in done.stdout


def test_this_checkout_passes():
    assert layers.check_static(ROOT) == []
