"""F4: the loop and its hooks."""
