"""What is done with an edited checkpoint: it is proved, published, undone."""
