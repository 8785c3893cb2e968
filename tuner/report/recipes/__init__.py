"""A trial's configuration as a file that another tool runs, and what of it that tool cannot say."""

from tuner.report.recipes.recipe import Recipe
from tuner.report.recipes.tools import TOOLS, Tool, recipe_file

__all__ = ["TOOLS", "Recipe", "Tool", "recipe_file"]
