"""vLLM with epfuse's experts where they apply, and vLLM untouched elsewhere.

| file | what it does |
| --- | --- |
| `plugin.py` | what vLLM calls in every process; decides whether to register at all |
| `releases.py` | which vLLM is installed, and which ones were tested |
| `interfaces.py` | whether an installed vLLM looks like a tested one, where epfuse touches it |
| `versions.py` | everything that differs between vLLM releases |
| `choice.py` | a layer's facts, the refusals and the policy (`epfuse.policy`) to one outcome |
| `takeover.py` | points vLLM's quantisation method at our experts |
| `layer.py` | the replacement of vLLM's RoutedExperts that asks for it |
| `experts.py` | vLLM's modular experts interface on `fused_experts` |
| `load.py` | what a layer's weights become after loading |
| `explain.py` | what a deployment does with every layer, without vLLM |
| `patch/` | the same for images where no plugin can be installed |

Only `versions.py`, `layer.py` and `experts.py` import vLLM.
"""
