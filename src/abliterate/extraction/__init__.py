"""Finding the direction: from prompts and a model to one direction and its scores."""
