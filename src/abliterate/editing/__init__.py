"""Taking directions out of the files: the plan, the mathematics, and the writers."""
