# SPDX-License-Identifier: Apache-2.0
"""Rules about the settings of methods whose model writes what it is trained on: what is not offered, or fails late."""

from importlib.util import find_spec

from llm_trainer.config.rules.rule import Rule
from llm_trainer.config.sections import GENERATION_METHODS, MethodSettings


def has_reference(method: str, methods: MethodSettings) -> bool:
    """Tell whether the loss of a method that generates compares with a reference."""
    return method in GENERATION_METHODS and bool(methods.find_value("beta", method))


def refuse_generation(name: str, reason: str) -> Rule:
    """Return the rule that a setting is not offered, for a reason with its fix."""
    return Rule((name,), lambda s: s.data.generates and bool(s.value(name)), f"{name}={{{name}}}: {reason}")


GENERATION_RULES = (
    Rule(
        ("use_vllm",),
        lambda s: s.data.generates and bool(s.methods.use_vllm) and find_spec("vllm") is None,
        "use_vllm=true and vllm is not installed in this image: remove it, and Transformers generates.",
    ),
    Rule(
        ("beta", "use_peft"),
        lambda s: has_reference(s.data.method, s.methods) and not s.adapter.use_peft,
        "method={method} with use_peft=false and beta above 0: the reference would be a second model in memory, which "
        "is not offered; set beta=0, or train an adapter, whose reference is the base.",
    ),
    Rule(
        ("steps_per_generation", "generation_batch_size"),
        lambda s: s.methods.steps_per_generation is not None and s.methods.generation_batch_size is not None,
        "steps_per_generation={steps_per_generation} with generation_batch_size={generation_batch_size}: both say how "
        "much is generated at once; remove one of them.",
    ),
    *(
        Rule(
            (name, "global_batch_size"),
            lambda s, name=name: (  # type: ignore[misc]
                s.value(name) is not None
                and s.training.global_batch_size is not None
                and not s.training.is_given("per_device_train_batch_size")
            ),
            f"{name}={{{name}}} with global_batch_size and without per_device_train_batch_size: the job would choose "
            "how many completions are generated at once; give it, too.",
        )
        for name in ("steps_per_generation", "generation_batch_size")
    ),
    refuse_generation(
        "use_transformers_continuous_batching",
        "TRL casts the trained weights to 16 bit for it, and the training would go on with them; remove it.",
    ),
    refuse_generation(
        "log_completions",
        "it prints tables; completions and their rewards are in the journal and in report.html without it; remove it.",
    ),
    refuse_generation("log_completions_hub_repo", "completions stay in the job's output; remove it."),
    refuse_generation(
        "chat_template_kwargs", "prompts are written by the template alone; give another one with chat_template_path."
    ),
    refuse_generation(
        "cast_lm_head_to_fp32", "the result would compute with other numbers than the training did; remove it."
    ),
    refuse_generation(
        "activation_offloading", "TRL's trainer of this method has no offloading; use gradient_checkpointing=true."
    ),
    refuse_generation("max_tool_calling_iterations", "no tools are called while completions are written; remove it."),
)
