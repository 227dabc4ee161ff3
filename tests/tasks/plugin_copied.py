"""A task as another package brings it."""

from pydantic import Field

from dpft.recipe import TaskTable
from dpft.tasks import LabelledTask
from dpft.tasks.registry import task


@task("copied")
class Copied(LabelledTask):
    class Settings(TaskTable):
        column: str = Field("c", description="A column.")
