# SPDX-License-Identifier: Apache-2.0
"""The metric line, `train_loss=0.5123; step=20; ...`: its metrics, its format, and SageMaker's definitions of them."""

from collections.abc import Iterable

METRICS = {
    "train_loss": "loss on the tokens that are trained on",
    "train_token_accuracy": "share of these tokens that the model held for the likeliest",
    "aux_loss": "loss that balances the experts of a mixture",
    "grad_norm": "norm of all gradients, before clipping",
    "learning_rate": "of the last step",
    "tokens": "read since the first step, on all devices",
    "tokens_per_second": "of all devices, since the last line, without evaluations and checkpoints",
    "tokens_per_second_per_device": "the same of one GPU",
    "seconds_per_step": "since the last line, without evaluations and checkpoints",
    "mfu": "model FLOPs utilization: share of the GPU's peak in 16 bit that training took",
    "memory_gib": "most that torch held of the first GPU so far, or the process of a CPU's memory",
    "eval_loss": "train_loss of the validation data",
    "eval_mean_token_accuracy": "train_token_accuracy of the validation data",
    "eval_aux_loss": "aux_loss of the validation data",
    "eval_runtime": "seconds that the evaluation took",
    "eval_samples_per_second": "rows evaluated a second",
    "eval_steps_per_second": "batches evaluated a second",
    "epoch": "passes over the training data so far",
    "step": "updates of the weights so far",
    "total_steps": "updates of the weights in all",
}
# Metrics that not every job logs.
CONDITIONAL_METRICS = {
    "aux_loss": "for a mixture of experts",
    "eval_aux_loss": "for a mixture of experts",
    "mfu": "on a GPU whose peak is known, in 16 bit",
}
# Metrics of one training method alone, in training and, with the prefix eval_, in evaluations.
METHOD_METRICS = {
    "dpo": {
        "rewards/accuracies": "share of pairs whose chosen answer has the higher reward",
        "rewards/margins": "reward of the chosen answer less the rejected one's",
        "rewards/chosen": "reward of the chosen answer: beta times its logarithm over the reference's",
        "rewards/rejected": "reward of the rejected answer",
        "logps/chosen": "logarithm of the chosen answer's probability",
        "logps/rejected": "logarithm of the rejected answer's probability",
    },
    "kto": {
        "rewards/margins": "mean reward of desirable answers less the undesirable ones'",
        "rewards/chosen": "reward of desirable answers: beta times the logarithm over the reference's",
        "rewards/rejected": "reward of undesirable answers",
        "logps/chosen": "logarithm of a desirable answer's probability",
        "logps/rejected": "logarithm of an undesirable answer's probability",
        "kl": "divergence from the reference, estimated on answers to other prompts",
    },
    "reward": {
        "accuracy": "share of pairs whose chosen answer has the higher reward",
        "margin": "reward of the chosen answer less the rejected one's",
        "mean_reward": "reward of an answer",
        "min_reward": "lower reward of a pair",
        "max_reward": "higher reward of a pair",
    },
    "distill": {
        "entropy": "entropy of the student's probabilities of a token, in nats",
    },
}
# Of methods whose model writes what it is trained on.
GENERATION_METRICS = {
    "reward": "mean over all completions of the weighted sum of their rewards",
    "reward_std": "its standard deviation",
    "frac_reward_zero_std": "share of completions whose group has one reward alone, from which nothing is learned",
    "completions/mean_length": "tokens of a completion",
    "completions/clipped_ratio": "share of completions that max_completion_length cut",
    "entropy": "of the tokens' probabilities in completions",
    "kl": "divergence from the reference, with beta above 0",
}
METHOD_METRICS |= dict.fromkeys(("grpo", "rloo"), GENERATION_METRICS)
# What automatic model tuning may be told to minimize, or, of an accuracy, to maximize.
OBJECTIVES = ("eval_loss", "train_loss", "eval_mean_token_accuracy")
METHOD_OBJECTIVES = {
    "dpo": ("eval_rewards/accuracies", "eval_rewards/margins"),
    "kto": ("eval_rewards/margins",),
    "reward": ("eval_accuracy", "eval_margin"),
    "grpo": ("eval_reward",),
    "rloo": ("eval_reward",),
}
# Transformers' names -> ours. The others keep their name.
RENAMED = {"loss": "train_loss", "mean_token_accuracy": "train_token_accuracy", "num_tokens": "tokens"}
MAX_DEFINITIONS = 40  # that CreateTrainingJob takes
# A finite number, since CloudWatch takes neither nan nor inf.
NUMBER = r"(-?[0-9.]+(?:e[-+]?[0-9]+)?)"


def format_line(metrics: dict[str, float]) -> str:
    """Return the metric line."""
    return "; ".join(f"{key}={format_number(value)}" for key, value in metrics.items())


def format_number(value: float) -> str:
    """Return a whole number as it is, and any other with six significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def list_metrics(method: str) -> dict[str, str]:
    """Return the metrics of a training method, with their meanings."""
    own = METHOD_METRICS.get(method, {})
    return METRICS | own | {f"eval_{name}": f"{name} of the validation data" for name in own}


def list_all_names() -> list[str]:
    """Return the names of all metrics of all methods."""
    return list(dict.fromkeys(name for method in ("sft", *METHOD_METRICS) for name in list_metrics(method)))


def list_objectives(method: str) -> tuple[str, ...]:
    """Return the metrics of a training method that automatic model tuning may be told to improve."""
    return OBJECTIVES + METHOD_OBJECTIVES.get(method, ())


def list_reward_metrics(rewards: Iterable[str]) -> dict[str, str]:
    """Return the metrics of rewards with these entries in `reward_functions`, with their meanings."""
    names = [f"rewards/{entry.rpartition(':')[2]}/mean" for entry in rewards]
    own = dict.fromkeys(names, "mean of this reward over the completions that have one")
    return own | {f"eval_{name}": f"{name} of the validation data" for name in names}


def define_metrics(method: str = "sft", rewards: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return MetricDefinitions as CreateTrainingJob takes them: at most 40, of one capture group each.

    `rewards` are the entries of `reward_functions`. Those of the last ones are left out where there are more.

    A key counts at the beginning of a line or after a semicolon: `Setting learning_rate=0.1` is no metric, and
    eval_loss is not read as train_loss.
    """
    names = [*list_metrics(method), *list_reward_metrics(rewards)]
    return [{"Name": key, "Regex": f"(?:^|; ){key}={NUMBER}"} for key in names[:MAX_DEFINITIONS]]
