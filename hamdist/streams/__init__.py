"""Streams: sources of samples, their order and seeds, data sets, drift, texts, signals.

`make_stream` turns settings into a stream; `from_loader` and `from_iterable` wrap your own;
`ArrayStream` takes tensors. `LateLabels` learns from late targets,
`Rejoin` has samples wait for them, `Paced` has samples
arrive in real time. What a stream is: the protocol `Stream` in `sample.py`.
"""

from hamdist.streams.arrays import ArrayStream
from hamdist.streams.canvas import Canvas
from hamdist.streams.characters import CharacterStream
from hamdist.streams.check import Checker
from hamdist.streams.datasets import DataSet, digits, fashion_mnist
from hamdist.streams.drift import DriftStream
from hamdist.streams.factory import drifts, held_out, held_out_tokens, make_stream
from hamdist.streams.late import Delayed, LateLabels, Rejoin
from hamdist.streams.mnist1d import mnist1d
from hamdist.streams.pace import Paced
from hamdist.streams.sample import InputSpec, Sample, SampleSpec, Stream, TargetSpec, report_of
from hamdist.streams.sequences import TokenStream
from hamdist.streams.signals import SignalStream
from hamdist.streams.smooth import Smooth, Withhold
from hamdist.streams.smoothness import Smoothness
from hamdist.streams.text import Vocabulary, load_glove, token_sequences
from hamdist.streams.wrap import IterableStream, from_iterable, from_loader

__all__ = [
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
    "digits",
    "drifts",
    "fashion_mnist",
    "from_iterable",
    "from_loader",
    "held_out",
    "held_out_tokens",
    "load_glove",
    "make_stream",
    "mnist1d",
    "report_of",
    "token_sequences",
]
