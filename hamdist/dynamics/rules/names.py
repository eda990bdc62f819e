"""The built-in rules by the names that settings and commands use (facts about them: facts.yaml)."""

from __future__ import annotations

import importlib

from hamdist.dynamics.rules.rule import Rule

HOMES = {  # module and class
    "feedback-alignment": "feedback_alignment.FeedbackAlignment",
    "sign-symmetry": "feedback_alignment.SignSymmetry",
    "kolen-pollack": "feedback_alignment.KolenPollack",
    "direct-feedback-alignment": "feedback_alignment.DirectFeedbackAlignment",
    "predictive-coding": "predictive_coding.PredictiveCoding",
    "augmented-lagrangian": "predictive_coding.AugmentedLagrangian",
    "equilibrium-propagation": "predictive_coding.EquilibriumPropagation",
    "mono-forward": "local_losses.MonoForward",
    "forward-forward": "local_losses.ForwardForward",
    "synthetic-gradients": "local_losses.SyntheticGradients",
    "target-propagation": "local_losses.DifferenceTargetPropagation",
    "e-prop": "eligibility.EProp",
    "snap-1": "eligibility.SnAp1",
    "diagonal": "eligibility.DiagonalTraces",
    "oja": "hebbian.Oja",
    "soft-hebb": "hebbian.SoftHebb",
}


def built_in(name: str) -> type[Rule]:
    """Return the class of a built-in rule. Raises KeyError for a name that is none."""
    module, _, cls = HOMES[name].partition(".")
    rule: type[Rule] = getattr(importlib.import_module(f"{__package__}.{module}"), cls)
    return rule
