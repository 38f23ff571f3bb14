# SPDX-License-Identifier: Apache-2.0
"""Words of libraries that a user cannot act on, kept out of the log by the name of their source and their text.

Whatever else a library says still reaches the log.
"""

import logging
import re
import warnings

# Each is a logger, and the beginning of a message as a regular expression.
LOG_MESSAGES = (
    # bitsandbytes looks for an optional kernel on CPUs with AVX-512 bfloat16, and has one of its own.
    ("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm_4bit_forward from kernels-community"),
    # LLM.int8() computes so by design, and the message comes with every product of matrices.
    ("bitsandbytes.autograd._functions", r"MatMul8bitLt: inputs will be cast from"),
    # Liger tries kernels of packages for other chips, which the image leaves out, before those that it takes.
    ("liger_kernel.backends.registry", r"Backend impl"),
    # Full fine-tuning keeps its weights in float32 and computes under autocast, as the message advises.
    ("transformers.modeling_utils", r"Flash Attention"),
    # What a run must keep is checked before (training/resume.py), and the rows of a device may change.
    ("transformers.trainer_utils", r"Warning: The following arguments do not match the ones in the"),
)
# Each is a module, and the beginning of a UserWarning, as regular expressions.
USER_WARNINGS = (
    # The merge splits tied embeddings itself.
    (r"peft\.tuners\.tuners_utils", r"Model with `tie_word_embeddings=True` and the tied_target_modules="),
    # PEFT sets this itself, as the layer needs it.
    (r"peft\.tuners\.lora\.layer", r"fan_in_fan_out is set to (False|True) but the target module is"),
    # The export converts such adapters, so that they fit the base as it is stored.
    (r"peft\.peft_model", r"(PiSSA|CorDA|OLoRA) changes the base weights of the model"),
    (r"peft\.tuners\.lora\.model", r"Note that Quant\(W_res\) \+ AB != Quant\(W\)"),
    # It says what PEFT does, which is what the job needs.
    (r"peft\.utils\.save_and_load", r"Setting `save_embedding_layers` to `True`"),
)


class MessageFilter(logging.Filter):
    """Drops a logger's messages that begin with a text."""

    def __init__(self, beginning: str) -> None:
        """`beginning` is a regular expression."""
        super().__init__()
        self.beginning = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a message may pass."""
        return not self.beginning.match(str(record.msg))


def silence_libraries() -> None:
    """Keep libraries' noise out of this process's log. Needs to be called once, before the libraries speak."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries tell it to each other, not to the user
    for module, message in USER_WARNINGS:
        warnings.filterwarnings("ignore", message, UserWarning, module)
    for name, beginning in LOG_MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(each, MessageFilter) for each in logger.filters):
            logger.addFilter(MessageFilter(beginning))
