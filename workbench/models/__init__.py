"""What a model is: its sources, its layers, how it is called, and how its sampler steps. One file per family."""

from workbench.models.bundle import Bundle

__all__ = ["Bundle"]
