# SPDX-License-Identifier: Apache-2.0
"""How fast, in how much memory and how densely rows are prepared, beside the raw tokenizer and TRL.

`bench/data.py MODEL [ROWS] [ROUNDS]`, MODEL being a folder with a tokenizer and a chat template, `make demo`'s for
example (.demo/opt/ml/input/data/model). Needs half an hour on two cores, for a million rows.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ZIPF_WORDS = 20_000  # words that a text is made of, the n-th a share of 1/n of it
MEMORY_ROWS = (100_000, 1_000_000)


def main() -> None:
    model, num_rows, rounds = Path(sys.argv[1]), *map(int, [*sys.argv[2:], "40000", "5"][:2])
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", model, num_rows, median_words=60)
        measure_rate(rows, model, rounds, Path(folder))
        measure_memory(model, Path(folder))
    measure_packing()


def write_rows(file: Path, model: Path, num_rows: int, median_words: int) -> Path:
    """Conversations of a question and an answer, of log-normal lengths, their words as frequent as in language."""
    from transformers import AutoTokenizer

    generator = random.Random(0)
    words = sorted(word[1:] for word in AutoTokenizer.from_pretrained(model).get_vocab() if word[1:].isalpha())
    words = generator.sample(words, min(ZIPF_WORDS, len(words)))
    weights = [1 / (place + 1) for place in range(len(words))]
    pool = generator.choices(words, weights, k=1_000_000)

    def write_text() -> str:
        start = generator.randrange(len(pool) - 5000)
        return " ".join(pool[start : start + min(5000, 1 + int(generator.lognormvariate(0, 0.8) * median_words))])

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(num_rows):
            messages = [{"role": role, "content": write_text()} for role in ("user", "assistant")]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


def measure_rate(rows: Path, model: Path, rounds: int, folder: Path) -> None:
    """Tokens a second: tokenizers' encode_batch on the rendered text, this project, TRL; in turns, each a process."""
    times: dict[str, list[float]] = {"tokenizers": [], "llm-trainer": [], "trl": []}
    tokens: dict[str, int] = {}
    for _ in range(rounds):
        for name, seconds in times.items():
            output = run_child(name, rows, model, folder)[0]
            took, tokens[name] = json.loads(output)
            seconds.append(took)
    for name, seconds in times.items():
        ratios = [raw / own for raw, own in zip(times["tokenizers"], seconds, strict=True)]
        print(
            f"rate: {name}: {statistics.median(seconds):.2f} s (median of {rounds}), {tokens[name]} tokens, "
            f"{statistics.median(ratios):.2f} of tokenizers' rate ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def run_child(name: str, rows: Path, model: Path, folder: Path) -> tuple[str, int]:
    """The last line that this script prints as a child, and the peak memory of it and its children, in bytes."""
    cache = tempfile.mkdtemp(dir=folder)
    environment = {**os.environ, "LLM_TRAINER_CACHE": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", name, str(rows), str(model)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        peak = max(watch_memory(child), default=0)
        output = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise SystemExit(f"{name} failed")
    return output.splitlines()[-1], peak


def watch_memory(child: "subprocess.Popen[str]") -> Iterator[int]:
    """The memory of a process and its children, what they share counted once, while it runs."""
    process = psutil.Process(child.pid)
    while child.poll() is None:
        with contextlib.suppress(psutil.Error):  # one of them has just ended
            yield sum(one.memory_full_info().pss for one in [process, *process.children(recursive=True)])
        time.sleep(0.2)


def measure_memory(model: Path, folder: Path) -> None:
    peaks = []
    for num_rows in MEMORY_ROWS:
        rows = write_rows(folder / f"{num_rows}.jsonl", model, num_rows, median_words=15)
        _, peak = run_child("llm-trainer", rows, model, folder)
        peaks.append(peak)
        print(f"memory: {num_rows} rows, {rows.stat().st_size / 2**20:.0f} MiB: {peak / 2**20:.0f} MiB", flush=True)
        rows.unlink()
    print(f"memory: {peaks[-1] / peaks[0] - 1:+.1%} from {MEMORY_ROWS[0]} to {MEMORY_ROWS[-1]} rows", flush=True)


def measure_packing() -> None:
    """Useful tokens in all slots of a batch, on a log-normal length mix."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    from llm_trainer.training.packing import BIN_ROWS, plan_batch_bins

    disable_progress_bars()
    generator = random.Random(0)
    lengths = [min(2048, 2 + int(generator.lognormvariate(5, 1))) for _ in range(50_000)]
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    total = sum(lengths)
    for name, options in (("packing=true", {"batch_size": BIN_ROWS}), ("TRL's packing=True", {})):
        sequences = pack_dataset(rows, 2048, "bfd", options)
        print(f"packing: {name}: {total / (2048 * len(sequences)):.2%} of the slots filled")
    padded = packed = 0
    for place in range(0, len(lengths), 8):
        batch = lengths[place : place + 8]
        sequences = plan_batch_bins(batch, 2048)
        packed += len(sequences) * max(sum(batch[place] for place in places) for places in sequences)
        padded += len(batch) * max(batch)
    print(
        f"packing: the default, 8 rows a batch: {total / packed:.2%} of the slots filled; padded: {total / padded:.2%}"
    )


def child(name: str, rows: Path, model: Path) -> None:
    """Prepare the rows in one way, and print the seconds it took and the tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ways = {"tokenizers": encode_raw, "llm-trainer": prepare_here, "trl": prepare_by_trl}
    print(json.dumps(ways[name](rows, tokenizer)))


def encode_raw(rows: Path, tokenizer: Any) -> tuple[float, int]:
    conversations = [json.loads(line)["messages"] for line in rows.open(encoding="utf-8")]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    started = time.monotonic()
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return time.monotonic() - started, sum(map(len, encodings))


def prepare_here(rows: Path, tokenizer: Any) -> tuple[float, int]:
    from llm_trainer.config.schema import Settings
    from llm_trainer.data.encoding import Vocabulary
    from llm_trainer.data.token_cache import prepare_source
    from llm_trainer.readers.sources import FileSource

    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    source = FileSource("train", rows.parent, (rows,))
    started = time.monotonic()
    _, report = prepare_source(source, vocabulary, Settings(max_length=None).data)
    return time.monotonic() - started, report.num_tokens


def prepare_by_trl(rows: Path, tokenizer: Any) -> tuple[float, int]:
    """With all cores, and its loss on all tokens: it has no training template for SmolLM2's family."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = SFTConfig(
            output_dir, max_length=None, dataset_num_proc=os.cpu_count(), use_cpu=True, report_to="none", bf16=False
        )
        model = LlamaForCausalLM(config)
        started = time.monotonic()
        dataset = load_dataset("json", data_files=str(rows), split="train")
        trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
        took = time.monotonic() - started
    return took, sum(map(len, trainer.train_dataset.with_format("arrow")["input_ids"][:]))


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
