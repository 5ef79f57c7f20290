"""The server's processes as Ray Serve deployments, and how they are started."""
