"""Weights: grids, transforms, solvers, the quantized layer, and the stage that quantizes a model."""
