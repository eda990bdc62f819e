"""Streams: sources of samples, their order and seeds, data sets, drift, texts, signals.

`make_stream` makes a stream of settings; `from_loader` and `from_iterable` wrap a user's data;
`ArrayStream` takes tensors. `LateLabels` learns from late targets, `Rejoin` holds samples until
their targets come, `Paced` yields samples in real time. `socket`, `files` and `mqtt` take them from
outside. The protocol `Stream` in `sample.py`
defines a stream.
"""

from hamdist.streams.adapters import from_iterable, from_loader
from hamdist.streams.check import Checker
from hamdist.streams.factory import drifts, held_out, held_out_tokens, make_stream
from hamdist.streams.iterable import IterableStream
from hamdist.streams.sample import InputSpec, Sample, SampleSpec, Stream, TargetSpec, report_of
from hamdist.streams.smoothness import Smoothness
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.characters import CharacterStream
from hamdist.streams.sources.datasets import DataSet, digits, mnist1d
from hamdist.streams.sources.drift import DriftStream
from hamdist.streams.sources.feeds import files, mqtt, read_json, socket
from hamdist.streams.sources.images import (
    CIFAR10,
    FASHION_MNIST,
    MNIST,
    cifar10,
    fashion_mnist,
    mnist,
    read_images,
)
from hamdist.streams.sources.sequences import TokenStream
from hamdist.streams.sources.signals import SignalStream
from hamdist.streams.sources.texts import Vocabulary, load_glove, token_sequences
from hamdist.streams.wrappers.canvas import Canvas
from hamdist.streams.wrappers.late_targets import Delayed, LateLabels, Rejoin
from hamdist.streams.wrappers.pace import Paced
from hamdist.streams.wrappers.smooth import Smooth, Withhold

__all__ = [
    "CIFAR10",
    "FASHION_MNIST",
    "MNIST",
    "ArrayStream",
    "Canvas",
    "CharacterStream",
    "Checker",
    "DataSet",
    "Delayed",
    "DriftStream",
    "InputSpec",
    "IterableStream",
    "LateLabels",
    "Paced",
    "Rejoin",
    "Sample",
    "SampleSpec",
    "SignalStream",
    "Smooth",
    "Smoothness",
    "Stream",
    "TargetSpec",
    "TokenStream",
    "Vocabulary",
    "Withhold",
    "cifar10",
    "digits",
    "drifts",
    "fashion_mnist",
    "files",
    "from_iterable",
    "from_loader",
    "held_out",
    "held_out_tokens",
    "load_glove",
    "make_stream",
    "mnist",
    "mnist1d",
    "mqtt",
    "read_images",
    "read_json",
    "report_of",
    "socket",
    "token_sequences",
]
