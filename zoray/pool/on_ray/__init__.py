"""What Ray does for a pool: a cluster, places for replicas, and each replica's actor."""
