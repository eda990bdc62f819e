"""Weights with users in several blocks (tied embeddings, a layer at two depths).

A weight belongs to one of its users, the one whose backward pass of a sample comes last (as a rule
the first block). Every other user has a copy: it sends the owner its gradient, sample by sample,
and gets the weight back when it has moved. The owner makes one step by the sum

    g = g_owner + g_user1 + g_user2 + ...        all about the same sample

and the copy is overwritten before the user's next forward pass (dynamics/schedule says with which
version).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from hamdist.dynamics.graph.spec import BlockSpec, SharedWeight, Tie


def shared_weights(blocks: Iterable[BlockSpec]) -> tuple[SharedWeight, ...]:
    """Return the weights that learn and that modules of several blocks hold."""
    uses: dict[int, list[tuple[str, str]]] = {}
    sizes: dict[int, int] = {}
    for block in blocks:
        for key, weight in block.module.named_parameters():
            if weight.requires_grad:
                uses.setdefault(id(weight), []).append((block.name, key))
                sizes[id(weight)] = weight.numel()
    return tuple(SharedWeight(tuple(u), sizes[i]) for i, u in uses.items() if len(u) > 1)


def ties_of(shared: Sequence[SharedWeight], heard: Mapping[str, int]) -> tuple[Tie, ...]:
    """Return the pairs of blocks between which gradients and weights of shared weights travel.

    heard: by block, in the order of the graph, the tick of its backward pass of sample 0. The block
    with the latest one owns the weight; of equal ones the last.
    """
    order = list(heard)
    pairs: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
    for weight in shared:
        owner, owner_key = max(weight.uses, key=lambda use: (heard[use[0]], order.index(use[0])))
        for user, key in weight.uses:
            if user != owner:
                pairs.setdefault((owner, user), []).append((owner_key, key, weight.numel))
    return tuple(
        Tie(i, owner, user, tuple((a, b) for a, b, _ in keys), sum(n for _, _, n in keys))
        for i, ((owner, user), keys) in enumerate(pairs.items())
    )


def names_of(module: nn.Module, keys: Iterable[str]) -> set[str]:
    """Return all names in `module` of the weights that `keys` name."""
    weights = {id(module.get_parameter(key)) for key in keys}
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, weight in parameters if id(weight) in weights}
