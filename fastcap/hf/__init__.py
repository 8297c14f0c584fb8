"""Captioning models of transformers, trained without the logits of their heads: `attach(model)`, `detach(model)`.

`families.py` is the table of supported models; `attach.py` patches one, in place, and `hooks.py` minds what others patched;
`loss.py` is the loss it then returns.
transformers itself is not imported: the models bring it.
"""

from .attach import attach, detach
from .families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "attach", "detach"]
