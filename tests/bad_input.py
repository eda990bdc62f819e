"""Settings that are right, to make wrong ones of, and models that cannot be learned."""

from __future__ import annotations

TINY = """
level: trace
steps: 6
model: {kind: residual-mlp, width: 8, depth: 2}
stream: {source: digits, batch: 4}
engine: {kind: inprocess}
"""
MODELS = """
import threading
from torch import nn

def made(value):
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))
    model[1].guard = value
    return model

def lock(): return made(threading.Lock())
def generator(): return made(x for x in "abc")
def without(): return nn.Sequential(nn.Flatten())
def meta(): return nn.Linear(64, 10, device="meta")
def leaves(): raise SystemExit(7)
"""
