"""Sample from a network of your own, save the plan, and see how far from the exact solution it is.

    python examples/sample.py            # the digits model that comes along
    python examples/sample.py --smoke    # fewer samples, for a quick try

Prints the error of DPM-Solver++ 2M at several numbers of network calls, and how many calls DDIM needs for the same.
"""

from __future__ import annotations

import argparse

import torch

import fewstep as fs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer samples")
    count = 4 if parser.parse_args().smoke else 40

    # Your own network goes here: any callable network(x, t, **cond), its noise schedule, and what it predicts.
    shipped = fs.load("digits")
    den = fs.Denoiser(shipped.network, fs.schedules.VPLinear(), predicts=shipped.predicts)
    cond = {"label": torch.arange(count) % 10}

    noise = fs.draw_noise((1, 8, 8), seeds=range(count))
    with torch.no_grad():
        exact = fs.reference(den, noise, den.schedule, tol=1e-3, cond=cond)
        print(f"exact solution: {exact.nfe} calls, known to within {exact.error:.1e}")
        errors = {}
        for nfe in (4, 6, 8, 10, 15, 20):
            for solver in ("ddim", "dpmpp_2m"):
                plan = fs.make_plan(solver, den.schedule, nfe=nfe)
                x = fs.sample(den, noise, plan, cond=cond)
                errors[solver, nfe] = float((x - exact).square().mean().sqrt())
            print(f"{nfe:>3} calls: DDIM {errors['ddim', nfe]:.4f}   DPM-Solver++ 2M {errors['dpmpp_2m', nfe]:.4f}")

    goal = errors["ddim", 20]
    enough = min(nfe for (solver, nfe), error in errors.items() if solver == "dpmpp_2m" and error <= goal)
    print(f"DPM-Solver++ 2M with {enough} calls is as close as DDIM with 20.")


if __name__ == "__main__":
    main()
