"""The server as a deployment of Ray Serve: replicas of it, each with an engine and a model of its own, behind Ray's proxy.

    from ray import serve
    from fewstep.serve.ray_serve import deployment
    serve.run(deployment("digits", replicas=2))

What is asked and answered is the same as of `fewstep serve`. A sample depends on its seed alone, so it does not matter which replica makes
it. An id names a request of one replica: to cancel one of several, hang up. Each replica counts its own figures for ``/metrics``; Ray has
those of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewstep.errors import MissingExtraError
from fewstep.serve.engine import Engine
from fewstep.serve.settings import Settings
from fewstep.serve.students import load_served

__all__ = ["Replica", "deployment"]


class Replica:
    """The server of `fewstep.serve.http.make_app` with its engine, which ends when the server does. An ASGI application.

    Args:
        model: what `fewstep.load` takes, or a student's folder.
        settings: plans, token and limits.
        engine: options of `fewstep.serve.Engine`: rows, waiting, scheduler.
        device: where the network runs.
    """

    def __init__(self, model: str, settings: Settings, engine: Mapping[str, Any], device: str = "cpu"):
        from fewstep.serve.http import make_app
        from fewstep.serve.metrics import Metrics, Watched
        from fewstep.serve.served import ServedModel

        served, metrics = ServedModel.of(load_served(model, device=device)), Metrics()
        denoiser = Watched(served.denoiser, metrics)
        self.settings = settings
        self.engine = Engine(denoiser, served.info.shape, null=served.null, device=device, **engine)
        self.server = make_app(self.engine, settings, model=served, metrics=metrics)

    @property
    def alive(self) -> bool:
        """Whether the engine can run anything."""
        return self.server.state.service.alive

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A request; or the server's begin and end."""
        if scope["type"] != "lifespan":
            await self.server(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    def close(self) -> None:
        """End the engine; requests that still run are cancelled."""
        self.server.state.service.draining = True
        self.engine.close(drain=False, timeout=self.settings.drain)
        self.server.state.service.close()


def deployment(
    model: str = "digits",
    settings: Settings | None = None,
    *,
    replicas: int = 1,
    rows: int = 64,
    waiting: int = 256,
    scheduler: str = "fifo",
    device: str = "cpu",
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """An application for ``ray.serve.run``.

    Args:
        model: what `fewstep.load` takes, or a student's folder; every machine must have it under this name.
        settings: plans, token and limits, of every replica.
        replicas: how many servers, each with its model in memory.
        rows, waiting, scheduler: of every engine; see `fewstep.serve.Engine`.
        device: where the networks run; ``"cuda"`` with ``gpus=1``.
        cpus, gpus: what Ray reserves for a replica.

    Returns:
        a ``ray.serve.Application``.

    Raises:
        MissingExtraError: if Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("Ray Serve", "scale", "A deployment") from error
    own, engine = settings or Settings(), {"rows": rows, "waiting": waiting, "scheduler": scheduler}

    def build() -> Replica:
        torch.set_num_threads(max(1, int(cpus)))
        return Replica(model, own, engine, device)

    @serve.ingress(build)
    class Served:
        def check_health(self) -> None:
            """Ray asks this, and replaces a replica that raises."""
            if not self.app.alive:  # type: ignore[attr-defined]  # of Ray's wrapper
                raise RuntimeError("the engine of this replica has ended.")

    made = serve.deployment(
        Served,
        name="fewstep",
        num_replicas=replicas,
        max_ongoing_requests=rows + waiting,  # the engine refuses what is too much, with 503 and when to come again
        graceful_shutdown_timeout_s=own.drain,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    return made.bind()  # type: ignore[attr-defined]
