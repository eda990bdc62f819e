"""Samples from outside, as they come: lines of a socket, files of a folder that grows, MQTT.

Each is an iterator of dicts (`u`, and `y`, `end` where they are known) for `hamdist.train`, or for
a live run, whose journal has a sample when `feed` returns:

    for sample in hamdist.streams.mqtt("sensors/+", "127.0.0.1"):
        run.feed(**sample)
"""

from __future__ import annotations

import json
import queue
import socket as sockets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hamdist.errors import SettingsError, StreamError, need_package

FeedSample = dict[str, Any]
LONGEST = 2**26  # bytes of a socket's line
_UNFINISHED = (".tmp", ".part")


def read_json(text: bytes) -> FeedSample:
    """Return the sample of JSON {"u": [[...]], "y": [...], "end": false}, with reals as float32.

    Args:
        text: of one message or line.

    Raises:
        StreamError: it is anything else.
    """
    try:
        value = json.loads(text)
        sample = {name: value[name] for name in ("u", "y", "end") if value.get(name) is not None}
        return {n: v if n == "end" else _tensor(v) for n, v in sample.items() if n != "u"} | {
            "u": _tensor(sample["u"])
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        shown = text[:60].decode(errors="replace")
        why = f'{type(error).__name__}: {error}; give {{"u": [[...]], "y": [...]}}'
        raise StreamError(f"{shown!r} is no sample: {why}") from None


def _tensor(value: Any) -> torch.Tensor:
    array = torch.from_numpy(np.asarray(value))
    return array.float() if array.is_floating_point() else array


def socket(
    host: str,
    port: int,
    *,
    read: Callable[[bytes], FeedSample] = read_json,
    patience: float = 60.0,
    wait: float = 0.5,
) -> Iterator[FeedSample]:
    """Yield the lines of a TCP server, one sample a line.

    A connection that is lost is made again, every `wait` seconds. What the server sent meanwhile is
    lost, and so is a line that was cut off: TCP has no memory (`mqtt` has).

    Args:
        host: of the server.
        port: of the server.
        read: makes a sample (u, y) of a line's bytes.
        patience: seconds without a connection after which the stream ends in an error.
        wait: seconds from one try to the next.

    Raises:
        StreamError: there was no connection for `patience` seconds, a line is no sample, or it has
            more than 64 MiB.
    """
    since = time.monotonic()
    while True:
        try:
            with sockets.create_connection((host, port), timeout=patience) as line:
                line.settimeout(None)
                lines = line.makefile("rb")
                while text := lines.readline(LONGEST):
                    if text.endswith(b"\n"):
                        since = time.monotonic()
                        yield read(text)
                    elif len(text) == LONGEST:
                        raise StreamError(f"{host}:{port}: a line of more than {LONGEST >> 20} MiB")
            why = "the server closed it"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() - since > patience:
            lasted = f"for {patience:g} s (patience)"
            raise StreamError(f"no connection to {host}:{port} {lasted}: {why}")
        time.sleep(wait)


def files(folder: str | Path, *, after: str = "", look: float | None = 1.0) -> Iterator[FeedSample]:
    """Yield the samples of a folder that grows: .jsonl (one a line), .npz (one a file: u, y).

    Files come in the order of their names, which has to be the order in which they appear. Write
    one under a name that ends in .part or .tmp, and rename it: such names are passed over.

    Args:
        folder: the folder.
        after: begin behind the file of this name, where an earlier run has come to.
        look: seconds between two looks for new files; None: end behind those that are there.

    Raises:
        StreamError: the folder cannot be read, or a file is no sample.
    """
    done, place = after, Path(folder)
    while True:
        try:
            names = sorted(p.name for p in place.iterdir() if p.suffix in (".jsonl", ".npz"))
        except OSError as error:
            raise StreamError(f"files {str(folder)!r}: {error.strerror}") from None
        for name in names:
            if name > done and not name.endswith(_UNFINISHED):
                yield from _samples_of(place / name)
                done = name
        if look is None:
            return
        time.sleep(look)


def _samples_of(path: Path) -> Iterator[FeedSample]:
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                yield from map(read_json, lines)
            return
        with np.load(path, allow_pickle=False) as arrays:
            sample = {name: _tensor(arrays[name]) for name in arrays.files if name in ("u", "y")}
    except (OSError, ValueError, StreamError) as error:
        raise StreamError(f"{path}: {error}") from None
    if "u" not in sample:
        raise StreamError(f"{path}: no array u")
    yield sample


def mqtt(
    topic: str,
    host: str = "127.0.0.1",
    port: int = 1883,
    *,
    client: str = "hamdist",
    read: Callable[[bytes], FeedSample] = read_json,
    patience: float = 60.0,
    username: str | None = None,
    password: str | None = None,
) -> Iterator[FeedSample]:
    """Yield the messages of a topic at a broker, one sample a message (paho-mqtt, extra `mqtt`).

    Messages are taken with quality of service 1, in a session that the broker keeps for `client`.
    A message is acknowledged when the next one is asked for, so behind `run.feed`: what the broker
    has taken over is lost neither with this process, nor with the connection, nor with a broker
    that keeps its state on disk (mosquitto: `persistence true`). It may come twice, then.

    Args:
        topic: of the messages; + and # stand for parts of it.
        host: of the broker.
        port: of the broker.
        client: the session's name.
        read: makes a sample (u, y) of a message's bytes.
        patience: seconds without a connection after which the stream ends in an error.
        username: at the broker, if it asks for one.
        password: of that user.

    Raises:
        StreamError: there was no connection for `patience` seconds, or a message is no sample.
        SettingsError: paho-mqtt is not installed.
    """
    need_package("paho.mqtt", "'hamdist[mqtt]'", "streams.mqtt")
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    if patience <= 0:
        raise SettingsError(f"mqtt: patience is {patience:g}; above 0")
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    line = paho.Client(
        CallbackAPIVersion.VERSION2, client_id=client, clean_session=False, manual_ack=True
    )
    if username is not None:
        line.username_pw_set(username, password)
    line.on_connect = lambda c, *_: c.subscribe(topic, qos=1)
    line.on_message = lambda _, __, message: messages.put(message)
    line.reconnect_delay_set(1, 5)
    lost: float | None = time.monotonic()
    try:
        line.connect_async(host, port)
        line.loop_start()
        while True:
            try:
                message = messages.get(timeout=0.5)
            except queue.Empty:
                lost = None if line.is_connected() else lost or time.monotonic()
                if lost is not None and time.monotonic() - lost > patience:
                    where = f"{host}:{port} for {patience:g} s (patience)"
                    raise StreamError(f"no connection to the broker at {where}") from None
                continue
            yield read(message.payload)
            line.ack(message.mid, message.qos)
    finally:
        line.disconnect()
        line.loop_stop()
