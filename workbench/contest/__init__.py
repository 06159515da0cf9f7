"""Methods against each other: the same prompts, seeds, latents, skip list and steps for all, every stored byte counted.

    make.py    a method's quantized model, and what making it took
    compare.py float and every method generate; what comes out is measured and kept by content
    table.py   the JSON object: intervals, paired differences, what is best; CSV, Markdown, the grid of images
"""

from workbench.contest.compare import FloatRun, MethodResult, SkipMethod, chosen, compare_methods, run_comparison
from workbench.contest.table import csv_text, image_grid, markdown_text
from workbench.methods import METHODS

__all__ = ["METHODS", "FloatRun", "MethodResult", "SkipMethod", "chosen", "compare_methods", "csv_text", "image_grid", "markdown_text",
           "run_comparison"]
