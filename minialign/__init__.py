"""minialign: preference alignment of multimodal language models, small enough to read from top to bottom."""

__version__ = "0.1.0"
