# SPDX-License-Identifier: Apache-2.0
"""The LoRA adapter that a job asks for (Hu et al. 2021, arXiv:2106.09685), and the layers of a model that get it.

All that can be wrong with it is found on the model's skeleton, before any weights load.
"""

import copy
import difflib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils
from transformers.pytorch_utils import Conv1D

from llm_trainer.common.errors import UserError, cut_quote, quote_error
from llm_trainer.config.sections import MOVING_STARTS, AdapterSettings, ModelSettings
from llm_trainer.model.adapter_file import build_trained_config
from llm_trainer.model.kinds.tower import list_tower, name_parts
from llm_trainer.model.layers.reward_head import HEAD, compute_states, find_head, is_reward_model
from llm_trainer.model.parameter_roles import holds_experts

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output layer
LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # PEFT has LoRA layers for these
DECOMPOSING = (*MOVING_STARTS, "loftq")  # these begin with a part of each matrix, or of its quantization error
PROBED_ROWS, PROBED_TOKENS = 2, 8
OTHER_TARGETS = "leave it out, or use target_modules=auto."  # what to do about a target that is refused
# The layers that a text trains, by the class and the config of a model: a job asks several times.
PROBED: dict[tuple[type[PreTrainedModel], str], set[str] | None] = {}
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def find_base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model below an adapter, or the model itself where it has none."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def build_lora_config(
    model_settings: ModelSettings, settings: AdapterSettings, skeleton: PreTrainedModel
) -> LoraConfig:
    """Return PEFT's config of the adapter: a new one, or the earlier one that is trained on.

    `skeleton` is the base model, with or without its weights. Raise UserError for targets that the model lacks, and for
    options that PEFT cannot apply to them.
    """
    if settings.goes_on:
        return build_trained_config(settings)
    modules, parameters = choose_targets(model_settings, settings, skeleton)
    # PEFT's own LoftQ quantizes a whole base by itself. Ours (lora_init) begins on a quantized base.
    init = settings.init_lora_weights
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules,
        target_parameters=parameters,
        exclude_modules=exclude_tower(settings, skeleton),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if init in ("default", "loftq") else init,
        bias="none",
        **describe_task(skeleton),
    )
    check_targets(config, settings, skeleton)
    return config


def exclude_tower(settings: AdapterSettings, skeleton: PreTrainedModel) -> str | None:
    """Return a regular expression of modules that get no adapter though their names are asked for: a frozen tower's."""
    parts = [] if settings.train_vision or settings.target_modules == "auto" else name_parts(skeleton)
    return rf"({'|'.join(map(re.escape, parts))})(\..*)?" if parts else None


def describe_task(skeleton: PreTrainedModel) -> dict[str, Any]:
    """Return the fields of PEFT's config that tell what the model is for. A reward model's head is trained whole."""
    if is_reward_model(skeleton.config):
        return {"task_type": TaskType.SEQ_CLS, "modules_to_save": [HEAD]}
    return {"task_type": TaskType.CAUSAL_LM}


def check_targets(config: LoraConfig, settings: AdapterSettings, skeleton: PreTrainedModel) -> None:
    """Raise UserError for targets that the model lacks, and for options that PEFT cannot apply to them.

    Names that experts bore in Transformers 4 become, in the config, those of the parameters that hold them now.
    """
    problems = list(find_absent_targets(config, skeleton))
    if not problems:
        try:
            convert_peft_config_for_transformers(config, skeleton, conversions=None)
        except ValueError as error:
            raise UserError(f"target_modules={settings.target_modules!r}: {quote_error(error)}.") from error
        problems = list(find_unsupported_options(config, settings, skeleton))
    if problems:
        raise UserError(*problems)


def choose_targets(
    model_settings: ModelSettings, settings: AdapterSettings, skeleton: PreTrainedModel
) -> tuple[str | list[str], list[str] | None]:
    """Return `target_modules` and `target_parameters` as PEFT reads them.

    PEFT matches a string against whole module paths. A plain name must become a list, which matches a path's end.
    """
    targets, parameters = settings.target_modules, settings.target_parameters
    if targets == "auto":
        packed = model_settings.load_in_4bit or model_settings.load_in_8bit
        modules, weights = find_linear_layers(skeleton, settings.train_vision)
        # A quantized matrix has no shape that an adapter of the bare parameter could follow.
        experts = (find_expert_parameters(skeleton) if parameters is None else parameters) + ([] if packed else weights)
        if not (modules or experts):
            raise UserError("target_modules=auto: the model has no linear layer in its decoder; give another model.")
        return modules, experts or None
    if isinstance(targets, str) and targets != ALL_LINEAR and re.fullmatch(r"[\w.]+", targets):
        return [targets], parameters
    return targets, parameters


