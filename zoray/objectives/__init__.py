"""What a step minimises: how an example becomes a number. One objective a file."""

from zoray.objectives.answer import AnswerNLL
from zoray.objectives.base import Objective, Outcomes, Sums
from zoray.objectives.choice import ChoiceNLL
from zoray.objectives.metric import ChoiceMetric, Metric
from zoray.objectives.preference import Preference
from zoray.objectives.reward import Reward

__all__ = [
    "AnswerNLL",
    "ChoiceMetric",
    "ChoiceNLL",
    "Metric",
    "Objective",
    "Outcomes",
    "Preference",
    "Reward",
    "Sums",
]
