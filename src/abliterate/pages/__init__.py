"""Reports as pages: one HTML file each, with its charts, that needs nothing beside it."""
