"""Measuring what an edit did, and how brittle a model's refusals are."""
