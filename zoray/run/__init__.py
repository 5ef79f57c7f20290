"""One run, from its settings to its report: config, experiment, the step loop, the journal, the reports.

Imports all rooms but serving. It is the driver's process: the only one that writes into the run's folder.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {"Experiment": "experiment", "Run": "experiment", "Logging": "reports.monitor", "Wandb": "reports.monitor"},
)
