"""The solvers. Each turns a noise schedule and a time grid into a plan; `make_plan` finds them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike

from fewstep.artefacts import json_value
from fewstep.errors import UnknownNameError
from fewstep.grids import GridRule
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.solvers.adams import Adams
from fewstep.solvers.ancestral import DPM2Ancestral, DPMPP2SAncestral, EulerAncestral, FlowAncestral
from fewstep.solvers.compensated import CascadePolynomial, Compensated
from fewstep.solvers.consistency import LCM, TCD
from fewstep.solvers.ddim import DDIM
from fewstep.solvers.deis import DEIS, IPNDM
from fewstep.solvers.dpm import DPMSolver, DPMSolverPP, DPMSolverPPSinglestep, DPMSolverSinglestep
from fewstep.solvers.dpm_v3 import DPMSolverV3
from fewstep.solvers.dualfast import DualFast
from fewstep.solvers.edm import EDMEuler, EDMHeun
from fewstep.solvers.epsilon_scale import EpsilonScale
from fewstep.solvers.mixed import Mixed
from fewstep.solvers.pndm import PNDM
from fewstep.solvers.restart import Restart
from fewstep.solvers.runge_kutta import FlowRK, RhoRK
from fewstep.solvers.sa import SASolver
from fewstep.solvers.teleport import GaussianPrior, Teleport
from fewstep.solvers.time_shift import TimeShift
from fewstep.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "LCM",
    "PNDM",
    "SOLVERS",
    "TCD",
    "Adams",
    "CascadePolynomial",
    "Compensated",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverPPSinglestep",
    "DPMSolverSinglestep",
    "DPMSolverV3",
    "DualFast",
    "EDMEuler",
    "EDMHeun",
    "EpsilonScale",
    "EulerAncestral",
    "FlowAncestral",
    "FlowRK",
    "GaussianPrior",
    "Mixed",
    "Restart",
    "RhoRK",
    "SASolver",
    "Solver",
    "Teleport",
    "TimeShift",
    "UniPC",
    "make_plan",
    "make_solver",
    "solver_names",
]

SOLVERS: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "auto": (Adams, {"order": 2, "prediction": "flow", "corrector": "every"}),
    "ddim": (DDIM, {}),
    "ddpm": (DDIM, {"eta": 1.0}),
    "deis": (DEIS, {}),
    "deis_logrho": (DEIS, {"variable": "logrho"}),
    "deis_rho": (DEIS, {"variable": "rho"}),
    "dpm_2m": (DPMSolver, {"order": 2}),
    "dpm_2s": (DPMSolverSinglestep, {"order": 2}),
    "dpm_2s_ancestral": (DPM2Ancestral, {}),
    "dpm_3m": (DPMSolver, {"order": 3}),
    "dpm_3s": (DPMSolverSinglestep, {"order": 3}),
    "dpm_fast": (DPMSolverSinglestep, {"order": 3, "budget": "fast"}),
    "dpmpp": (DPMSolverPP, {}),
    "dpmpp_1": (DPMSolverPP, {"order": 1}),
    "dpmpp_2m": (DPMSolverPP, {"order": 2}),
    "dpmpp_2m_taylor": (DPMSolverPP, {"order": 2, "variant": "taylor"}),
    "dpmpp_2m_sde": (DPMSolverPP, {"order": 2, "eta": 1.0}),
    "dpmpp_1_sde": (DPMSolverPP, {"order": 1, "eta": 1.0}),
    "dpmpp_2s": (DPMSolverPPSinglestep, {"order": 2}),
    "dpmpp_2s_ancestral": (DPMPP2SAncestral, {}),
    "dpmpp_2s_sde": (DPMSolverPPSinglestep, {"order": 2, "eta": 1.0}),
    "dpmpp_3m": (DPMSolverPP, {"order": 3}),
    "dpmpp_3m_official": (DPMSolverPP, {"order": 3, "compat": "official"}),
    "dpmpp_3m_sde": (DPMSolverPP, {"order": 3, "eta": 1.0}),
    "dualfast": (DualFast, {"solver": DPMSolverPP(order=2)}),
    "unip_3": (UniPC, {"order": 3, "corrector": False}),
    "unipc": (UniPC, {}),
    "unipc_1": (UniPC, {"order": 1}),
    "unipc_2": (UniPC, {"order": 2, "shortcut": "bh2"}),
    "unipc_4": (UniPC, {"order": 4}),
    "unipc_noise": (UniPC, {"prediction": "noise"}),
    "euler_ancestral": (EulerAncestral, {}),
    "flow_adams": (Adams, {"order": 2, "prediction": "flow", "corrector": "every"}),
    "flow_adams_2": (Adams, {"order": 2, "prediction": "flow"}),
    "flow_adams_3": (Adams, {"order": 3, "prediction": "flow"}),
    "flow_euler": (FlowRK, {"kind": "euler"}),
    "flow_euler_ancestral": (FlowAncestral, {}),
    "flow_heun": (FlowRK, {"kind": "heun"}),
    "flow_midpoint": (FlowRK, {"kind": "midpoint"}),
    "flow_rk4": (FlowRK, {"kind": "rk4"}),
    "ipndm": (IPNDM, {}),
    "ipndm_3": (IPNDM, {"order": 3}),
    "lcm": (LCM, {}),
    "lms": (Adams, {}),
    "pndm": (PNDM, {}),
    "rho_heun": (RhoRK, {"kind": "heun"}),
    "rho_kutta3": (RhoRK, {"kind": "kutta3"}),
    "rho_midpoint": (RhoRK, {"kind": "midpoint"}),
    "rho_rk4": (RhoRK, {"kind": "rk4"}),
    "sa": (SASolver, {}),
    "tcd": (TCD, {}),
    "dpmpp_3s": (DPMSolverPPSinglestep, {"order": 3}),
    "dpmpp_3s_sde": (DPMSolverPPSinglestep, {"order": 3, "eta": 1.0}),
    "edm_euler": (EDMEuler, {}),
    "edm_heun": (EDMHeun, {}),
}
"""Name -> class and its options."""


def solver_names() -> list[str]:
    """The names that `make_plan` and the command line take, of solvers that need no statistics of the model.

    Example:
        >>> "dpmpp_2m" in solver_names()
        True
    """
    return sorted(SOLVERS)


def make_solver(name: str, **options: Any) -> Solver:
    """The solver of a name, with its options or others.

    Raises:
        UnknownNameError: for an unknown name, with the nearest one.
        TypeError: for an option it does not have.

    Example:
        >>> make_solver("dpmpp_3m").order
        3
    """
    if name not in SOLVERS:
        raise UnknownNameError("solver", name, SOLVERS, _names_of_class(name), listed="`fewstep solvers` or fewstep.solver_names()")
    solver, defaults = SOLVERS[name]
    known = [field.name for field in dataclasses.fields(solver)]  # type: ignore[arg-type]
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"{unknown[0]} is no option of the solver {name!r}, which has: {', '.join(sorted(known)) or 'none'}.")
    return solver(**{**defaults, **options})


def name_of(described: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The name of a solver and the options that are not those of the name; None if it has no name, or is around another solver.

    Args:
        described: as `Solver.described` or a plan's provenance tells it.

    Example:
        >>> name_of(make_solver("dpmpp_3m").described()), name_of(make_solver("unipc", order=2).described())
        (('dpmpp_3m', {}), ('unipc', {'order': 2}))
    """
    options = json_value(described.get("options") or {})
    of_class = [name for name, (solver, _) in SOLVERS.items() if solver.__name__ == described.get("name")]
    if not of_class or any(isinstance(value, Mapping) for value in options.values()):
        return None
    defaults = [make_solver(name).options() for name in of_class]
    changes = [{key: options[key] for key in known if key in options and options[key] != known[key]} for known in defaults]
    return min(zip(of_class, changes, strict=True), key=lambda found: len(found[1]))


def _names_of_class(name: object) -> str | None:
    """What to write for a class of this package that was given as a name."""
    names = [known for known, (solver, _) in SOLVERS.items() if solver.__name__.lower() == str(name).lower()]
    return f"{name} is a class; solvers of it are {', '.join(names)}." if names else None


def make_plan(
    name: str,
    schedule: NoiseSchedule,
    nfe: int | None = None,
    *,
    grid: str | GridRule | ArrayLike = "auto",
    start: float | None = None,
    final: str = "t_end",
    **options: Any,
) -> Plan:
    """A plan by the name of its solver.

    Args:
        name: see `solver_names`.
        schedule, nfe, grid, start, final: see `Solver.plan`.
        **options: of the solver, e.g. ``order=3``.

    Example:
        >>> from fewstep.schedules import EDM
        >>> make_plan("dpmpp_2m", EDM(), nfe=6, grid="karras").nfe
        6
    """
    return make_solver(name, **options).plan(schedule, nfe, grid, start=start, final=final)
