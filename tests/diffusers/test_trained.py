"""A network of diffusers, trained: its pipeline with `PlanScheduler`, loaded from its folder, checked and tuned."""

import numpy as np
import pytest
import torch
from torch.nn import functional

diffusers = pytest.importorskip("diffusers", minversion="0.32")
datasets = pytest.importorskip("sklearn.datasets")

import fewstep as fs  # noqa: E402
from fewstep.diffusers import PlanScheduler  # noqa: E402
from fewstep.tuners import Effort  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
STEPS, BATCH, SEEDS = 400, 64, range(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a pipeline of 8 x 8 digits, a minute of training."""
    torch.manual_seed(0)
    data = images()
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    for _ in range(STEPS):
        x0 = data[torch.randint(len(data), (BATCH,))]
        noise, t = torch.randn_like(x0), torch.randint(1000, (BATCH,))
        loss = functional.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unet.eval()
    place = tmp_path_factory.mktemp("trained") / "digits"
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler.from_config(scheduler.config)).save_pretrained(place)
    return place


def images():
    return torch.from_numpy(datasets.load_digits().images).float()[:, None] / 8.0 - 1.0


def samples(pipe, steps=8):
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=8, num_inference_steps=steps, generator=torch.manual_seed(0), output_type="np").images


def test_network_is_read_rightly(folder):
    report = fs.check(fs.load(folder), images()[:256])
    assert report.ok, str(report)
    assert report.score < -0.2


@pytest.mark.parametrize(
    ("peer", "options", "ours"),
    [
        (diffusers.DDIMScheduler, {}, {"solver": "ddim"}),
        (diffusers.DPMSolverMultistepScheduler, {}, {"solver": "dpmpp_2m", "lower_order_final": 15}),
        (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {"solver": "dpmpp_2m", "lower_order_final": 15}),
    ],
)
def test_same_images_as_the_peer(folder, peer, options, ours):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    host = peer.from_config(pipe.scheduler.config, **options)
    pipe = diffusers.DDPMPipeline(pipe.unet, host)
    wanted = samples(pipe)
    pipe.scheduler = PlanScheduler.from_config(host.config, **ours)
    assert np.abs(samples(pipe) - wanted).max() < 1e-4


def test_tuned_plan_is_better_and_the_same_in_the_pipeline(folder):
    den = fs.load(folder)
    noise = fs.draw_noise(den.info.shape, SEEDS)
    tuned = fs.tune(den, nfe=5, noise=noise, final="zero", effort=Effort(trajectories=32, held_out=64, pool=2))
    other = fs.draw_noise(den.info.shape, range(1000, 1128))
    exact = fs.tuners.trace_paths(den, other, den.schedule, calls=64, final="zero").target
    errors = [float((fs.sample(den, other, plan) - exact).square().mean()) for plan in (tuned.plan, tuned.candidates[5][0].plan)]
    assert errors[0] < 0.7 * errors[1]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = PlanScheduler.from_plan(tuned.plan, pipe.scheduler.config)
    state = other[:8]
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipe.unet(scheduler.scale_model_input(state, t), t).sample
        state = scheduler.step(output, t, state).prev_sample
    assert float((state - fs.sample(den, other[:8], tuned.plan)).abs().max()) < 1e-3
