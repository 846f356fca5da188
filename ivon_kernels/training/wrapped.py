"""Optimizer wrappers that imitate the class of what they wrap."""

from __future__ import annotations

from operator import attrgetter


def forward_public_names(cls: type, wrapped: type) -> None:
    """Let instances of `cls` answer with the attributes of their ``optimizer``, if `cls` is a wrapper.

    Lightning and Fabric give their wrapper a class that inherits from the wrapper and from the optimizer's class, so
    that ``isinstance`` holds. The optimizer's methods then run on the wrapper, which reads the optimizer's attributes
    but keeps what is written to itself: ``self.optimizers().train()`` would put a sample into the weights that the
    optimizer knows nothing of.

    Args:
        cls: A new subclass of `wrapped`.
        wrapped: The optimizer's class. Its public names are forwarded, except those that the wrapper defines.
    """
    # Classes between the new one and ours are the wrapper's own: what they define goes on meaning the wrapper.
    before = cls.__mro__[1 : cls.__mro__.index(wrapped)]
    own = {name for base in before if not issubclass(base, wrapped) for name in vars(base)}
    if not isinstance(next((vars(base)["optimizer"] for base in before if "optimizer" in vars(base)), None), property):
        return
    for name in dir(wrapped):
        if not name.startswith("_") and name not in own:
            setattr(cls, name, property(attrgetter(f"optimizer.{name}")))
