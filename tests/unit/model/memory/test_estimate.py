# SPDX-License-Identifier: Apache-2.0
"""The estimate beside a real step, every tensor of it counted, and its parts."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from llm_trainer.config.schema import Settings
from llm_trainer.model.layers.kept_logits import KeptLogits
from llm_trainer.model.memory.batch import Batch
from llm_trainer.model.memory.estimate import Setup, estimate_memory, find_evaluation_peak
from llm_trainer.model.memory.shape import read_shape
from llm_trainer.model.memory.step_trace import HeldBytes, Step, trace_step

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
STEP = Step(
    num_sequences=2,
    length=128,
    has_mask=False,
    stores_scores=False,
    compute_dtype=torch.float32,
    recompute_activations=False,
    offload_activations=False,
    sharded=False,
    on_gpu=False,
)


def expect(
    settings=None,
    config=CONFIG,
    dtype=torch.float32,
    world_size=1,
    optim="adamw_torch",
    more=(),
    teacher=None,
    cache_bytes=0,
    **step,
):
    settings = settings or Settings(use_peft=False)
    shape = read_shape(config, settings.model, settings.adapter, dtype)
    setup = Setup(replace(STEP, **step), world_size, f"{optim}", False, *more, teacher=teacher, cache_bytes=cache_bytes)
    return estimate_memory(shape, setup)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kept", [7, 0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_step_holds_what_was_estimated(monkeypatch, attention, kept, dtype):
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", KeptLogits)
    settings, recomputes = Settings(use_peft=False), kept < 7
    step = {"recompute_activations": recomputes, "compute_dtype": dtype, "stores_scores": attention == "eager"}
    expected = expect(settings, optim="adamw_torch_fused", more=(kept if recomputes else 0,), **step)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation=attention).train()
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        for layer in model.model.layers[7 - kept :]:
            layer.gradient_checkpointing = False
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, 1000, (2, 128))
    with HeldBytes([*model.parameters(), *model.buffers(), ids], "step") as held:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(input_ids=ids, labels=ids, position_ids=torch.arange(128)[None], fused_lm_head=True)
        (-output.log_probs.sum()).backward()
        held.begin("over")
    assert not _get_current_dispatch_mode_stack()
    step_bytes = sum(expected.parts[name] for name in ("gradients", "activations", "working memory"))
    assert step_bytes == pytest.approx(held.spans["step"].peak, rel=0.05)


@pytest.mark.parametrize("sequences", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_evaluation_holds_what_was_estimated(monkeypatch, sequences, dtype):
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", KeptLogits)
    settings = Settings(use_peft=False)
    shape = read_shape(CONFIG, settings.model, settings.adapter, torch.float32)
    setup = Setup(replace(STEP, compute_dtype=dtype), 1, "sgd", accumulates=False, evaluated=Batch(sequences, 128))
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="sdpa").eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, 1000, (sequences, 128))
    with HeldBytes([*model.parameters(), *model.buffers(), ids], "evaluation") as held, torch.no_grad():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(input_ids=ids, labels=ids, position_ids=torch.arange(128)[None], fused_lm_head=True)
        held.begin("over")
    assert find_evaluation_peak(shape, setup).total == pytest.approx(held.spans["evaluation"].peak, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_distillation_holds_what_was_estimated(dtype):
    """The teacher has read the batch, of which its last hidden states are left."""
    teacher_config = LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": 256})
    settings = Settings(use_peft=False)
    teacher = read_shape(teacher_config, settings.model, settings.adapter, dtype)
    shape = read_shape(CONFIG, settings.model, settings.adapter, torch.float32)
    step = replace(STEP, compute_dtype=dtype, teacher_width=256)
    expected = estimate_memory(shape, Setup(step, 1, "adamw_torch_fused", False, teacher=teacher))
    student = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="sdpa").train()
    master = AutoModelForCausalLM.from_config(teacher_config, dtype=dtype, attn_implementation="sdpa").eval()
    assert expected.parts["teacher"] == sum(weight.nbytes for weight in master.parameters())
    ids = torch.randint(0, 1000, (2, 128))
    inputs = {"input_ids": ids, "position_ids": torch.arange(128)[None], "use_cache": False}
    known = [*student.parameters(), *student.buffers(), *master.parameters(), *master.buffers(), ids]
    with HeldBytes(known, "step") as held, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            taught = master.model(**inputs).last_hidden_state.flatten(0, 1)
        states = student.model(**inputs).last_hidden_state.flatten(0, 1)
        heads = (states, student.lm_head.weight, None), (taught, master.lm_head.weight, None)
        loss = ChunkedDivergenceFunction.apply(*heads[0], *heads[1], 1.0)[0].sum()
        loss.backward()
        held.begin("over")
    names = ("gradients", "activations", "working memory", "teacher's states")
    assert sum(expected.parts[name] for name in names) == pytest.approx(held.spans["step"].peak, rel=0.05)


def test_a_teacher_of_long_rows_needs_more_than_its_student():
    """The student recomputes its layers, and the teacher is wide."""
    settings = Settings(use_peft=False)
    wide = LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": 1024, "intermediate_size": 8192})
    teacher = read_shape(wide, settings.model, settings.adapter, torch.float32)
    step = {"length": 2048, "num_sequences": 8, "recompute_activations": True, "num_scored": 8}
    without = expect(**step, teacher_width=1024)
    found = expect(**step, teacher_width=1024, teacher=teacher)
    assert found.parts["working memory"] > without.parts["working memory"]


def test_only_tokens_with_a_label_are_scored():
    """Measured on a CPU: SmolLM2-135M held 1143 MiB at the peak of a step of 378 tokens, of which 157 had a label."""
    step = {"num_sequences": 1, "length": 4096}
    none, few, many = (expect(num_scored=number, **step).parts["working memory"] for number in (1, 2048, 4096))
    assert none < few < many
    assert expect(**step).parts["working memory"] == pytest.approx(many, rel=0.01)


def test_evaluations_of_large_batches_need_more_than_a_step():
    step = {"num_sequences": 1, "recompute_activations": True}
    batches = None, Batch(1, 128), Batch(256, 128)
    without, small, large = (expect(more=(0, batch), **step).peak_bytes for batch in batches)
    assert without == small < large


def test_parts_of_full_fine_tuning():
    parts = expect().parts
    num_weights = 1000 * 128 + 7 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 128) + 128
    assert parts["base weights"] == 4 * num_weights
    assert parts["optimizer"] == 8 * num_weights
    assert parts["DDP's buckets"] == 0


def test_what_shards_and_what_does_not():
    alone, sharded = expect(), expect(sharded=True, world_size=4)
    assert sharded.parts["base weights"] == pytest.approx(alone.parts["base weights"] / 4, rel=0.01)
    assert sharded.parts["optimizer"] == alone.parts["optimizer"] // 4
    assert sharded.parts["gathered weights"] > 0
    assert (alone.parts["gathered weights"], alone.parts["reduced gradients"]) == (0, 0)
    assert expect(world_size=4).parts["DDP's buckets"] == alone.parts["base weights"]


def test_a_sharded_model_is_whole_while_it_writes():
    writing = expect(sharded=True, world_size=4, cache_bytes=2**30)
    assert writing.parts["gathered weights"] == pytest.approx(expect().parts["base weights"], rel=0.01)
    assert expect(world_size=4, cache_bytes=2**30).parts["gathered weights"] == 0


def test_a_sharded_step_copies_gradients_when_activations_are_gone():
    """Measured on an H200 with one rank: 20.64 GiB for Llama 3.2 1B and 4,080 tokens, 21.95 were estimated."""
    step = expect(sharded=True, num_sequences=8)
    assert step.parts["reduced gradients"] == 0  # the peak is the loss's
    assert step.parts["gathered weights"] == 4 * 1001 * 128  # of the output layer and its norm, in float32


@pytest.mark.parametrize(
    ("optim", "share"),
    [("adamw_torch_fused", 2), ("adamw_8bit", 0.5), ("lion_32bit", 1), ("sgd", 0), ("paged_adamw_8bit", 0)],
)
def test_states_of_optimizers(optim, share):
    parts = expect(optim=optim).parts
    assert parts["optimizer"] == share * parts["base weights"]


def test_adafactor_keeps_rows_and_columns():
    parts = expect(optim="adafactor").parts
    assert 0 < parts["optimizer"] < parts["base weights"] / 20


def test_the_estimate_follows_the_batch():
    short, long = expect(length=512), expect(length=1024)
    assert long.parts["activations"] == pytest.approx(2 * short.parts["activations"], rel=0.05)
    eager = [expect(stores_scores=True, length=length) for length in (512, 1024)]
    assert eager[1].parts["activations"] > 2.2 * eager[0].parts["activations"]  # it keeps length x length scores
    assert expect(recompute_activations=True, length=512).parts["activations"] < 0.3 * short.parts["activations"]


def test_offloaded_activations_are_the_hosts():
    offloaded = expect(offload_activations=True, on_gpu=True)
    kept = expect(on_gpu=True)
    assert offloaded.host_bytes > 0.7 * kept.parts["activations"]
    assert offloaded.parts["activations"] < 0.35 * kept.parts["activations"]  # what TRL would have to move twice stays
    assert kept.host_bytes == 0


def test_experts_are_traced_too():
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=1000, num_hidden_layers=4, hidden_size=64, intermediate_size=64, num_local_experts=4, head_dim=16
    )
    settings = Settings(target_modules=["q_proj", "v_proj"])
    assert expect(settings, config, torch.bfloat16, compute_dtype=torch.bfloat16).peak_bytes > 0


def test_a_quantized_matrix_is_unpacked_to_multiply():
    wide = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=65536, num_hidden_layers=3, num_attention_heads=4
    )
    settings = Settings(load_in_4bit=True)
    shape = read_shape(wide, settings.model, settings.adapter, torch.bfloat16)
    trace = trace_step(shape, replace(STEP, num_sequences=1, length=2, compute_dtype=torch.bfloat16, on_gpu=True))
    assert trace.forward[1].peak > 2 * 64 * 65536
    assert trace.forward[1].net < 1.5 * 64 * 65536
