"""A run's recipe: public information only, validated before anything is read or charged."""

from dpft.recipe.paths import expand, listed
from dpft.recipe.recipe import Recipe
from dpft.recipe.tables import DataTable, ModelTable, TaskTable, check_labels

__all__ = ["DataTable", "ModelTable", "Recipe", "TaskTable", "check_labels", "expand", "listed"]
