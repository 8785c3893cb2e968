"""What a round file says: reading it, or naming the line that is wrong; writing one with comments."""

from .changes import refused_changes
from .data_section import DataSpec, SourceSpec
from .dimensions import dimension_to_yaml
from .editing import DELETE, edit_round
from .hyperparameters import HYPERPARAMETERS
from .new_round import RECIPES, new_round
from .reading import RoundFile, load_round, read_round
from .round import DORA_TRAINS_ALONE, RoundSpec
from .sections import (
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
    "load_round",
    "new_round",
    "read_round",
    "refused_changes",
]
