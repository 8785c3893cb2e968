"""Round files: reading and checking them, with the line of each mistake, and writing them."""

from tuner.config.command_section import CommandSpec
from tuner.config.data_section import DataSpec, SourceSpec
from tuner.config.dimensions import dimension_to_yaml
from tuner.config.editing import DELETE, edit_round, refused_changes
from tuner.config.new_round import RECIPES, new_round
from tuner.config.parsing import RoundFile, load_round, read_round, with_plug_ins
from tuner.config.round_file import RoundSpec, without_secrets
from tuner.config.sections import (
    AnswersSpec,
    CheckpointsSpec,
    EvaluationSpec,
    ModelSpec,
    ObjectiveSpec,
    RunSpec,
    SearchSpec,
)
from tuner.methods.table import HYPERPARAMETERS, limits

__all__ = [
    "DELETE",
    "HYPERPARAMETERS",
    "RECIPES",
    "AnswersSpec",
    "CheckpointsSpec",
    "CommandSpec",
    "DataSpec",
    "EvaluationSpec",
    "ModelSpec",
    "ObjectiveSpec",
    "RoundFile",
    "RoundSpec",
    "RunSpec",
    "SearchSpec",
    "SourceSpec",
    "dimension_to_yaml",
    "edit_round",
    "limits",
    "load_round",
    "new_round",
    "read_round",
    "refused_changes",
    "with_plug_ins",
    "without_secrets",
]
