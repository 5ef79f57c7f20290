"""From an example and a probe to a loss: objectives, rewards, and the replica that runs them on an engine.

Imports all rooms below: records, methods, models, engines, tasks. Replicas do the scoring; the driver loads the
workload to check a run and to name the metrics of an evaluation.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {
        "AnswerNLL": "objectives.answer",
        "ChoiceNLL": "objectives.choice",
        "Metric": "objectives.metric",
        "Preference": "objectives.preference",
        "Reward": "objectives.reward",
    },
)
