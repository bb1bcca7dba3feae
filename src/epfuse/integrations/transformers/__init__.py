"""Run a transformers model's routed experts through epfuse: as an experts implementation, or expert-parallel.

register()
model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="epfuse")

group = EPGroup.current()                        # or EPGroup.single()
replacement = replace_experts(model, group)      # every rank holds its share of the experts from here on
model.generate(...)
replacement.revert()                             # the untouched modules again, if still wanted
"""

from epfuse.integrations.transformers.activation import activation_of
from epfuse.integrations.transformers.experts import EPExperts
from epfuse.integrations.transformers.interface import Layout, forget, register
from epfuse.integrations.transformers.layout import check_layout
from epfuse.integrations.transformers.replace import Replacement, replace_experts

__all__ = [
    "EPExperts",
    "Layout",
    "Replacement",
    "activation_of",
    "check_layout",
    "forget",
    "register",
    "replace_experts",
]
