"""A live run over HTTP (`hamdist serve`): predictions and learning for several clients at once.

    POST /predict   {"u": [[...]]}             {"number": 7, "prediction": [[...]], "versions": {}}
    POST /learn     {"u": [[...]], "y": [0]}   {"number": 8}; y may be left out, and come later:
                    {"number": 8, "y": [0]}
    GET  /status    what was fed and answered; /metrics: the same for Prometheus
    POST /snapshot  {"snapshot": "results/live/snapshots/..."}

Arrays instead of JSON: a body of the type application/x-npz with the same names. Every request has
`Authorization: Bearer TOKEN`. 400: the sample does not fit; 401: another token; 413: too long;
429: the network is slower than its clients, come again; 503: the run has ended.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hamdist.errors import HamdistError
from hamdist.runtime.live.answers import Answer
from hamdist.runtime.live.run import LiveRun

NPZ = "application/x-npz"
LONGEST = 2**26  # bytes of a body
AT_ONCE = 32  # requests that wait for the network; starlette has threads for 40


def make_app(run: LiveRun, token: str) -> Starlette:
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
                return _refusal(429, str(error))
            except OverflowError as error:
                return _refusal(413, str(error))
            except HamdistError as error:
                return _refusal(400 if run.running else 503, str(error))
            except (KeyError, ValueError, TypeError) as error:
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

    def metrics(_: object) -> str:
        return "".join(f"hamdist_{name} {value}\n" for name, value in _status(run).items())

    return Starlette(
        routes=[
            Route("/predict", answered(predict), methods=["POST"]),
            Route("/learn", answered(learn), methods=["POST"]),
            Route("/snapshot", answered(lambda _: {"snapshot": run.snapshot()}), methods=["POST"]),
            Route("/status", answered(lambda _: _status(run))),
            Route("/metrics", answered(metrics)),
        ]
    )


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LONGEST:
            raise OverflowError(f"a body of more than {LONGEST >> 20} MiB")
    if request.headers.get("content-type") == NPZ:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    body = json.loads(data or b"{}")
    if not isinstance(body, dict):
        raise TypeError("give an object of names and values")
    return body


def _replied(result: Any, request: Request) -> Response:
    if isinstance(result, str):
        return PlainTextResponse(result)
    if not isinstance(result, Answer):
        return JSONResponse(result)
    y = result.prediction
    found = y if isinstance(y, Mapping) else {"prediction": y}
    if request.headers.get("accept") == NPZ:
        file, arrays = io.BytesIO(), {n: t.numpy() for n, t in found.items()}
        np.savez(file, **{"number": np.array(result.number), **arrays})  # type: ignore[arg-type]
        return Response(file.getvalue(), media_type=NPZ)
    values: Any = {n: t.tolist() for n, t in found.items()}
    values = values if isinstance(y, Mapping) else values["prediction"]
    told = {"number": result.number, "prediction": values, "versions": result.versions}
    return JSONResponse(told)


def _input(run: LiveRun, u: Any) -> Any:
    if isinstance(u, dict) and run.spec.inputs is not None:
        return {n: _tensor(u[n], one.dtype) for n, one in run.spec.inputs.items()}
    return _tensor(u, run.spec.u_dtype)


def _target(run: LiveRun, y: Any) -> Any:
    if isinstance(y, dict) and run.spec.targets is not None:
        return {n: _tensor(one, run.spec.targets[n].dtype) for n, one in y.items()}
    return None if y is None else _tensor(y, run.spec.y_dtype)


def _tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values)).to(dtype)  # (no array of objects or texts)


def _status(run: LiveRun) -> dict[str, Any]:
    status = run.status()
    told = {n: one for n, one in asdict(status).items() if isinstance(one, (int, float))}
    windows = status.progress.windows if status.progress is not None else []
    if windows:
        told |= {"loss": windows[-1].mean_loss, "seconds": status.progress.seconds}  # type: ignore[union-attr]
        told |= {} if windows[-1].accuracy is None else {"accuracy": windows[-1].accuracy}
    return {name: int(one) if isinstance(one, bool) else one for name, one in told.items()}


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status, {"Retry-After": "1"} if status == 429 else None)
