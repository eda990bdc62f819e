"""A live run over HTTP (`hamdist serve`): predictions and learning for several clients at once.

    POST /predict   {"u": [[...]]}             {"number": 7, "prediction": [[...]], "versions": {}}
    POST /learn     {"u": [[...]], "y": [0]}   {"number": 8}; y may be left out, and come later:
                    {"number": 8, "y": [0]}
    GET  /status    what was fed and answered; /metrics: the same for Prometheus; /weights
    POST /snapshot  {"snapshot": "results/live/snapshots/..."}
    POST /evaluate  {"u": [[...]], "y": [0]}   {"loss": 0.1, "accuracy": 1.0, "outputs": {}, ...}
    POST /set       {"learning": {"lr": 0.1}} -> {}; likewise /pause, /go_on, /settle, /stop

Arrays instead of JSON, as `hamdist.attach` sends them: a body of the type application/x-safetensors
with `u` and `y` (or `u.NAME`), and `number` and `end` in the query; `y` in the reply, if accepted.
Every request has `Authorization: Bearer TOKEN`. 400: the sample does not fit; 401: another token;
413: too long; 429: the network is slower than its clients, come again; 503: the run has ended.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from safetensors import SafetensorError
from safetensors.torch import load
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hamdist.errors import HamdistError, SettingsError
from hamdist.runtime.live.callbacks import ADDRESS, SAFETENSORS, Answer
from hamdist.runtime.live.journal import named_tensors, packed, read_named
from hamdist.runtime.live.run import LiveRun

LONGEST = 2**26  # bytes of a body
AT_ONCE = 32  # requests that wait for the network; starlette has threads for 40


@dataclass(frozen=True)
class Served:
    """Address at which a live run is served; `stopped` is set by a client that asks for its end."""

    address: str
    token: str
    stopped: threading.Event = field(default_factory=threading.Event)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket at an address. Raises SettingsError where there can be none."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"--host {host}, --port {port}: {error.strerror}; port 0: any free one"
        ) from None
    return listening


@contextlib.contextmanager
def serving(
    run: LiveRun,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    out: Path | None = None,
) -> Iterator[Served]:
    """Serve a live run from a thread of this process, inside.

    Args:
        run: the run.
        host: of the network interface, IPv4 or IPv6: this machine's loopback, unless it is said.
        port: 0 for any free one.
        token: that clients need; None for a new one.
        out: a folder for `address.json` (of mode 0600), by which `hamdist.attach(out)` finds it.

    Raises:
        SettingsError: the port is taken, or the interface is none of this machine.
    """
    with bound_socket(host, port) as listening:
        listening.listen()
        there = socket.gethostname() if host in ("0.0.0.0", "::") else host
        there = f"[{there}]" if ":" in there else there
        address = f"http://{there}:{listening.getsockname()[1]}"
        served = Served(address, token or secrets.token_urlsafe(16))
        app = make_app(run, served.token, served.stopped)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), name="hamdist-serve")
        thread.start()
        file = None if out is None else out / ADDRESS
        try:
            if file is not None:
                file.unlink(missing_ok=True)  # (of a process that was killed)
                file.touch(0o600, exist_ok=False)
                file.write_text(json.dumps({"address": address, "token": served.token}), "utf-8")
            yield served
        finally:
            if file is not None:
                file.unlink(missing_ok=True)
            server.should_exit = True
            thread.join()


def make_app(run: LiveRun, token: str, stopped: threading.Event) -> Starlette:
    """Return the ASGI application that serves `run` to the holders of `token`."""
    busy: set[object] = set()

    def answered(work: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            sent = request.headers.get("authorization", "").encode()
            if not secrets.compare_digest(sent, f"Bearer {token}".encode()):
                return _refusal(401, "give the token: Authorization: Bearer TOKEN")
            if request.method == "POST":
                if len(busy) >= AT_ONCE:
                    return _refusal(429, f"{AT_ONCE} requests wait for the network")
                busy.add(request)
            try:
                body = await _body(request)
                return await run_in_threadpool(lambda: _replied(work(body), request))
            except BlockingIOError as error:
                return _refusal(429, str(error), "Paused" if run.status().paused else "Busy")
            except OverflowError as error:
                return _refusal(413, str(error))
            except HamdistError as error:
                return _refusal(400 if run.running else 503, str(error), type(error).__name__)
            except (KeyError, ValueError, TypeError, SafetensorError) as error:
                return _refusal(400, f"{type(error).__name__}: {error}")
            finally:
                busy.discard(request)

        return answer

    def learn(body: dict[str, Any]) -> dict[str, Any]:
        if "number" in body:
            number = int(body["number"])
            run.teach(number, _target(run, body["y"]), wait=False)
            return {"number": number}
        u, y, end = _input(run, body["u"]), _target(run, body.get("y")), bool(body.get("end"))
        return {"number": run.feed(u, y, end=end, wait=False)}

    def predict(body: dict[str, Any]) -> Answer:
        return run.predict(_input(run, body["u"]), end=bool(body.get("end")), wait=False)

    def evaluated(body: dict[str, Any]) -> dict[str, Any]:
        return asdict(run.evaluate(_input(run, body["u"]), _target(run, body["y"])))

    def metrics(_: object) -> str:
        return "".join(f"hamdist_{name} {value}\n" for name, value in _status(run).items())

    handlers = {
        "status": lambda _: _status(run),
        "metrics": metrics,
        "weights": lambda _: run.weights(),
    }
    posted: dict[str, Callable[[dict[str, Any]], Any]] = {
        "predict": predict,
        "learn": learn,
        "evaluate": evaluated,
        "set": lambda body: run.set(learning=body["learning"]),
        "pause": lambda _: run.pause(),
        "go_on": lambda _: run.go_on(),
        "settle": lambda _: run.settle(),
        "stop": lambda _: stopped.set(),
        "snapshot": lambda _: {"snapshot": run.snapshot()},
    }
    posts = [Route(f"/{n}", answered(work), methods=["POST"]) for n, work in posted.items()]
    return Starlette(routes=[*posts, *(Route(f"/{n}", answered(w)) for n, w in handlers.items())])


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LONGEST:
            raise OverflowError(f"a body of more than {LONGEST >> 20} MiB")
    if request.headers.get("content-type") == SAFETENSORS:
        tensors = load(bytes(data))
        parts = {name: read_named(name, tensors) for name in ("u", "y")}
        return {n: v for n, v in parts.items() if v is not None} | dict(request.query_params)
    body = json.loads(data or b"{}")
    if not isinstance(body, dict):
        raise TypeError("give an object of names and values")
    return body


def _replied(result: Any, request: Request) -> Response:
    if isinstance(result, str):
        return PlainTextResponse(result)
    if isinstance(result, dict) and request.url.path == "/weights":
        return Response(packed(result), media_type=SAFETENSORS)
    if not isinstance(result, Answer):
        return JSONResponse(result or {})
    y = result.prediction
    reply: dict[str, Any] = {"number": result.number, "versions": result.versions}
    if request.headers.get("accept") == SAFETENSORS:
        data = packed(named_tensors("y", y), {"answer": json.dumps(reply)})
        return Response(data, media_type=SAFETENSORS)
    values = {n: t.tolist() for n, t in y.items()} if isinstance(y, Mapping) else y.tolist()
    return JSONResponse({**reply, "prediction": values})


def _input(run: LiveRun, u: Any) -> Any:
    if isinstance(u, dict) and run.spec.inputs is not None:
        return {n: _tensor(u[n], spec.dtype) for n, spec in run.spec.inputs.items()}
    return _tensor(u, run.spec.u_dtype)


def _target(run: LiveRun, y: Any) -> Any:
    if isinstance(y, dict) and run.spec.targets is not None:
        return {n: _tensor(label, run.spec.targets[n].dtype) for n, label in y.items()}
    return None if y is None else _tensor(y, run.spec.y_dtype)


def _tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values  # (as it is: another dtype is refused, as by the run itself)
    return torch.as_tensor(np.asarray(values)).to(dtype)  # (no array of objects or texts)


def _status(run: LiveRun) -> dict[str, Any]:
    status = run.status()
    facts = {n: v for n, v in asdict(status).items() if isinstance(v, (int, float))}
    windows = status.progress.windows if status.progress is not None else []
    if windows:
        facts |= {"loss": windows[-1].mean_loss, "seconds": status.progress.seconds}  # type: ignore[union-attr]
        facts |= {} if windows[-1].accuracy is None else {"accuracy": windows[-1].accuracy}
    return {name: int(v) if isinstance(v, bool) else v for name, v in facts.items()}


def _refusal(status: int, why: str, kind: str = "StreamError") -> JSONResponse:
    reply = {"error": why, "kind": kind}
    return JSONResponse(reply, status, {"Retry-After": "1"} if status == 429 else None)
