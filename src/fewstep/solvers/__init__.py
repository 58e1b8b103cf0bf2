"""The solvers. Each turns a noise schedule and a time grid into a plan; `make_plan` finds them by name."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from fewstep.errors import UnknownNameError
from fewstep.grids import GridRule
from fewstep.plan import Plan
from fewstep.schedules import NoiseSchedule
from fewstep.solver import Solver
from fewstep.solvers.ddim import DDIM
from fewstep.solvers.dpm import DPMSolver, DPMSolverPP, DPMSolverPPSinglestep, DPMSolverSinglestep
from fewstep.solvers.edm import EDMEuler, EDMHeun

__all__ = [
    "DDIM",
    "SOLVERS",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverPPSinglestep",
    "DPMSolverSinglestep",
    "EDMEuler",
    "EDMHeun",
    "Solver",
    "make_plan",
    "make_solver",
    "solver_names",
]

SOLVERS: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "auto": (DPMSolverPP, {"order": 2}),
    "ddim": (DDIM, {}),
    "ddpm": (DDIM, {"eta": 1.0}),
    "dpm_2m": (DPMSolver, {"order": 2}),
    "dpm_2s": (DPMSolverSinglestep, {"order": 2}),
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
    "dpmpp_2s_sde": (DPMSolverPPSinglestep, {"order": 2, "eta": 1.0}),
    "dpmpp_3m": (DPMSolverPP, {"order": 3}),
    "dpmpp_3m_official": (DPMSolverPP, {"order": 3, "compat": "official"}),
    "dpmpp_3m_sde": (DPMSolverPP, {"order": 3, "eta": 1.0}),
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
        raise UnknownNameError("solver", name, SOLVERS)
    solver, defaults = SOLVERS[name]
    return solver(**{**defaults, **options})


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
