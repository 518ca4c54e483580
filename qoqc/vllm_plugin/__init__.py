"""The plug-in of vLLM: artifacts as the quantization method "qoq", see docs/vllm.md."""

from __future__ import annotations
