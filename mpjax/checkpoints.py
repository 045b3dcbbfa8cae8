"""Checkpoints of a whole training run, by orbax: ``import mpjax.checkpoints``.

Orbax comes with ``pip install 'mpjax[checkpoints]'``.
"""

from mpjax._checkpoints.restoring import restore
from mpjax._checkpoints.saving import save

__all__ = ["restore", "save"]
