"""Many replicas, on Ray or under SLURM, as if they were one: tiles out, scores in, the lost replaced.

Knows what a replica is asked, not what an engine does. Imports scoring and the rooms below; of Ray, only `on_ray`. It
is the driver's side of all messages; `on_ray.actor` is the replica's.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {"Cluster": "settings", "Slurm": "slurm"},
)
