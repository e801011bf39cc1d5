"""minialign: preference alignment of multimodal language models, written to be read."""

__version__ = "0.1.0"
