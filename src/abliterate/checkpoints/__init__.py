"""What lies in a model's directory: read from headers, written whole or not at all."""
