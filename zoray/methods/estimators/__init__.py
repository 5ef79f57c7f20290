"""Probes -> losses -> weights of directions. Pure: no engine, no Ray, no files; an estimator never sees a parameter.

`ask(step)` says what to score, `tell(probes, losses)` turns the losses into an `Estimate`: the gradient of the loss is
estimated as sum_k weights[k] * z(step, k). The optimizer turns weights into the coefficients of a commit.

`losses[i]` is probe i's row: its mean loss over its examples, or for a `per_example` estimator the loss of each.
A direction with a probe whose mean loss is not finite is dropped and counted, and the others are used as if it had not
been asked for; if too many are dropped, the step fails. Directions that carry no information are counted too: `ties`
have exactly equal scores, `buried` differ by no more than the engine's score noise, so their sign is chance.
"""

from zoray.methods.estimators.base import Estimate, Estimator, InGroups
from zoray.methods.estimators.evolution import Evolution
from zoray.methods.estimators.feedback import Feedback
from zoray.methods.estimators.one_sided import OneSided
from zoray.methods.estimators.two_point import TwoPoint

__all__ = ["Estimate", "Estimator", "Evolution", "Feedback", "InGroups", "OneSided", "TwoPoint"]
