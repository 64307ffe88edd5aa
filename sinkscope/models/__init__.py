"""load_model, and the adapter: the only package that knows TransformerLens, its versions and its classes.

TransformerLens 3.9 has TransformerBridge, HookedTransformer and HookedEncoder; 4.x has TransformerBridge alone. Models
are told apart by what they have (`hook_dict`, `cfg`), since merely asking 4.x for the old names raises.
"""

from sinkscope.models.adapter import Adapter
from sinkscope.models.adapting import SMOLLM2, adapt
from sinkscope.models.load import load_model
from sinkscope.models.looking import SIDES, adapt_side
from sinkscope.models.wrap import bridge, wrapped

__all__ = ["SIDES", "SMOLLM2", "Adapter", "adapt", "adapt_side", "bridge", "load_model", "wrapped"]
