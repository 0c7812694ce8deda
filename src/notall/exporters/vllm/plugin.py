"""vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`.

After it, `vllm serve DIR` runs a regrouped checkpoint on vLLM's native classes, and needs no `--trust-remote-code`.
"""

from __future__ import annotations

# The architectures whose native classes `models` regroups.
NATIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma2", "phi3", "mixtral", "qwen3_moe")


def register() -> None:
    """Make vLLM and its transformers know the regrouped forms of `NATIVE`. Nothing of the models is imported yet."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm import ModelRegistry

    from ..remote_code import classes_of, model_type_of

    for base in NATIVE:
        name, model_type = classes_of(base), model_type_of(base)
        config = type(name["AutoConfig"], (CONFIG_MAPPING[base],), {"model_type": model_type})
        AutoConfig.register(model_type, config, exist_ok=True)
        ModelRegistry.register_model(
            name["AutoModelForCausalLM"], f"notall.exporters.vllm.models:{name['AutoModelForCausalLM']}"
        )
