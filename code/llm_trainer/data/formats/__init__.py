# SPDX-License-Identifier: Apache-2.0
"""Formats of rows: parse a row's fields into an example, which says what is trained on.

A row's fields tell its format (sources: TRL's "Dataset formats", ShareGPT's export, Stanford Alpaca's data release):
    pretokenized        input_ids, labels or TRL's masks if the loss is not on all of them
    messages            [{"role": ..., "content": ...}, ...], tools
    sharegpt            conversations: [{"from": "human", "value": ...}, ...], system, tools
    prompt_completion   prompt, completion: two texts, or two lists of messages
    alpaca              instruction, input, output, system, history
    text                text
    unpaired_preference prompt, completion, label: whether the completion is desirable
    preference          chosen, rejected: two texts, or two lists of messages; prompt, unless both begin with it
    prompt              prompt: a text, or a list of messages; any other columns, by which completions are judged
"""
