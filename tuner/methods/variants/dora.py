"""DoRA: magnitude and direction of the weights are learned separately."""

from __future__ import annotations

from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.kinds import Flag
from tuner.methods.variants import Variant

USE_DORA = Hyperparameter(
    "use_dora",
    False,
    Flag(),
    "Learn magnitude and direction of the weights separately (DoRA, arXiv:2402.09353). "
    "If it can be true, the round's trials are not packed: a worker trains one at a time.",
    tier=Tier.LIKELY,
)

DORA = Variant(
    name="dora",
    title="DoRA",
    hyperparameters=(USE_DORA,),
    config=lambda values: {"use_dora": True},
    switch=USE_DORA.name,
    packs=False,
    weights_per_output=1,
)
