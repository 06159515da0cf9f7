"""Which steps and layers are fragile: Fisher information, signed errors, and the table of predicted errors made from them."""

from workbench.sensitivity.fisher import profile
from workbench.sensitivity.table import calibration_weights, tabulate

__all__ = ["calibration_weights", "profile", "tabulate"]
