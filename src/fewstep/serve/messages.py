"""What requests and answers of the server look like. Unknown fields are refused; nothing here names a file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fewstep.errors import MissingExtraError
from fewstep.grids import grid_names
from fewstep.solvers import solver_names

try:
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    raise MissingExtraError("pydantic", "serve", "The server") from error

__all__ = ["Ask", "Failure", "ModelCard", "Nodes", "Pictures", "PlanAsk", "SamplesAsk", "State", "StreamAsk"]

MOST_SEEDS, MOST_CALLS, LONGEST_PROMPT, LONGEST_NAME = 1024, 1000, 4000, 200
"""Bounds that hold for every server; its own limits are lower."""

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Label = Annotated[int, Field(ge=0, le=1_000_000)]
Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
SolverName = Annotated[str, Field(max_length=LONGEST_NAME, json_schema_extra={"enum": [*solver_names()]})]
GridName = Annotated[str, Field(max_length=LONGEST_NAME, json_schema_extra={"enum": [*grid_names()]})]


class PlanAsk(BaseModel):
    """A plan, by its name or by what it is made of."""

    model_config = ConfigDict(extra="forbid")

    nfe: int | None = Field(None, ge=1, le=MOST_CALLS, description="network calls per sample; 10 when left out")
    solver: SolverName | None = Field(None, description='name of the solver; "auto" when left out')
    grid: GridName | None = Field(None, description='name of the time grid; "auto" when left out')
    final: Literal["zero", "t_end"] | None = Field(
        None, description='where to end: at noise level 0 ("zero", when left out) or where the schedule ends'
    )
    plan: str | None = Field(
        None, max_length=LONGEST_NAME, description="name of a plan that the server loaded, instead of nfe, solver, grid, final"
    )


class Ask(PlanAsk):
    """Samples that are asked for. Sample i depends on seed i, not on what else is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    guidance: float = Field(1.0, ge=0.0, le=100.0, allow_inf_nan=False, description="scale of classifier-free guidance; 1 is none")
    seed: Seed | None = Field(None, description="seed of the first sample, the others count on; 0 when left out")
    count: int | None = Field(None, ge=1, le=MOST_SEEDS, description="how many samples; 1 when left out")
    seeds: list[Seed] | None = Field(
        None, min_length=1, max_length=MOST_SEEDS, description="one seed a sample, instead of seed and count"
    )
    label: Label | list[Label] | None = Field(None, description="a class, or several in turn, of a model that has classes")
    prompt: Prompt | list[Prompt] | None = Field(None, description="a text, or several in turn, of a model that takes prompts")


class SamplesAsk(Ask):
    """Samples in one answer."""

    format: Literal["png", "json", "npy"] = Field(
        "png",
        description="one picture of all; JSON with a PNG of each (for samples that are no pictures, a .npy file); a .npy file",
    )


class StreamAsk(Ask):
    """Samples with what is on the way to them."""

    previews: int = Field(0, ge=0, le=MOST_CALLS, description="send the data prediction every so many calls; 0: none")


class Pictures(BaseModel):
    """Samples as JSON: pictures, or numbers where they are none."""

    id: str = Field(description="of the request")
    seeds: list[int]
    nfe: int = Field(description="network calls per sample")
    plan: str = Field(description="SHA-256 of the plan that was run")
    images: list[str] | None = Field(description="a PNG of each sample in base64; null if samples are no pictures")
    npy: str | None = Field(description="the samples, a .npy file in base64; null if they are pictures")


class Nodes(BaseModel):
    """A plan as it is drawn: the noise level of every state, and the times of the calls. null stands for infinity."""

    nfe: int
    digest: str = Field(description="SHA-256 of the plan")
    stochastic: bool
    grid: list[float] = Field(description="nfe + 1 times, of the states")
    tau: list[float] = Field(description="nfe times, handed to the network")
    lam: list[float | None] = Field(description="log(alpha / sigma) of the states")
    alpha: list[float]
    sigma: list[float]
    text: str = Field(description="the plan as a table for people")


class ModelCard(BaseModel):
    """What is served, and the limits."""

    name: str
    shape: list[int] = Field(description="of one sample")
    pictures: bool = Field(description="whether samples are pictures")
    classes: int | None = Field(description="number of classes, null if there are none")
    needs_class: bool = Field(description="whether a class must be given")
    prompts: bool = Field(description="whether it takes prompts, and then needs one")
    guidance: bool = Field(description="whether it can be guided")
    solvers: list[str]
    grids: list[str]
    plans: dict[str, int] = Field(description="plans by name, with their number of calls")
    limits: dict[str, Any] = Field(description="samples and calls a request, seconds to its answer, bytes of its body")


class State(BaseModel):
    """Whether the server lives, or takes requests."""

    status: Literal["alive", "dead", "stalled", "ready", "draining"]


class Failure(BaseModel):
    """What went wrong, in one line."""

    detail: str
