"""What a round file says: reading it, or naming the line that is wrong; writing one with comments."""

from tuner.spec.changes import refused_changes
from tuner.spec.data_section import DataSpec, SourceSpec
from tuner.spec.dimensions import dimension_to_yaml
from tuner.spec.editing import DELETE, edit_round
from tuner.spec.hyperparameters import HYPERPARAMETERS, limits
from tuner.spec.new_round import RECIPES, new_round
from tuner.spec.reading import RoundFile, load_round, read_round
from tuner.spec.round import DORA_TRAINS_ALONE, RoundSpec
from tuner.spec.sections import (
    AnswersSpec,
    CheckpointsSpec,
    EvaluationSpec,
    ModelSpec,
    RunSpec,
    SearchSpec,
)

__all__ = [
    "DELETE",
    "DORA_TRAINS_ALONE",
    "HYPERPARAMETERS",
    "RECIPES",
    "AnswersSpec",
    "CheckpointsSpec",
    "DataSpec",
    "EvaluationSpec",
    "ModelSpec",
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
]
