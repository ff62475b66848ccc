"""Values to files and pages: HTML without scripts from outside, and its charts."""
