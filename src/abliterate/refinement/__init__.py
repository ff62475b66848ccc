"""Finding a gentler edit: how far each layer and role has to be edited, and along what."""
