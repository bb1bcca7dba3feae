"""What would run on a GPU that is not here: `python examples/plan.py`."""

from epfuse import LayerShape, Target
from epfuse.policy import LayerRequest, Storage, plan_layer

# One rank of MiniMax-M3 on eight MI300X: 16 of 128 experts, in 57 layers.
shape = LayerShape(hidden=6144, intermediate=3072, experts=128, local_experts=16, top_k=4)
request = LayerRequest(
    target=Target.GFX942,
    shape=shape,
    ep_size=8,
    max_model_len=9472,
    layer=3,
    moe_layers=tuple(range(3, 60)),
    shared_experts=1,
    hbm_bytes=192 << 30,
)
plan = plan_layer(request)

print(f"Each layer keeps its experts as {plan.storage.value}: {plan.nbytes / 2**30:.2f} GiB a rank. {plan.reason}")
for storage, reason in plan.refused_storage:
    print(f"  not {storage.value} ({storage.bytes_of(shape) / 2**30:.2f} GiB): {reason}")
for tokens in (1, 64, 4096):
    decision = plan.at(tokens)
    print(f"{tokens} tokens run on {decision.path.value}, tiles {decision.tile_key}: {decision.reason}")

assert plan.storage is Storage.MXFP8
