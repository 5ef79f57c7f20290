"""What Ray does for a pool: a cluster, places for replicas, and the actor that each one lives in."""