def find_linear_layers(model: PreTrainedModel, with_tower: bool = False) -> tuple[list[str], list[str]]:
    """Return the linear layers that a text trains, and those of the tower if asked, as names of modules and of weights.

    A layer goes by its weight where PEFT would take the layer's name for one that experts bore in Transformers 4.
    """
    names = [*list_trained_layers(model), *(list_tower_layers(model) if with_tower else ())]
    leaves = {name.rpartition(".")[2] for name in names}
    taken = {leaf for leaf in leaves if is_taken_for_experts(leaf, model)}
    modules = [name for name in names if name.rpartition(".")[2] not in taken]
    weights = [f"{name}.weight" for name in names if name.rpartition(".")[2] in taken]
    parameters = [name for name, _ in model.named_parameters()]
    return (
        shorten_names(modules, [name for name, _ in model.named_modules()]),
        shorten_names(weights, parameters, parts=3),
    )


def list_trained_layers(model: PreTrainedModel) -> list[str]:
    """Return the whole names of the linear layers that a text trains.

    Left out are the output layer, the routers, and layers that share their weight or are no plain linear layers. So is
    what PEFT refuses: kernels of Mamba read those weights directly.
    """
    trained = find_trained_layers(model)
    names = keep_adaptable(model, list_decoder_layers(model))
    return [name for name in names if trained is None or name in trained]


def list_tower_layers(model: PreTrainedModel) -> list[str]:
    """Return the whole names of the linear layers that a model sees images with, without those that take no adapter."""
    tower = {*list_tower(model)}
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, LINEAR)]
    return keep_adaptable(model, [(name, layer) for name, layer in layers if f"{name}.weight" in tower])


