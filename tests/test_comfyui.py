"""The custom-node folder of ComfyUI, within a stand-in of what it touches and, where FEWSTEP_COMFYUI names a checkout, within ComfyUI.

The stand-in is ours: the same names, and a call of the same arguments in the same order.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fewstep as fs

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "integrations" / "comfyui"
SIGMAS = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.4, 0.1, 0.0])
FLOW_SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])


class Const:
    """Stands for flow models' sampling."""

    sigma_max = 1.0

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1.0 - sigma) * latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1.0 - sigma)


class Eps:
    """Stands for that of noise-predicting models."""

    sigma_max = 14.6

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return noise * (torch.sqrt(1.0 + sigma**2) if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class Guider:
    """The model as a sampler function finds it, two levels down; data of one Gaussian."""

    def __init__(self, model_sampling):
        self.inner_model = types.SimpleNamespace(model_sampling=model_sampling)
        self.calls = 0

    def get_model_object(self, name):
        return getattr(self.inner_model, name)

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.calls += 1
        sigma = sigma.reshape(-1, 1, 1, 1)
        alpha = 1.0 - sigma if isinstance(self.inner_model.model_sampling, Const) else torch.ones_like(sigma)
        return 0.5 + alpha * 0.04 / (alpha**2 * 0.04 + sigma**2) * (x - 0.5 * alpha)


@pytest.fixture
def comfy(monkeypatch):
    """Modules of the names that the nodes import."""
    package, samplers, sampling_of_models, k_diffusion, sampling = (
        types.ModuleType(name)
        for name in ("comfy", "comfy.samplers", "comfy.model_sampling", "comfy.k_diffusion", "comfy.k_diffusion.sampling")
    )

    class Masked:
        def __init__(self, model, sigmas):
            self.inner_model, self.sigmas = model, sigmas

        def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)

    class KSAMPLER:
        def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
            self.sampler_function, self.extra_options = sampler_function, extra_options or {}

        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            extra_args["denoise_mask"] = denoise_mask
            kind, total = wrap.inner_model.model_sampling, len(sigmas) - 1
            x = kind.noise_scaling(sigmas[0], noise, latent_image, float(sigmas[0]) >= kind.sigma_max)
            told = None if callback is None else lambda at: callback(at["i"], at["denoised"], at["x"], total)
            given = {"extra_args": extra_args, "callback": told, "disable": disable_pbar}
            x = self.sampler_function(Masked(wrap, sigmas), x, sigmas, **given, **self.extra_options)
            return kind.inverse_noise_scaling(sigmas[-1], x)

    samplers.KSAMPLER_NAMES = ["euler"]
    samplers.SAMPLER_NAMES = [*samplers.KSAMPLER_NAMES, "ddim"]
    samplers.KSampler = type("KSampler", (), {"SAMPLERS": samplers.SAMPLER_NAMES})
    samplers.KSAMPLER = KSAMPLER
    samplers.ksampler = lambda name: KSAMPLER(getattr(sampling, f"sample_{name}"))
    sampling_of_models.CONST = Const
    package.samplers, package.model_sampling, package.k_diffusion, k_diffusion.sampling = (
        samplers,
        sampling_of_models,
        k_diffusion,
        sampling,
    )
    for module in (package, samplers, sampling_of_models, k_diffusion, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


@pytest.fixture
def nodes(comfy, monkeypatch):
    """The folder, loaded as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location("fewstep_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fewstep_nodes", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("fewstep_nodes.nodes", None)


def run(sampler, guider, sigmas, seen=None):
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    extra = {"model_options": {}, "seed": 5}
    callback = None if seen is None else lambda *told: seen.append(told)
    return sampler.sample(guider, sigmas, extra, callback, noise, torch.zeros_like(noise), None, True)


def test_every_solver_is_registered_once(comfy, nodes):
    names = [f"fewstep_{name}" for name in fs.solver_names()]
    assert len(names) > 40
    again = sys.modules["fewstep_nodes.nodes"].register()
    assert again == names
    assert ["euler", "ddim", *names] == comfy.samplers.SAMPLER_NAMES
    assert ["euler", *names] == comfy.samplers.KSAMPLER_NAMES


@pytest.mark.parametrize("model_sampling", [Eps(), Const()])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "dpmpp_2m_sde", "edm_heun"])
def test_registered_names_sample(comfy, nodes, name, model_sampling):
    sigmas, seen, guider = FLOW_SIGMAS if isinstance(model_sampling, Const) else SIGMAS, [], Guider(model_sampling)
    out = run(comfy.samplers.ksampler(f"fewstep_{name}"), guider, sigmas, seen)
    assert [(i, total) for i, _, _, total in seen] == [(i, 6) for i in range(6)]
    from_pure_noise = isinstance(model_sampling, Const)  # where a step of EDM has one stage, as into sigma = 0
    assert guider.calls == ((10 if from_pure_noise else 11) if name == "edm_heun" else 6)
    assert abs(float(out.mean()) - 0.5) < 0.1  # 128 numbers of deviation 0.2
    (node,) = nodes.NODE_CLASS_MAPPINGS["FewstepSampler"]().get_sampler(name)
    assert torch.equal(run(node, Guider(model_sampling), sigmas), out)


def test_the_node_takes_options(nodes):
    node = nodes.NODE_CLASS_MAPPINGS["FewstepSampler"]
    solvers, settings = node.INPUT_TYPES()["required"]["solver"]
    assert settings["default"] in solvers
    (plain,), (without,) = node().get_sampler("dpmpp_2m"), node().get_sampler("dpmpp_2m_sde", '{"eta": 0.0}')
    torch.testing.assert_close(run(plain, Guider(Eps()), SIGMAS), run(without, Guider(Eps()), SIGMAS))


@pytest.mark.parametrize(
    ("schedule", "model_sampling"), [(fs.schedules.VPLinear(), Eps()), (fs.schedules.Flow(shift=3.0), Const())]
)
def test_a_plan_file(nodes, tmp_path, schedule, model_sampling):
    plan = fs.make_plan("unipc", schedule, 6, final="zero")
    plan.save(tmp_path / "plan.safetensors")
    guider = Guider(model_sampling)
    sampler, sigmas = nodes.NODE_CLASS_MAPPINGS["FewstepPlan"]().get_sampler(guider, str(tmp_path / "plan.safetensors"))
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == 7
    out = run(sampler, guider, sigmas)
    assert guider.calls == 6
    assert abs(float(out.mean()) - 0.5) < 0.1
    with pytest.raises(fs.FewstepError, match="hand it the plan's own noise levels"):
        run(sampler, guider, sigmas[1:])


REAL = """
import importlib.abc, importlib.machinery, sys
from unittest import mock

class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Libraries of ComfyUI that sampling does not use and this Python does not have."
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if top in ABSENT else None
    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module
    def exec_module(self, module):
        pass

import importlib.util
ABSENT = {name for name in ("torchvision", "torchaudio", "av", "psutil", "spandrel", "kornia", "comfy_aimdo", "comfy_kitchen",
    "comfy_quants", "transformers", "tokenizers", "sentencepiece", "aiohttp", "yaml", "alembic", "sqlalchemy", "pydantic", "einops",
    "torchsde", "trampoline") if importlib.util.find_spec(name) is None}
sys.meta_path.append(Absent())
sys.path[:0] = [sys.argv[1]]
folder, sys.argv = sys.argv[2], ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.samplers, comfy.model_sampling, comfy.k_diffusion.sampling as sampling

spec = importlib.util.spec_from_file_location("fewstep_nodes", folder + "/__init__.py", submodule_search_locations=[folder])
nodes = importlib.util.module_from_spec(spec)
sys.modules["fewstep_nodes"] = nodes
spec.loader.exec_module(nodes)
import fewstep as fs

names = ["fewstep_" + name for name in fs.solver_names()]
assert all(name in comfy.samplers.KSampler.SAMPLERS and name in comfy.samplers.SAMPLER_NAMES for name in names)

class Base:
    def __init__(self, kind):
        self.model_sampling = kind()
        self.flow = isinstance(self.model_sampling, comfy.model_sampling.CONST)
    def scale_latent_inpaint(self, **kwargs):
        raise NotImplementedError

class Guider:
    def __init__(self, inner):
        self.inner_model, self.model_patcher = inner, None
    def __call__(self, x, sigma, model_options={}, seed=None):
        s = sigma.reshape(-1, 1, 1, 1)
        alpha = 1.0 - s if self.inner_model.flow else torch.ones_like(s)
        return 0.5 + alpha * 0.04 / (alpha**2 * 0.04 + s**2) * (x - 0.5 * alpha)

flow = type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})
eps = type("Eps", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {})
for kind in (eps, flow):
    base = Base(kind)
    sigmas = comfy.samplers.calculate_sigmas(base.model_sampling, "simple", 8)
    def run(name):
        seen, noise = [], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        told = lambda *a: seen.append(a)
        sampler = comfy.samplers.sampler_object(name)
        out = sampler.sample(Guider(base), sigmas, {"model_options": {}, "seed": 3}, told, noise, torch.zeros_like(noise), None, True)
        assert [(a[0], a[3]) for a in seen] == [(i, 8) for i in range(8)], name
        return out
    for name in names:
        assert abs(float(run(name).mean()) - 0.5) < 0.1, name
    pairs = {"euler": "ddim", "heun": "flow_heun" if kind is flow else "edm_heun"}
    pairs |= {} if kind is flow else {"dpmpp_2m": "dpmpp_2m", "dpm_2": "dpm_2s"}
    for theirs, ours in pairs.items():
        error = float((run(theirs) - run("fewstep_" + ours)).abs().max())
        assert error < 1e-5, (theirs, error)
    (sampler,) = nodes.NODE_CLASS_MAPPINGS["FewstepSampler"]().get_sampler("unipc")
    assert isinstance(sampler, comfy.samplers.KSAMPLER)
print("ALL WELL", len(names))
"""


@pytest.mark.skipif("FEWSTEP_COMFYUI" not in os.environ, reason="FEWSTEP_COMFYUI names no checkout of ComfyUI")
def test_in_comfyui_itself():
    path = os.environ["FEWSTEP_COMFYUI"]
    done = subprocess.run([sys.executable, "-c", REAL, path, str(FOLDER)], capture_output=True, text=True, cwd=path, check=False)
    assert f"ALL WELL {len(fs.solver_names())}" in done.stdout, done.stderr[-3000:]
