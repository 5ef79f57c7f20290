"""The HTTP side: routes, the door before them, the fields of requests and answers."""
