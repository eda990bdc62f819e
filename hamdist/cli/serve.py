"""`hamdist serve` and `hamdist replay`: a live run over HTTP, and one again from its journal."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text

from hamdist.cli.console import OUTPUT, console, report, say
from hamdist.cli.options import DEFAULT_SETTINGS, RunOptions, SettingsArgument, argument, option
from hamdist.errors import need_package


def serve(
    settings: SettingsArgument = DEFAULT_SETTINGS,
    *,
    options: Annotated[RunOptions, "level engine set_ model"],
    port: Annotated[int, option("0: any free one.", min=0, max=65535)] = 8000,
    host: Annotated[
        str, option("Interface; others than loopback are for safe networks.")
    ] = "127.0.0.1",
    out: Annotated[Path, option("Folder of the journal and snapshots; an old one goes on.")] = Path(
        "results/live"
    ),
    weights: Annotated[str | None, option("Begin with those of a snapshot.", "DIR|URL")] = None,
) -> None:
    """Serve a run that learns from its clients, on this machine alone; Ctrl-C ends it.

    Clients need the token that is printed, or that HAMDIST_TOKEN says; `hamdist.attach(OUT)` in
    another process of this user finds both.
    """
    need_package("starlette", "'hamdist[serve]'", "`hamdist serve`")
    need_package("uvicorn", "'hamdist[serve]'", "`hamdist serve`")
    from hamdist.api import start
    from hamdist.serve import bound_socket, serving
    from hamdist.study.report.save import save_weights
    from hamdist.study.run.export import initial_model

    loaded = options.load(settings)
    loaded = loaded.for_level(loaded.level)
    bound_socket(host, port).close()  # before anything starts
    network, first, classes = initial_model(loaded, options.factory(), weights)
    resume = out if (out / "journal.jsonl").exists() else None
    begin: Any = {"example": first, "classes": classes, "out": out, "resume": resume}
    token = os.environ.get("HAMDIST_TOKEN")
    run = start(network, loaded, **begin)
    try:
        with (
            run,
            contextlib.suppress(KeyboardInterrupt),
            serving(run, host, port, token, out) as served,
        ):
            report(address=served.address, token=served.token, out=str(out))
            run.settle()  # Ray has set handlers of its own by then
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            access = Text(f"{served.address}  Authorization: Bearer {served.token}")
            console(stderr=OUTPUT.as_json).print(access, soft_wrap=True)  # now, not at the end
            while run.running and not served.stopped.wait(1.0):
                pass
    finally:  # (also of a run that failed)
        if run.result is not None:
            save_weights(out / "model.safetensors", run.result.model.state_dict())
            say(f"{run.result.samples} samples; weights written to {out}")


def replay(
    folder: Annotated[Path, argument("out= (or --out) of a live run.", "DIR")],
    *,
    options: Annotated[RunOptions, "engine model"],
) -> None:
    """Repeat a live run from its journal, and write its weights to DIR/replay.safetensors."""
    from hamdist.api import replay as repeated
    from hamdist.config import Settings
    from hamdist.models.build import make_from_factory
    from hamdist.runtime.live.begin import read_beginning
    from hamdist.study.report.save import save_weights
    from hamdist.study.run.run import torch_dtype

    factory, network = options.factory(), None
    if factory is not None:
        began = Settings.model_validate(read_beginning(folder)[0]["settings"])
        dtype = torch_dtype(began.dtype)
        network = make_from_factory(factory, seed=began.seed, dtype=dtype)
    result = repeated(folder, network, **options.changes())
    file = folder / "replay.safetensors"
    save_weights(file, result.model.state_dict())
    report(samples=result.samples, file=str(file))
    say(f"{result.samples} samples; weights written to {file}")