def keep_adaptable(model: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> list[str]:
    """Return the names of the layers that take an adapter of their own."""
    left_out = {*find_routers(model), *find_shared_layers(model)}
    return [
        name
        for name, layer in layers
        if name not in left_out and is_plain(layer) and not is_refused_by_peft(name, model)
    ]


def list_decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the decoder's linear layers with their names, without the output layer and a tower within.

    Where a class names its output layer as its decoder, these are all linear layers.
    """
    output, tower = find_head(model), {*list_tower(model)}
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, LINEAR) and each is not output]
    layers = [(name, layer) for name, layer in layers if f"{name}.weight" not in tower]
    decoder = set(model.get_decoder().modules())
    return [(name, layer) for name, layer in layers if layer in decoder] or layers


def find_trained_layers(model: PreTrainedModel) -> set[str] | None:
    """Return the names of the linear layers that a text trains, or None where this cannot be found.

    Adapters of others get no gradient, and ranks would wait in vain for it. They are towers for images, and attention
    to an encoder that is not there. The weight of others is read without a call, as Mamba's `dt_proj`, or only chooses
    tokens, as DeepSeek V3.2's indexer.
    """
    key = type(model), model.config.to_json_string(use_diff=False)
    if key not in PROBED:
        found = probe_layers(copy.deepcopy(model), torch.device("meta"))
        # Where code asks whether its tensors have numbers, those of this mode say no; it takes ten times as long.
        PROBED[key] = probe_layers(copy.deepcopy(model), FakeTensorMode()) if found is None else found
    return PROBED[key]


def has_idle_layers(model: PreTrainedModel) -> bool:
    """Tell whether texts pass over linear layers of the decoder, such as those of Mllama that attend to an image."""
    trained = find_trained_layers(model)
    return trained is not None and any(name not in trained for name, _ in list_decoder_layers(model))


def probe_layers(probe: PreTrainedModel, numberless: AbstractContextManager[Any]) -> set[str] | None:
    """Return what `find_trained_layers` does. Each layer's output gets a zero added, as a new adapter adds it.

    Tensors that are made within `numberless` have no numbers. The zeros that autograd would go back to belong to
    trained layers. It need not go, which takes twice as long as the forward pass.
    """
    zeros: dict[str, torch.Tensor] = {}
    for name, module in probe.named_modules():
        if isinstance(module, LINEAR) and is_plain(module):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: (
                    output + zeros.setdefault(name, torch.zeros((), requires_grad=True))
                )
            )
    try:
        if probe._can_set_experts_implementation():
            probe.set_experts_implementation("batched_mm")  # the plain loop asks for numbers
        with numberless, torch.enable_grad(), take_rows_as_whole():
            probe._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
            rows = torch.zeros(PROBED_ROWS, PROBED_TOKENS, dtype=torch.long)
            reached = list_leaves(compute_states(probe, input_ids=rows))
    except Exception:  # the code of any model runs here, which may ask for numbers
        return None
    return {name for name, zero in zeros.items() if id(zero) in reached}


@contextmanager
def take_rows_as_whole() -> Iterator[None]:
    """Have Transformers, within the block, not ask the numbers of positions whether sequences share a row."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def list_leaves(result: torch.Tensor) -> set[int]:
    """Return the ids of the tensors that would get a gradient from a result."""
    nodes, to_visit = set(), [result.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            to_visit += [earlier for earlier, _ in node.next_functions]
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def is_plain(module: nn.Module) -> bool:
    """Tell whether a module computes what PEFT's adapter for its kind adds to. `module` is of a kind in ADAPTABLE.

    A class with a forward of its own may not, as the grouped layer of DeepSeek V4 or a router that returns choices.
    """
    kind = next(kind for kind in ADAPTABLE if isinstance(module, kind))
    if type(module).forward is kind.forward:
        return True
    if isinstance(module, nn.Embedding):
        return hasattr(module, "embed_scale")  # PEFT applies it to the adapter, too
    return isinstance(module, nn.Linear) and keeps_rows(module)


def keeps_rows(layer: nn.Linear) -> bool:
    """Tell whether a linear layer turns each row of `in_features` numbers into one of `out_features`."""
    weight = layer.weight
    rows = torch.empty(PROBED_ROWS, PROBED_TOKENS, layer.in_features, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            output = layer(rows)
    except Exception:  # the code of any model runs here, which may need other inputs
        return False
    return isinstance(output, torch.Tensor) and output.shape == (*rows.shape[:-1], layer.out_features)


def is_refused_by_peft(name: str, model: PreTrainedModel) -> bool:
    """Tell whether PEFT puts no adapter on a module of this name and of this kind of model."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def find_expert_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of parameters that hold a matrix for each expert: (experts, in, out) or (experts, out, in).

    PEFT's ParamWrapper reads from `is_transposed` which of the two it is. Where a class does not say (Llama 4), A and B
    change places. Their product, which is all that the model sees, has the parameter's shape either way.
    """
    names = [name for name, _ in model.named_parameters()]
    fused = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if holds_experts(prefix, module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
    return shorten_names(fused, names, parts=3)


def find_routers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of linear layers that weigh experts.

    These are the layers of a `router`, and those beside `experts` that have at most one output for each expert.
    """
    for name, module in model.named_modules():
        if "router" in name.split(".") and isinstance(module, nn.Linear):
            yield name
        block, _, leaf = name.rpartition(".")
        if leaf != "experts":
            continue
        num_experts = max([len(p) for p in module.parameters() if p.ndim == 3], default=len(list(module.children())))
        for other, linear in model.get_submodule(block).named_modules():
            is_expert = other == "experts" or other.startswith("experts.")
            if isinstance(linear, nn.Linear) and not is_expert and linear.out_features <= num_experts:
                yield f"{block}.{other}"


def find_shared_layers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of linear layers whose weight others have, too, as in the blocks that Zamba repeats.

    Each place would get an adapter of its own, and the one weight could not take all of them when they are merged.
    """
    layers = [item for item in model.named_modules(remove_duplicate=False) if isinstance(item[1], LINEAR)]
    uses = Counter(layer.weight for _, layer in layers)
    yield from (name for name, layer in layers if uses[layer.weight] > 1)


def is_taken_for_experts(name: str, model: PreTrainedModel) -> bool:
    """Tell whether PEFT takes a module's name for one that experts bore in Transformers 4."""
    probe = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(probe, model, conversions=None)
    except ValueError:  # one of two names that only together make a fused parameter
        return True
    return not probe.target_modules


def shorten_names(names: list[str], all_names: list[str], parts: int = 1) -> list[str]:
    """Return the last parts of the names, or whole names where another name of the model ends in the same parts."""
    wanted = set(names)
    shorts: dict[str, list[str]] = {}
    for name in names:
        shorts.setdefault(shorten_name(name, parts), []).append(name)
    strangers = {shorten_name(name, parts) for name in all_names if name not in wanted}
    return sorted(chosen for short, long in shorts.items() for chosen in (long if short in strangers else [short]))


def shorten_name(name: str, parts: int) -> str:
    """Return the last dotted parts of a name."""
    return ".".join(name.split(".")[-parts:])


def find_absent_targets(config: LoraConfig, model: PreTrainedModel) -> Iterator[str]:
    """Yield a sentence for each target that the model lacks, or that takes no adapter."""
    modules = {name: module for name, module in model.named_modules() if name}
    existing = list_adaptable(modules)
    targets = config.target_modules
    if hides_all_targets(config, model):
        asked = targets if isinstance(targets, str) else sorted(targets or ())
        yield f"target_modules={asked!r} lies in {', '.join(name_parts(model))} alone: set train_vision=true."
        return
    if isinstance(targets, str) and targets != ALL_LINEAR:
        if not any(re.fullmatch(targets, name) for name in modules):
            yield f"target_modules={targets!r} matches no module's path: {describe_existing(existing)}."
        return
    for target in sorted(targets or ()) if targets != ALL_LINEAR else ():
        hit = [module for name, module in modules.items() if matches_end(name, target)]
        if not hit and not is_taken_for_experts(target, model):
            yield f"target_modules: the model has no {target!r}; {suggest_nearest(target, existing)}."
        elif hit and not any(isinstance(module, ADAPTABLE) for module in hit):
            kind = type(hit[0]).__name__
            yield f"target_modules: {target!r} is a {kind}, which takes no adapter; {describe_existing(existing)}."
    parameters = [name for name, _ in model.named_parameters()]
    for target in sorted(config.target_parameters or ()):
        if not any(matches_end(name, target) for name in parameters):
            nearest = suggest_nearest(target, find_expert_parameters(model))
            yield f"target_parameters: the model has no {target!r}; {nearest}."


def hides_all_targets(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Tell whether all modules that get an adapter by their name are excluded, and there are some."""
    modules, everywhere = list(model.named_modules()), replace(config, exclude_modules=None)
    found, left = (
        any(is_target(each, name, module, model) for name, module in modules) for each in (everywhere, config)
    )
    return found and not left


def list_adaptable(modules: dict[str, nn.Module]) -> list[str]:
    """Return the last parts of the names of modules that take an adapter, such as `q_proj`, each once."""
    names = [name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, ADAPTABLE)]
    return list(dict.fromkeys(names))


def matches_end(name: str, target: str) -> bool:
    """Tell whether PEFT takes a target of a list for this name."""
    return name == target or name.endswith(f".{target}")


def suggest_nearest(target: str, existing: list[str]) -> str:
    """Return the end of a sentence that names the nearest target, if there is one, and those that exist."""
    close = difflib.get_close_matches(target, existing, n=1, cutoff=0.5)
    return f"the nearest is {close[0]!r}, and {describe_existing(existing)}" if close else describe_existing(existing)


def describe_existing(existing: list[str]) -> str:
    """Return the end of a sentence that names the targets that exist."""
    return f"there are {cut_quote(', '.join(existing))}" if existing else "there are no experts in one parameter"


def find_unsupported_options(config: LoraConfig, settings: AdapterSettings, model: PreTrainedModel) -> Iterator[str]:
    """Yield a sentence for each option that PEFT's layers cannot apply to these targets."""
    if config.target_parameters:
        yield from find_parameter_problems(config.target_parameters, settings)
    yield from find_refused_targets(config, model)
    init = settings.init_lora_weights
    targets = {name: module for name, module in model.named_modules() if is_linear_target(config, name, module, model)}
    if init == "olora" and any(isinstance(module, Conv1D) for module in targets.values()):
        yield f"init_lora_weights=olora: PEFT cannot decompose the Conv1D layers of {type(model).__name__}; use pissa."
    if init in DECOMPOSING:
        shapes = {name: module.weight.shape for name, module in targets.items()}
        smallest = min(shapes, key=lambda name: min(shapes[name]), default=None)
        if smallest and min(shapes[smallest]) < settings.lora_r:
            yield (
                f"lora_r={settings.lora_r} with init_lora_weights={init}: the matrix of {smallest} has only "
                f"rank {min(shapes[smallest])}; lower lora_r to that."
            )


def find_refused_targets(config: LoraConfig, model: PreTrainedModel, fix: str = OTHER_TARGETS) -> Iterator[str]:
    """Yield a sentence, which ends in the fix, where a target is the output layer, or one that PEFT refuses."""
    targets = [(name, module) for name, module in model.named_modules() if is_target(config, name, module, model)]
    output = find_head(model)
    if is_reward_model(model.config) and any(module is output for _, module in targets):
        yield f"target_modules: {HEAD} is the head of the reward model, which is trained whole: {fix}"
    elif name := next((name for name, module in targets if module is output), None):
        yield (
            f"target_modules: {name} is the output layer, whose weights the loss reads without calling it, so that an "
            f"adapter on it would never be trained: {fix}"
        )
    if name := next((name for name, _ in targets if is_refused_by_peft(name, model)), None):
        yield (
            f"target_modules: {name}: PEFT puts no adapter there in a model of type {model.config.model_type}, whose "
            f"kernels read its weight without calling it: {fix}"
        )
    adaptable = [(name, module) for name, module in targets if isinstance(module, ADAPTABLE)]
    if odd := next(((name, type(module)) for name, module in adaptable if not is_plain(module)), None):
        yield (
            f"target_modules: {odd[0]} is a {odd[1].__name__}, which computes something else than the layer that PEFT "
            f"has an adapter for: {fix}"
        )
    weights = {f"{name}.weight" for name, module in model.named_modules() if module is output}
    for target in config.target_parameters or ():
        if any(matches_end(name, target) for name in weights):
            yield f"target_parameters: {target} is the output layer's weight, which takes no adapter: {fix}"


def find_parameter_problems(parameters: list[str], settings: AdapterSettings) -> Iterator[str]:
    """Yield a sentence for each option that PEFT has for adapters on modules alone, not on parameters."""
    subject = f"adapters on parameters ({cut_quote(', '.join(sorted(parameters)))})"
    fix = "or name linear layers alone with target_modules"
    init = settings.init_lora_weights
    if settings.lora_dropout:
        yield f"lora_dropout={settings.lora_dropout:g} with {subject}: PEFT has no dropout there; set 0, {fix}."
    if settings.use_dora:
        yield f"use_dora=true with {subject}: PEFT has DoRA for modules only; set it to false, {fix}."
    if init not in ("default", "gaussian"):
        yield f"init_lora_weights={init} with {subject}: PEFT has only default and gaussian there; use one, {fix}."


def is_linear_target(config: LoraConfig, name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    """Tell whether a module is a linear layer that gets an adapter."""
    return isinstance(module, LINEAR) and is_target(config, name, module, model)


def is_target(config: LoraConfig, name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    """Tell whether PEFT takes a module for one that gets an adapter."""
    targets, excluded = config.target_modules, config.exclude_modules
    if isinstance(excluded, str) and re.fullmatch(excluded, name):
        return False
    if targets == ALL_LINEAR:
        return isinstance(module, LINEAR) and module is not find_head(model)
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(matches_end(name, target) for target in targets or ())


def count_targets(model: PeftModel) -> dict[str, int]:
    """Return how many modules and parameters of each name got an adapter, such as {"self_attn.q_proj": 32}."""
    tuner = model.base_model
    names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    return dict(Counter(LAYER_NUMBER.sub("N", name).rpartition(".N.")[2] for name in names))


def describe_adapter(model: PeftModel) -> str:
    """Return a line for the log about the layers that got an adapter."""
    config = model.active_peft_config
    targets = ", ".join(f"{count} x {name}" for name, count in count_targets(model).items())
    return f"Adapter on {targets}; lora_dropout={config.lora_dropout:g}"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained weights, and of all. A matrix in 4 bit counts its numbers, not its bytes."""
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
        return trained, total
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
