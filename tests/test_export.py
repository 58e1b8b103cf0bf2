"""Plans run elsewhere: the runners of the page on export, and the loop compiled, exported and captured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import fewstep as fs
from fewstep.cli import main
from fewstep.export import draws, table, unrolled
from fewstep.plan import Interval, Row, StartTransform

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
SHAPE = (3, 2)
SEEDS = range(4)
SCHEDULE = fs.schedules.VPLinear()


def runner(which):
    """The source of a runner of the page."""
    (found,) = re.findall(rf"<!-- runner:{which} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return found


def arrays():
    """A plan with all there can be: arrays of several shapes, memory, offsets, noise and a start transform."""
    rng = np.random.default_rng(0)
    rows = (
        Row(1.0, (rng.normal(size=(3, 1)),), (rng.normal(size=SHAPE),), 0.3, rng.normal(size=(2,)), noise=Interval(0.5, 1.0, 2.0)),
        Row(0.6, (0.7, rng.normal(size=(1, 2))), (0.2, -0.4), rng.normal(size=SHAPE), 1.1, (0.6,), offset=rng.normal(size=(3, 1))),
        Row(0.3, (0.0, 0.4), (0.5, 0.0, rng.normal(size=(3, 1))), offset=0.1, noise=Interval(rng.normal(size=SHAPE), 2.0, 5.0)),
    )
    basis, gains = rng.normal(size=(2, *SHAPE)), rng.normal(size=2)
    start = StartTransform(rng.normal(size=(3, 1)), rng.normal(size=SHAPE), basis, gains, 0.9)
    return fs.Plan(SCHEDULE, np.array([1.0, 0.6, 0.3, 0.001]), rows, start)


def block(which):
    """The source of a block of Python of the page, run."""
    (found,) = re.findall(rf"<!-- {which} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    scope = {}
    exec(compile(found, "docs/export.md", "exec"), scope)
    return scope


def plan_of(name):
    if name == "arrays":
        return arrays()
    if name == "teleport":
        prior = fs.solvers.GaussianPrior(np.full(SHAPE, 0.2), np.eye(6).reshape(6, *SHAPE), np.linspace(0.1, 0.6, 6))
        return fs.solvers.Teleport(fs.solvers.UniPC(), prior, to=0.7).plan(SCHEDULE, 4)
    return fs.make_plan(name, SCHEDULE, 7, final="zero")


def denoiser(x, t):
    return 0.6 * torch.tanh(x) + 0.2 * float(SCHEDULE.sigma(t)) - 0.1 * float(SCHEDULE.alpha(t)) * x


def noise_of(plan):
    return fs.draw_noise(SHAPE, SEEDS, plan, dtype=torch.float64)


def expected(plan):
    return fs.sample(denoiser, noise_of(plan), plan, seeds=SEEDS).numpy()


@pytest.mark.parametrize("name", ["arrays", "teleport", *cases.SOLVERS])
def test_the_runner_in_numpy(name):
    plan, scope = plan_of(name), block("runner:numpy")
    known = json.loads(json.dumps(table(plan)))

    def denoise(x, step):
        return 0.6 * np.tanh(x) + 0.2 * step["sigma"] - 0.1 * step["alpha"] * x

    xi = draws(plan, SEEDS, SHAPE, dtype=torch.float64).numpy()
    found = scope["run"](known, denoise, noise_of(plan).numpy(), xi)
    np.testing.assert_allclose(found, expected(plan), rtol=1e-10, atol=1e-10)


TABLE = fs.schedules.FromBetas(np.linspace(1e-4, 0.02, 1000))


@pytest.mark.parametrize("schedule", [TABLE, SCHEDULE], ids=["table", "continuous"])
@pytest.mark.parametrize("name", ["auto", "unipc", "edm_heun"])
def test_the_page_asks_a_network_at_its_own_time(schedule, name):
    """A table's network is told its index, in the page's denoiser and in ours."""
    plan = fs.make_plan(name, schedule, 6, final="zero")
    den = fs.Denoiser(lambda x, time: torch.tanh(x) * torch.cos(time / 300)[:, None, None], schedule)
    scope = block("denoise:numpy")
    scope["network"] = lambda x, time: np.tanh(x) * np.cos(time / 300)
    known, noise = json.loads(json.dumps(table(plan))), noise_of(plan)
    found = block("runner:numpy")["run"](known, scope["denoise"], noise.numpy())
    np.testing.assert_allclose(found, fs.sample(den, noise, plan).numpy(), rtol=1e-10, atol=1e-10)


def test_the_network_time_of_a_table_is_its_index():
    plan = fs.make_plan("ddim", TABLE, 4)
    assert table(plan)["steps"][0]["network_time"] == 999.0
    assert [step["network_time"] for step in table(plan)["steps"]] == TABLE.network_time(plan.tau).tolist()
    flow = fs.make_plan("ddim", fs.schedules.Flow(), grid=[1.0, 0.25, 0.0])
    assert [step["network_time"] for step in table(flow)["steps"]] == [1.0, 0.25]
    assert [step["network_time"] for step in table(flow, network_time=lambda t: 1000 * t)["steps"]] == [1000.0, 250.0]


HARNESS = """
import { readFileSync } from "node:fs";
import { run } from "./runner.mjs";
const { plans } = JSON.parse(readFileSync(process.argv[2]));
const results = {};
for (const [name, { plan, noise, xi }] of Object.entries(plans)) {
  const denoise = async (x, step) => Float64Array.from(x, (v) => 0.6 * Math.tanh(v) + 0.2 * step.sigma - 0.1 * step.alpha * v);
  results[name] = [];
  for (const [b, x] of noise.entries()) results[name].push(Array.from(await run(plan, denoise, x, xi.map((step) => step[b]))));
}
console.log(JSON.stringify(results));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_runner_in_javascript(tmp_path):
    plans = {name: plan_of(name) for name in ("arrays", "teleport", *cases.SOLVERS)}
    given = {
        name: {
            "plan": table(plan, SHAPE),
            "noise": noise_of(plan).flatten(1).tolist(),
            "xi": draws(plan, SEEDS, SHAPE, dtype=torch.float64).flatten(2).tolist(),
        }
        for name, plan in plans.items()
    }
    (tmp_path / "runner.mjs").write_text(runner("javascript"), encoding="utf-8")
    (tmp_path / "harness.mjs").write_text(HARNESS, encoding="utf-8")
    (tmp_path / "plans.json").write_text(json.dumps({"plans": given}), encoding="utf-8")
    command = ["node", str(tmp_path / "harness.mjs"), str(tmp_path / "plans.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 40
    for name, plan in plans.items():
        np.testing.assert_allclose(np.reshape(found[name], (4, *SHAPE)), expected(plan), rtol=1e-10, atol=1e-10, err_msg=name)


def test_the_runners_are_short():
    assert len([line for line in runner("numpy").splitlines() if line.strip()]) <= 30
    assert len([line for line in runner("javascript").splitlines() if line.strip()]) <= 32


def test_a_table_reads_back_bit_for_bit():
    plan = arrays()
    found = json.loads(json.dumps(table(plan)))
    assert found["digest"] == plan.digest
    assert [step["tau"] for step in found["steps"]] == plan.tau.tolist()
    array = plan.rows[0].carry[0]
    assert np.array_equal(np.reshape(found["steps"][0]["carry"][0]["data"], array.shape), array)
    assert found["noise"]["sigma"] == float(SCHEDULE.sigma(0.9))
    full = table(plan, SHAPE)
    assert full["steps"][0]["carry"][0]["shape"] == list(SHAPE)
    with pytest.raises(fs.FewstepError, match="do not fit samples of"):
        table(plan, (5, 7))


def test_from_the_command_line(tmp_path, capsys):
    file, out = tmp_path / "plan.safetensors", tmp_path / "plan.json"
    arrays().save(file)
    assert main(["plan", "export", str(file), str(out), "--shape", "3,2"]) == 0
    assert json.loads(out.read_text()) == json.loads(json.dumps(table(arrays(), SHAPE)))
    assert main(["plan", "export", str(file), str(out), "--shape", "3x2"]) == 2
    assert "--shape takes whole numbers" in capsys.readouterr().err


# ---- in torch ----------------------------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """A small network with a condition."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.classes = torch.nn.Linear(2, 2), torch.nn.Embedding(5, 2)

    def forward(self, x, t, label):
        return torch.tanh(self.inner(x)) * torch.cos(t)[:, None, None] + self.classes(label)[:, None]


@pytest.fixture
def model():
    return fs.Denoiser(Network(), SCHEDULE, predicts="velocity")


LABEL = torch.tensor([0, 1, 2, 3])
SOME = ["arrays", "teleport", "ddim", "unipc", "auto", "edm_heun", "dpmpp_2m_sde", "dualfast"]


def run(model, name):
    """The plan, the arguments of its module and the samples of the loop."""
    plan = plan_of(name)
    noise = noise_of(plan).float()
    with torch.no_grad():
        wanted = fs.sample(model, noise, plan, cond={"label": LABEL}, seeds=SEEDS)
    inputs = (noise, draws(plan, SEEDS, SHAPE)) if plan.stochastic else (noise,)
    return plan, inputs, wanted


@pytest.mark.parametrize("name", ["arrays", "teleport", *cases.SOLVERS])
@torch.no_grad()
def test_the_module_gives_the_samples_of_the_loop(model, name):
    plan, inputs, wanted = run(model, name)
    found = unrolled(plan, model, SHAPE)(*inputs, cond={"label": LABEL})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_compiled_as_one_graph(model, name):
    plan, inputs, wanted = run(model, name)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(unrolled(plan, model, SHAPE), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(*inputs, cond={"label": LABEL}), wanted, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_exported(model, name, tmp_path):
    plan, inputs, wanted = run(model, name)
    program = torch.export.export(unrolled(plan, model, SHAPE), inputs, {"cond": {"label": LABEL}}, strict=False)
    torch.export.save(program, tmp_path / "sampler.pt2")
    again = torch.export.load(tmp_path / "sampler.pt2").module()
    torch.testing.assert_close(again(*inputs, cond={"label": LABEL}), wanted, rtol=1e-5, atol=1e-6)
    assert {name.split(".", 1)[1] for name in program.state_dict if name.startswith("network.")} == set(model.network.state_dict())


@torch.no_grad()
def test_exported_for_any_batch(model):
    plan, (noise,), _ = run(model, "unipc")
    batch = torch.export.Dim("batch", min=2)
    shapes = {"noise": {0: batch}, "cond": {"label": {0: batch}}}
    program = torch.export.export(
        unrolled(plan, model, SHAPE), (noise,), {"cond": {"label": LABEL}}, strict=False, dynamic_shapes=shapes
    ).module()
    other = torch.cat([noise, noise[:3] + 0.5])
    label = torch.cat([LABEL, LABEL[:3]])
    torch.testing.assert_close(
        program(other, cond={"label": label}), fs.sample(model, other, plan, cond={"label": label}), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_a_guided_denoiser(model):
    guided = fs.guidance.ClassifierFree(model, 3.0, {"label": 4})
    plan, inputs, wanted = run(guided, "unipc")
    module = unrolled(plan, guided, SHAPE)
    torch.testing.assert_close(module(*inputs, cond={"label": LABEL}), wanted, rtol=1e-5, atol=1e-6)
    program = torch.export.export(module, inputs, {"cond": {"label": LABEL}}, strict=False).module()
    torch.testing.assert_close(program(*inputs, cond={"label": LABEL}), wanted, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, cond={"label": LABEL}), wanted, rtol=1e-5, atol=1e-6)


def test_gradients_pass(model):
    plan, (noise,), _ = run(model, "dpmpp_2m")
    noise = noise.requires_grad_()
    (found,) = torch.autograd.grad(unrolled(plan, model, SHAPE)(noise, cond={"label": LABEL}).square().sum(), noise)
    (wanted,) = torch.autograd.grad(fs.sample(model, noise, plan, cond={"label": LABEL}).square().sum(), noise)
    torch.testing.assert_close(found, wanted)


def test_a_module_refuses(model):
    plan = plan_of("ddpm")
    with pytest.raises(fs.FewstepError, match="pass xi="):
        unrolled(plan, model, SHAPE)(noise_of(plan).float(), cond={"label": LABEL})
    with pytest.raises(fs.FewstepError, match="made for"):
        unrolled(fs.make_plan("ddim", fs.schedules.EDM(), 3), model, SHAPE)
    with pytest.raises(fs.FewstepError, match="do not fit samples"):
        unrolled(arrays(), model, (5, 7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("name", [name for name in SOME if name not in ("arrays", "teleport")])
@torch.no_grad()
def test_captured_in_a_cuda_graph(name):
    model = fs.Denoiser(Network().cuda(), SCHEDULE, predicts="velocity")
    plan = plan_of(name)
    noise, label = noise_of(plan).float().cuda(), LABEL.cuda()
    wanted = fs.sample(model, noise, plan, cond={"label": label}, seeds=SEEDS)
    module, buffer = unrolled(plan, model, SHAPE, device="cuda"), torch.zeros_like(noise)
    inputs = (buffer, draws(plan, SEEDS, SHAPE).cuda()) if plan.stochastic else (buffer,)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(*inputs, cond={"label": label})
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples = module(*inputs, cond={"label": label})
    buffer.copy_(noise)
    graph.replay()
    torch.testing.assert_close(samples, wanted, rtol=1e-5, atol=1e-5)
