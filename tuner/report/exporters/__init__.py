"""A trial's configuration as a file that another tool runs, and what of it that tool cannot say."""

from tuner.report.exporters.exporter import Recipe
from tuner.report.exporters.tools import TOOLS, Tool, recipe_file

__all__ = ["TOOLS", "Recipe", "Tool", "recipe_file"]
