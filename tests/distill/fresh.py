"""Run in a process of its own: load what was saved, sample, and write the samples. ``python fresh.py FOLDER``."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.distill import Student


def main(place):
    torch.set_num_threads(1)
    given = load_file(place / "given.safetensors")
    made = {}
    if (place / "network").is_dir():
        student = Student.load(place / "network")
        for nfe in student.plans:
            made[f"network.{nfe}"] = student.sample(range(4), nfe=nfe, cond={"label": given["label"]})
    if (place / "adapter").is_dir():
        import diffusers

        student = Student.load(place / "adapter", fs.load(str(place / "base")))
        made["adapter"] = student.sample(range(2), nfe=2, cond={"prompt_embeds": given["prompt_embeds"]})
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(place / "base", safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(place / "adapter", weight_name="pytorch_lora_weights.safetensors")
        pipeline.scheduler = fs.diffusers.PlanScheduler.from_pretrained(place / "adapter" / "scheduler")
        made["pipeline"] = pipeline(
            prompt_embeds=given["prompt_embeds"],
            latents=given["latents"],
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    save_file({name: value.contiguous() for name, value in made.items()}, place / "made.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
