"""A transformers model with its experts run by epfuse: `python examples/transformers_model.py`."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from epfuse.integrations.transformers import replace_experts
from epfuse.parallel.group import EPGroup

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=16,
    num_experts_per_tok=4,
)
model = Qwen3MoeForCausalLM(config).eval()  # MiniMax-M3, Mixtral and others work the same way
tokens = torch.randint(config.vocab_size, (1, 48))
with torch.no_grad():
    before = model(tokens).logits
    replacement = replace_experts(model, EPGroup.single())  # under torchrun: EPGroup.current()
    after = model(tokens).logits
    replacement.revert()  # the untouched modules again

torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
error = (after - before).abs().max().item()
print(f"{len(replacement.experts)} experts modules replaced; the largest logit is {before.abs().max():.2f},")
print(f"and none changes by more than {error:.1e}")
