"""One tick of three blocks, written out: what comes in, what each computes, what goes out.

    u --h--> block 0 --h--> block 1 --h--> readout        h forward, messages M backward,
       <--M--       <--M--        <--M--                  each one tick under way

This is level `local` (HL Algorithm 1 with s = -1, c tau = 1, eta_z = 0, eta_omega = 1/tau) without
engine, schedule and autograd; tests/dynamics/test_one_tick.py steps it beside the engine. The same
in general: blocks/hold.py (the equations), schedule/hold.py (which signals), updates/weights.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAU, C, S = 1.0, 1.0, -1.0  # seconds of a tick, speed in 1/seconds, sign of Hamiltonian Learning
ETA_Z, ETA_OMEGA, PHI = 0.0, 1 / TAU, 1 / TAU  # dissipation of z and of omega, scale of the loss


@dataclass
class TanhLayer:
    """A block with f(x) = tanh(x W^T + b); the readout is one without the tanh.

    Attributes:
        theta: [W (O, I), b (O,)]; omega: their costates, of the same shapes.
        h, z: State and costate (B, O).
        message: M (B, I), what the block has sent to its parent in the tick before.
    """

    theta: list[Tensor]
    omega: list[Tensor]
    h: Tensor
    z: Tensor
    message: Tensor


def tick(blocks: Sequence[TanhLayer], u: Tensor, target: Tensor | None, beta: float) -> None:
    """Step all blocks from t_k to t_k + tau, each with what its neighbours sent in the tick before.

    Args:
        blocks: Two state blocks and the readout, in the order of the signal.
        u: Input of the sample that is shown now, (B, I).
        target: Of the sample that the readout predicts now, which was shown two ticks ago, (B, O).
        beta: Rate of the weights.
    """
    h = [u, *(block.h for block in blocks[:-1])]  # what comes in: h_k of the parents,
    M = [block.message for block in blocks[1:]]  # and M_{k-1} of the children
    for i, block in enumerate(blocks):
        W, b = block.theta
        x = h[i]
        if i < len(blocks) - 1:
            # z_k = z_{k-1} + tau ( -s [ -c z_{k-1} + M_{k-1} ] - eta_z z_{k-1} )
            block.z = block.z + TAU * (-S * (-C * block.z + M[i]) - ETA_Z * block.z)
            f = torch.tanh(x @ W.T + b)
            block.h = block.h + TAU * C * (-block.h + f)  # h_{k+1}, which the child reads next
            delta = C * block.z * (1 - f**2)  # c z^T df/d(x W^T + b)
        elif target is not None:
            delta = PHI * (x @ W.T + b - target) / len(x)  # phi dL/dy, L = mean over B of |y-t|^2/2
        else:
            delta = torch.zeros_like(block.h)
        block.message = delta @ W  # what goes out: M_k = c (df/dh)^T z_k
        for n, g in enumerate([delta.T @ x, delta.sum(0)]):  # c (df/dtheta)^T z_k
            # omega_{k+1} = omega_k + tau ( -s g - eta_omega omega_k )
            # theta_{k+1} = theta_k - tau beta omega_{k+1}
            block.omega[n] = block.omega[n] + TAU * (-S * g - ETA_OMEGA * block.omega[n])
            block.theta[n] = block.theta[n] - TAU * beta * block.omega[n]
