"""diffusers' own scheduler tests on `PlanScheduler`.

Theirs are not part of this project. Give a checkout of diffusers (the folder that holds ``tests/schedulers``) to run them:

    FEWSTEP_DIFFUSERS_TESTS=path/to/diffusers pytest tests/diffusers/test_common.py

The properties that they check are checked without them in `test_scheduler.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.32")

import fewstep as fs
from fewstep.diffusers import PlanScheduler

CHECKOUT = os.environ.get("FEWSTEP_DIFFUSERS_TESTS")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:the plan:UserWarning"),
]
if CHECKOUT is None:
    pytest.skip("FEWSTEP_DIFFUSERS_TESTS is not set: no checkout of diffusers", allow_module_level=True)


def their_tests():
    """Their module of common tests, under a package name of its own."""
    package = types.ModuleType("diffusers_checkout")
    package.__path__ = [str(Path(CHECKOUT) / "tests")]
    sys.modules["diffusers_checkout"] = package
    return importlib.import_module("diffusers_checkout.schedulers.test_schedulers")


Common = their_tests().SchedulerCommonTest
FOLDER = tempfile.TemporaryDirectory()


def saved_plan():
    schedule = fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 1000).tolist())
    plan = fs.make_plan("unipc", schedule, nfe=25, grid="lambda", final="zero")
    path = Path(FOLDER.name) / "tuned.safetensors"
    plan.save(path)
    return str(path)


TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}
CASES = {
    "DDIM": {**TABLE, "solver": "ddim", "timestep_spacing": "leading"},
    "DPMSolverPP2": {**TABLE, "solver": "dpmpp_2m"},
    "DPMSolverPP3": {**TABLE, "solver": "dpmpp_3m", "final_sigmas_type": "sigma_min"},
    "SDE": {**TABLE, "solver": "dpmpp_2m_sde"},
    "SDESinglestep": {**TABLE, "solver": "dpmpp_2s_sde"},
    "UniPC": {**TABLE, "solver": "unipc"},
    "DEIS": {**TABLE, "solver": "deis"},
    "Churn": {**TABLE, "solver": "edm_heun", "solver_options": {"s_churn": 10.0}},
    "Singlestep": {**TABLE, "solver": "dpmpp_3s"},
    "PlanOfAFile": {**TABLE, "solver": "unipc", "plan": saved_plan()},
    "Flow": {**TABLE, "solver": "unipc", "prediction_type": "flow_prediction", "flow_shift": 3.0},
}
NUMBERS = {"PlanOfAFile": (25, 10), "Flow": (25,)}
"""A plan is run at its own number of steps, and where its base solver plans."""


def full_loop(test, scheduler):
    """Their loop over the dummy model."""
    model, sample = test.dummy_model(), test.dummy_sample_deter
    generator = torch.manual_seed(0)
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t), t, sample, generator=generator).prev_sample
    return sample


def case(name, config, steps):
    class Test(Common):
        scheduler_classes = (PlanScheduler,)
        forward_default_kwargs = (("num_inference_steps", steps),)

        @property
        def default_num_inference_steps(self):
            return steps

        def get_scheduler_config(self, **kwargs):
            return {**config, **kwargs}

        def test_timesteps(self):
            for count in (2, 5, 8, 10):
                self.check_over_forward(num_inference_steps=count, time_step=0)

        def test_spacings(self):
            for spacing in ("linspace", "leading", "trailing"):
                self.check_over_configs(timestep_spacing=spacing, steps_offset=1)

        def test_prediction_types(self):
            if config["prediction_type"] != "flow_prediction":
                for kind in ("epsilon", "sample", "v_prediction"):
                    self.check_over_configs(prediction_type=kind)

        def test_thresholding(self):
            self.check_over_configs(thresholding=True)
            self.check_over_configs(clip_sample=True)

        def test_full_loop(self):
            scheduler = PlanScheduler(**config)
            scheduler.set_timesteps(10)
            assert bool(torch.isfinite(full_loop(self, scheduler)).all())

        def test_full_loop_with_noise(self):
            scheduler = PlanScheduler(**config)
            scheduler.set_timesteps(10)
            sample = self.dummy_sample_deter
            late = scheduler.timesteps[5:]
            noisy = scheduler.add_noise(sample, self.dummy_noise_deter, late[:1])
            model, generator = self.dummy_model(), torch.manual_seed(0)
            for t in late:
                noisy = scheduler.step(model(noisy, t), t, noisy, generator=generator).prev_sample
            assert bool(torch.isfinite(noisy).all())

    Test.__name__ = Test.__qualname__ = f"Test{name}At{steps}"
    return Test


globals().update(
    {made.__name__: made for name, config in CASES.items() for made in [case(name, config, n) for n in NUMBERS.get(name, (25,))]}
)
