"""A run's recipe: public information only, validated before anything is read or charged."""

from dpft.recipe.paths import expand, listed
from dpft.recipe.recipe import Recipe
from dpft.recipe.tables import DataTable, Labels, ModelTable, TaskTable

__all__ = [
    "DataTable",
    "Labels",
    "ModelTable",
    "Recipe",
    "TaskTable",
    "expand",
    "listed",
]
