"""What a step minimises: how an example becomes a number. One objective a file."""

from zoray.scoring.objectives.answer import AnswerNLL
from zoray.scoring.objectives.base import Objective, Outcomes, Sums
from zoray.scoring.objectives.choice import ChoiceNLL
from zoray.scoring.objectives.metric import ChoiceMetric, Metric
from zoray.scoring.objectives.preference import Preference
from zoray.scoring.objectives.reward import Reward

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
