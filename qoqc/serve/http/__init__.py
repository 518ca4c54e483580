"""The OpenAI-compatible HTTP server around a continuous batching engine (docs/serving.md)."""
