"""What leaves the house: pages that show a result, an edited checkpoint proved, published, undone."""
