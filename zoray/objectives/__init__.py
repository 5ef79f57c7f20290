"""What a step minimises: how an example becomes a number. One objective a file."""
