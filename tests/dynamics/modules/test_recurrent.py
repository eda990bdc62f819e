"""Oracle: nn.RNN, nn.GRU and nn.LSTM over whole sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import F64, noise
from dynamics.sequences import CELLS, KINDS, LAYERS, Torch, stacked, tangle
from torch import nn

from hamdist.dynamics.graph.merged import MergedGraph, MergedSequence
from hamdist.dynamics.modules.recurrent import Reads, RecurrentCell
from hamdist.errors import GraphError


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_steps_like_the_layer(kind):
    cell = RecurrentCell(CELLS[kind](3, 4, dtype=F64))
    layer = LAYERS[kind](3, 4, dtype=F64)
    for name, value in cell.cell.named_parameters():
        getattr(layer, f"{name}_l0").data.copy_(value.data)
    u = noise(1, 5, 2, 3)
    state = torch.zeros(2, cell.size, dtype=F64)
    for token in u:
        state = cell(token, state)
    _, last = layer(u)
    h, *rest = last if isinstance(last, tuple) else (last,)
    assert torch.allclose(state[:, cell.hidden], h[0], rtol=0, atol=1e-14)
    for c in rest:
        assert torch.allclose(state[:, 4:], c[0], rtol=0, atol=1e-14)


def test_several_inputs_are_joined_in_front_of_the_state():
    cell = RecurrentCell(nn.GRUCell(5, 4, dtype=F64))
    a, b, h = noise(1, 2, 3), noise(2, 2, 2), noise(3, 2, 4)
    assert torch.equal(cell(a, b, h), cell.cell(torch.cat([a, b], 1), h))


def test_another_module_is_no_cell():
    with pytest.raises(GraphError, match=r"not a GRU$"):
        RecurrentCell(nn.GRU(3, 4))


def test_reads_sees_parts_and_answers_zeros_for_the_rest():
    reads = Reads(nn.Bilinear(2, 3, 1, dtype=F64), slice(2, 4), None)
    x, y = noise(1, 5, 6).requires_grad_(), noise(2, 5, 3).requires_grad_()
    out = reads(x, y)
    assert torch.equal(out, reads.module(x[:, 2:4], y))
    to_x, to_y = torch.autograd.grad(out.sum(), [x, y])
    assert torch.equal(to_x[:, [0, 1, 4, 5]], torch.zeros(5, 4, dtype=F64))
    assert to_x[:, 2:4].all()
    assert to_y.all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_stack_is_the_layers_and_a_head(kind):
    graph = stacked(kind, 3)
    merged = MergedSequence(graph, graph.shapes((2, 3), F64))
    u = noise(1, 6, 2, 3)
    expected = torch.stack(Torch(graph, kind)(u, 6))
    assert torch.allclose(merged(u), expected, rtol=0, atol=1e-14)


def test_a_merged_graph_takes_another_batch_and_type():
    graph = stacked("lstm")
    merged = MergedSequence(graph, graph.shapes((2, 3), F64))
    u = noise(1, 6, 7, 3)
    whole = merged(u)
    assert torch.allclose(whole[:, 3:5], merged(u[:, 3:5]), rtol=0, atol=1e-14)
    assert torch.allclose(merged.float()(u.float()), whole.float(), rtol=0, atol=1e-5)


def test_a_merged_sequence_has_the_keys_of_a_merged_graph_and_modules_of_its_own():
    graph = tangle()
    merged = MergedSequence(graph, graph.shapes((2,), torch.int64))
    assert merged.state_dict().keys() == MergedGraph(graph).state_dict().keys()
    weight = graph.blocks["e"].module.weight
    assert merged.state_dict()["blocks.e.module.weight"].data_ptr() != weight.data_ptr()


def test_no_tokens_are_no_sequence():
    graph = stacked("rnn")
    merged = MergedSequence(graph, graph.shapes((2, 3), F64))
    with pytest.raises(GraphError, match="at least one token"):
        merged(torch.zeros(0, 2, 3, dtype=F64))


def test_blocks_can_be_copied():
    other = copy.deepcopy(stacked("lstm", 2))
    assert other.blocks["cell1"].module.parts == (slice(0, 4), None)
