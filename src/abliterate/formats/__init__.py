"""How weights are stored, plain, in few bits, and in GGUF files: as the numbers they mean, edited and written again."""
