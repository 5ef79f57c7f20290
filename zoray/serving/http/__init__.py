"""What comes in over HTTP and goes out: routes, the door before them, the fields of requests and answers."""
