"""What of transformers 5.23's continuous batching is replaced, class by class."""
