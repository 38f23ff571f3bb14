# SPDX-License-Identifier: Apache-2.0
"""Rules about the settings of training methods: what belongs to another method, and what TRL would refuse late."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llm_trainer.config.rules.rule import Rule
from llm_trainer.config.sections import (
    IMAGE_METHODS,
    IMITATION_METHODS,
    METHOD_FIELDS,
    METHOD_FORMATS,
    MOVING_STARTS,
    OWN_METHOD_FIELDS,
    WITHOUT_DIVERGENCE,
)
from llm_trainer.config.trl_config_fields import read_snapshot

# Settings that this project acts on itself, whether or not TRL's config of the method has them.
FOR_ALL_METHODS = frozenset(
    {"max_length", "truncation_mode", "packing", "padding_free", "shuffle_dataset", "dataset_num_proc", "pad_token"}
    | {"activation_offloading", "chat_template_path", "eos_token"}
)
# The same for methods whose rows are those of SFT.
FOR_IMITATION = frozenset({"assistant_only_loss", "completion_only_loss", "eval_packing", "packing_strategy"})
# Losses of DPO that are made of the difference between the two answers' rewards alone.
DIFFERENCE_LOSSES = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"},
)
# Why a reward model begins with a base alone. The head of rewards is no part of an adapter of SFT.
EARLIER_ADAPTER = "a reward model begins with a base; set merge_adapter=true, which merges the adapter first."
SORTING_LOSSES = frozenset({"aot", "aot_unpaired"})  # these lose which answer belongs to which prompt


def list_losses(method: str, loss_type: str | list[str] | None) -> list[str]:
    """Return the names of the losses that `loss_type` asks for; the method's own where it is None.

    None come back for a method that has only one.
    """
    own = METHOD_FIELDS["loss_type"].get(method)
    losses = (loss_type or own.default) if own else []
    return [losses] if isinstance(losses, str) else list(losses)


def is_of_method(name: str, method: str) -> bool:
    """Tell whether a method has this setting: a field of its config, or one that is this project's own."""
    if name in OWN_METHOD_FIELDS:
        return method in OWN_METHOD_FIELDS[name]
    if name in FOR_IMITATION and method in IMITATION_METHODS:
        return True
    is_field = name in METHOD_FIELDS or name in read_snapshot()
    return not is_field or name in FOR_ALL_METHODS or name in read_snapshot(method)


def list_methods(name: str) -> list[str]:
    """Return the methods that have a setting."""
    if name in OWN_METHOD_FIELDS:
        return list(OWN_METHOD_FIELDS[name])
    return list(IMITATION_METHODS if name in FOR_IMITATION else METHOD_FIELDS.get(name, ["sft"]))


