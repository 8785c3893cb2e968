"""LoRA whose A starts from a normal distribution, and whose scale is a number of its own."""

from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.kinds import Number
from tuner.methods.variants import Variant

SCALE = Hyperparameter("scaled_by", 1.0, Number(above=0), "Scale of B A x, at every rank.", tier=Tier.LIKELY)


def config(values):
    return {
        "init_lora_weights": "gaussian",
        "lora_alpha": SCALE.number(values) * values["lora_r"],
        "use_rslora": False,
    }


SCALED = Variant(name="scaled", title="LoRA with its own scale", hyperparameters=(SCALE,), config=config)
