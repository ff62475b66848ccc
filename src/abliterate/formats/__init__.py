"""How weights are stored in few bits, and in GGUF files: seen as the numbers they mean, and written again."""
