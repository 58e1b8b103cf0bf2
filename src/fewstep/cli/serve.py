"""``fewstep serve``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

from fewstep.cli.options import Common, option

SCHEDULERS = ("fifo", "shortest-remaining", "maxweight", "softmw", "ssmw")


@dataclass(frozen=True)
class ServeOptions(Common):
    """Options of the command."""

    model: str = option(
        "digits",
        "a shipped model (digits, photos), a model folder or a diffusers pipeline (folder, id of the hub)",
        positional=True,
    )
    plans: str = option("", "a folder of plans, which requests name by their files' names without .safetensors")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every one of this machine")
    port: int = option(8000, "port to listen on; 0 for any that is free")
    token: str = option(
        "", "what requests must bring as a bearer token; or in the variable FEWSTEP_TOKEN, which no list of processes shows"
    )
    scheduler: str = option("fifo", "which waiting samples get free rows", choices=SCHEDULERS)
    rows: int = option(64, "rows of a network call at most; a guided sample takes two")
    waiting: int = option(256, "samples that may wait; requests beyond are answered with 503")
    samples: int = option(64, "samples a request at most")
    calls: int = option(100, "network calls a sample at most")
    timeout: float = option(60.0, "seconds to the answer of a request")
    drain: float = option(30.0, "seconds that running requests have when the server is told to stop")
    stall: float = option(120.0, "seconds without a finished network call, while work waits, after which /health answers 503")
    per_client: int = option(0, "requests of one address that run at a time; 0 for any number")
    negative: str = option(None, "text that guidance leads away from, of a pipeline with prompts")
    size: str = option("", "of a pipeline's pictures in pixels: 512x512 (height, width), 64; of videos with frames, 480x832x81")


OPTIONS = {"serve": ServeOptions}


def run(options: ServeOptions) -> int:
    """Serve a model until a signal comes."""
    from fewstep.cli.parsing import parse_size

    if min(options.rows, options.waiting) < 1 or not 0 <= options.port <= 65535:
        raise ValueError("--rows and --waiting must be at least 1, --port from 0 to 65535.")
    if options.size:
        parse_size(options.size)
    from fewstep.cli.setup import open_model, state_dtype
    from fewstep.serve.settings import Settings, load_plans

    plans, others = load_plans(options.plans) if options.plans else ({}, [])
    if others and not options.quiet:
        print(f"in {options.plans} are no plans, and not served: {', '.join(others)}", file=sys.stderr)
    settings = Settings(
        plans=plans,
        token=options.token or os.environ.get("FEWSTEP_TOKEN") or None,
        samples=options.samples,
        calls=options.calls,
        timeout=options.timeout,
        drain=options.drain,
        per_client=options.per_client,
        stall=options.stall,
    )
    from fewstep.serve.engine import Engine
    from fewstep.serve.http import make_app
    from fewstep.serve.metrics import Metrics, Watched
    from fewstep.serve.process import listen, serve
    from fewstep.serve.served import ServedModel

    listen(options.host, options.port).close()  # what cannot be had is told before a model is opened
    model = ServedModel.of(open_model(options.model, options, every=True), negative=options.negative)
    metrics = Metrics()
    listening = listen(options.host, options.port)
    engine = Engine(
        Watched(model.denoiser, metrics),
        model.info.shape,
        null=model.null,
        rows=options.rows,
        scheduler=options.scheduler,
        waiting=options.waiting,
        device=options.device,
        dtype=state_dtype(options),
    )
    host, port = listening.getsockname()[:2]  # the port that was had, if any would do

    def started() -> None:
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        if options.json:
            print(json.dumps({"url": place, "model": model.info.name, "plans": sorted(settings.plans)}), flush=True)
        elif not options.quiet:
            print(f"{model.info.name} is served at {place}", file=sys.stderr, flush=True)

    app = None
    try:
        app = make_app(engine, settings, model=model, metrics=metrics)
        drained = serve(app, listening, started=started)
    finally:
        listening.close()
        engine.close(drain=False, timeout=options.drain)
        if app is not None:
            app.state.service.close()
    if not options.quiet:
        print(
            "ended; every request was answered" if drained else "ended; requests that took too long were cancelled", file=sys.stderr
        )
    return 0