def find_foreign(method: str, given: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield each given setting that the method does not have, with the methods that have it."""
    for name, value in given.items():
        if value is not None and not is_of_method(name, method):
            yield {"foreign": name, "methods": " or ".join(list_methods(name))}


def find_unknown_losses(method: str, loss_type: str | list[str] | None) -> Iterator[dict[str, str]]:
    """Yield each loss that the method does not have, with those that it has."""
    own = METHOD_FIELDS["loss_type"].get(method)
    choices = (own and own.choices) or []
    for loss in list_losses(method, loss_type):
        if loss not in choices:
            yield {"loss": loss, "choices": ", ".join(choices)}


def refuse_losses(names: tuple[str, ...], when: Callable[[list[str], Any], bool], message: str) -> Rule:
    """Return a rule about the losses of a job and the settings of its method, which `when` takes."""
    return Rule(
        names,
        lambda s: when(list_losses(s.data.method, s.methods.loss_type), s.methods),
        message,
        lambda s: [{"losses": ", ".join(list_losses(s.data.method, s.methods.loss_type))}],
    )


def switches_dropout_off(method: str, disable_dropout: bool | None) -> bool:
    """Tell whether the method trains without dropout, as it does by its own default where `disable_dropout` is None."""
    own = METHOD_FIELDS["disable_dropout"].get(method)
    return own is not None and bool(own.default if disable_dropout is None else disable_dropout)


def refuse_reference_sync(name: str) -> Rule:
    """Return the rule that the reference does not follow the training, which this setting is about."""
    return Rule(
        (name,),
        lambda s: bool(s.value(name)),
        f"{name}={{{name}}}: the reference is the model that the job starts from, and no second model is kept that "
        "could follow the training; remove it.",
    )


def refuse_single_row(name: str) -> Rule:
    """Return the rule that KTO estimates its divergence on more than one row, which this setting is about."""
    return Rule(
        (name, "loss_type"),
        lambda s: s.data.method == "kto" and s.value(name) == 1 and s.methods.loss_type != WITHOUT_DIVERGENCE,
        f"{name}={{{name}}} with method=kto: its divergence is a mean over the rows that devices compute at once, and "
        "one row tells too little; give at least 2, or loss_type=apo_zero_unpaired.",
    )


def refuse_for_rewards(name: str, when: Callable[[Any], bool], reason: str) -> Rule:
    """Return the rule that a reward model has no use for values of a setting: those for which `when` holds."""
    return Rule(
        (name, "method"),
        lambda s: s.data.trains_rewards and s.is_given(name) and when(s.value(name)),
        f"{name}={{{name}}} with method=reward: {reason}",
    )


# Settings with values that fit no reward model, and why.
UNFIT_FOR_REWARDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "init_lora_weights",
        lambda init: init in (*MOVING_STARTS, "loftq"),
        "the adapter holds the head too, which its difference from such a start would not; use default.",
    ),
    ("sample_prompts", bool, "a reward model answers no prompts; remove it."),
)
METHOD_RULES = (
    Rule(
        ("adapter_path", "method"),
        lambda s: s.data.trains_rewards and s.adapter.goes_on,
        "adapter_path={adapter_path} with method=reward: " + EARLIER_ADAPTER,
    ),
    Rule(
        ("method",),
        lambda s: any(find_foreign(s.data.method, s.given)),
        "{foreign} is a setting of method={methods} and this job has method={method}: remove it, or set method.",
        lambda s: find_foreign(s.data.method, s.given),
    ),
    Rule(
        ("loss_type", "method"),
        lambda s: any(find_unknown_losses(s.data.method, s.methods.loss_type)),
        "loss_type={loss} with method={method}, which has {choices}: take one of these.",
        lambda s: find_unknown_losses(s.data.method, s.methods.loss_type),
    ),
    Rule(
        ("packing", "method"),
        lambda s: s.data.method not in IMITATION_METHODS and bool(s.data.packing),
        f"packing=true with method={{method}}: only rows of method={' and '.join(IMITATION_METHODS)} fill sequences of "
        "max_length; leave it out, and the answers of a batch share sequences.",
    ),
    Rule(
        ("streaming", "method"),
        lambda s: s.data.method != "sft" and s.data.streaming,
        "streaming=true with method={method}: only method=sft streams; remove it.",
    ),
    Rule(
        ("dataset_format", "method"),
        lambda s: s.data.dataset_format not in ("auto", *METHOD_FORMATS[s.data.method]),
        "dataset_format={dataset_format} with method={method}, whose rows are {choices}: leave it out, or set method.",
        lambda s: [{"choices": " or ".join(METHOD_FORMATS[s.data.method])}],
    ),
    Rule(
        ("train_vision", "method"),
        lambda s: s.data.method not in IMAGE_METHODS and s.adapter.train_vision,
        "train_vision=true with method={method}: its rows have no images, and the vision tower would learn nothing; "
        "remove it, or set method=sft or dpo.",
    ),
    *(refuse_single_row(name) for name in ("per_device_train_batch_size", "global_batch_size")),
    refuse_losses(
        ("loss_weights", "loss_type"),
        lambda losses, methods: methods.loss_weights is not None and len(methods.loss_weights) != len(losses),
        "loss_weights={loss_weights!r} with loss_type={losses}: each loss has one weight; give as many.",
    ),
    refuse_losses(
        ("loss_type", "label_smoothing"),
        lambda losses, methods: "exo_pair" in losses and not methods.label_smoothing,
        "loss_type=exo_pair without label_smoothing: this loss is infinite without it; set it, to 0.001 for example.",
    ),
    refuse_losses(
        ("loss_type", "label_smoothing"),
        lambda losses, methods: "robust" in losses and (methods.label_smoothing or 0) >= 0.5,
        "loss_type=robust with label_smoothing={label_smoothing}: the share of wrong labels has to be below 0.5; lower "
        "it.",
    ),
    refuse_losses(
        ("f_divergence_type", "loss_type"),
        lambda losses, methods: (
            methods.f_divergence_type not in (None, "reverse_kl") and not DIFFERENCE_LOSSES.issuperset(losses)
        ),
        "f_divergence_type={f_divergence_type} with loss_type={losses}: only "
        f"{', '.join(sorted(DIFFERENCE_LOSSES))} have other divergences; leave it out, or take one of them.",
    ),
    refuse_losses(
        ("use_weighting", "loss_type"),
        lambda losses, methods: bool(methods.use_weighting) and not SORTING_LOSSES.isdisjoint(losses),
        "use_weighting=true with loss_type={losses}: aot and aot_unpaired sort the answers of a batch, so that no "
        "weight would find its pair; remove one of them.",
    ),
    Rule(
        ("lora_dropout", "disable_dropout"),
        lambda s: bool(s.adapter.lora_dropout) and switches_dropout_off(s.data.method, s.methods.disable_dropout),
        "lora_dropout={lora_dropout} with method={method}: it would do nothing, since this method trains without "
        "dropout; remove it, or set disable_dropout=false.",
    ),
    Rule(
        ("label_smoothing_factor", "method"),
        lambda s: s.data.method != "sft" and bool(s.training.label_smoothing_factor),
        "label_smoothing_factor={label_smoothing_factor} with method={method}: it would do nothing; remove it.",
    ),
    *(refuse_for_rewards(name, when, reason) for name, when, reason in UNFIT_FOR_REWARDS),
    *(refuse_reference_sync(name) for name in ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")),
)
