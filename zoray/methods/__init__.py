"""Which parameters move, and how losses move them: directions, spaces, estimators, optimizers, snapshots.

Pure arithmetic on given numbers: no engine, no network. Imports records. The driver has the estimators and
optimizers; replicas (in the worker, where the adapter slots are) have directions and spaces.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {
        "Lora": "spaces.lora",
        "LowRank": "spaces.lowrank",
        "Lozo": "spaces.lozo",
        "TwoPoint": "estimators.two_point",
        "OneSided": "estimators.one_sided",
        "Evolution": "estimators.evolution",
        "Feedback": "estimators.feedback",
        "Sgd": "optimizers",
        "Sign": "optimizers",
        "GlobalAdaptive": "optimizers",
    },
)
