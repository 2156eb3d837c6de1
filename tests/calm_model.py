"""Models whose gradients are the same each time."""

from torch import nn
from zipformer.modules.scaling import Balancer, Whiten


def calm(model: nn.Module, training: bool = True) -> nn.Module:
    """In eval mode, and without what changes gradients at random even there.

    With ``training``, the model alone, none of its parts, says that it is trained: the
    session and the freezing hook ask it.
    """
    for module in model.modules():
        if isinstance(module, (Balancer, Whiten)):
            module.forward = lambda x: x
    model.eval().training = training
    return model
