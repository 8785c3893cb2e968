"""Export a trial's configuration for other tools, with notes on what they cannot express."""

from tuner.report.exporters.exporter import Recipe
from tuner.report.exporters.tools import TOOLS, Tool, recipe_file

__all__ = ["TOOLS", "Recipe", "Tool", "recipe_file"]
