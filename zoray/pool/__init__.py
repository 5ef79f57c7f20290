"""Many replicas, on Ray or under SLURM, used as one: tiles out, scores in, lost replicas replaced.

Knows what a replica is asked, not what an engine does. Imports scoring and the rooms below; only `on_ray` imports Ray.
It is the driver's side of all messages; `on_ray.actor` is the replica's.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {"Cluster": "settings", "Slurm": "slurm"},
)
