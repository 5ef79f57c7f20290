"""An example under a probe becomes a loss: objectives, rewards, and the replica that puts them to an engine.

Imports all rooms below: records, methods, models, engines, tasks. A replica's process does the scoring; the driver has
the workload, to check a run and to name what an evaluation has measured.
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
