"""SGD with momentum."""

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Number
from tuner.methods.optimizers import WEIGHT_DECAY, Optimizer

MOMENTUM = Hyperparameter(
    "sgd_momentum", 0.9, Number(at_least=0, below=1), "Decay of the gradients' average."
)


def build(groups, values):
    from torch.optim import SGD

    return SGD(groups, momentum=MOMENTUM.number(values), weight_decay=WEIGHT_DECAY.number(values))


SGD_MOMENTUM = Optimizer(
    name="sgd", hyperparameters=(WEIGHT_DECAY, MOMENTUM), state_bytes=4, build=build, is_elementwise=True
)
