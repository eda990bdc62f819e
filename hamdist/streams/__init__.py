"""Streams: sources of samples, their order and seeds, data sets, drift.

`make_stream` turns settings into a stream; `from_loader` and `from_iterable` wrap your own;
`ArrayStream` takes tensors. What a stream is: the protocol `Stream` in `sample.py`.
"""

from hamdist.streams.arrays import ArrayStream
from hamdist.streams.check import Checker
from hamdist.streams.datasets import DataSet, digits, fashion_mnist
from hamdist.streams.drift import DriftStream
from hamdist.streams.factory import drifts, held_out, make_stream
from hamdist.streams.sample import Sample, SampleSpec, Stream
from hamdist.streams.smooth import Smooth, Withhold
from hamdist.streams.smoothness import Smoothness
from hamdist.streams.wrap import IterableStream, from_iterable, from_loader

__all__ = [
    "ArrayStream",
    "Checker",
    "DataSet",
    "DriftStream",
    "IterableStream",
    "Sample",
    "SampleSpec",
    "Smooth",
    "Smoothness",
    "Stream",
    "Withhold",
    "digits",
    "drifts",
    "fashion_mnist",
    "from_iterable",
    "from_loader",
    "held_out",
    "make_stream",
]
