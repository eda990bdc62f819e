"""Networks of transformers and peft as they come. Oracle: torch.optim.SGD on the uncut network,
float64. Skipped where the libraries are not installed (the extra `zoo`); scripts/zoo runs more."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import relative
from zoo_networks import NETWORKS
from zoo_networks.entry import CLASSES

import hamdist
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.streams import from_iterable

BY_NAME = {network.name: network for network in NETWORKS}
NAMES = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "BertForSequenceClassification",
    "RobertaForSequenceClassification", "DistilBertForSequenceClassification",
    "T5ForConditionalGeneration", "ViTForImageClassification",
    "LoRA on LlamaForCausalLM", "LoRA on BertForSequenceClassification",
)  # fmt: skip
LR = 0.05
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def network(name):
    """The network and its data, or a skip with the reason."""
    pytest.importorskip(BY_NAME[name].library, reason="install hamdist[zoo]")
    return BY_NAME[name].model(), [BY_NAME[name].item(n) for n in range(3)]


def by_sgd(model, items):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for u, y in items:
        optimiser.zero_grad()
        output = model(**u) if isinstance(u, dict) else model(u)
        cross_entropy(output["logits"], y["logits"]).backward()
        optimiser.step()
    return model


def trained(model, items, **fields):
    most = 1 + max(int(y["logits"].max()) for _, y in items)
    return hamdist.train(
        model, from_iterable(items, classes=max(most, CLASSES)), dtype="float64",
        learning={"lr": LR},
        partition={"blocks": 3}, **{"level": "backprop", "engine": {"kind": "inprocess"}, **fields},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_in_three_blocks_it_is_sgd(name):
    model, items = network(name)
    result = trained(model, items)
    assert len(result.blocks) >= 3
    assert not [w for w in result.warnings if "stays whole" in w]
    expected = by_sgd(BY_NAME[name].model(), items)
    assert relative(result.model.state_dict().values(), expected.state_dict().values()) <= 1e-12
    fixed = {k for k, p in model.named_parameters() if not p.requires_grad}
    for key, before in model.state_dict().items():
        if key in fixed:
            assert torch.equal(result.model.state_dict()[key], before)
