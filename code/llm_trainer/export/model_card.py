# SPDX-License-Identifier: Apache-2.0
"""The result's README.md: a model card as the Hugging Face Hub reads it, written from the manifest."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCardData

from llm_trainer.common.errors import quote_error
from llm_trainer.common.files import write_text
from llm_trainer.common.log import show_line
from llm_trainer.config.sections import HUB_ID
from llm_trainer.export.base_source import BaseSource
from llm_trainer.journal.manifest import Manifest
from llm_trainer.serving.lmi_files import ADAPTER_NAME

CARD = "README.md"
REPOSITORY = "sagemaker-llm-trainer"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_CHARACTERS, CARD_CHARACTERS = 400, 2**16  # of a licence and of a card: their beginning tells
# How a reward model is served; LMI serves models that write.
REWARD_SERVING = (
    "vLLM serves this folder with `vllm serve . --runner pooling`. A request to `/classify`, with the text of prompt "
    "and answer as the chat template writes them, gives the reward as the only number of `probs`. On SageMaker: AWS's "
    "vLLM container with `SM_VLLM_MODEL=/opt/ml/model` and `SM_VLLM_RUNNER=pooling`. AWS's LMI container serves no "
    "reward models, so that there are no files for it."
)
IMAGE_REQUEST = (
    "A request may have images, as data URIs or as addresses that the server reaches. `limit_mm_per_prompt` in these "
    "files says how many:"
)
MAX_CARD_DEPTH = 32  # of the metadata; the parser's time grows with the depth
# Characters to which Markdown gives a meaning, and those by which readers of the Hub make links of plain addresses.
MARKUP = re.compile(r"[\\`*\[\]<>|~&#$@]|(?<!\w)_|_(?!\w)|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)
# What the first lines of well-known licences' texts hold -> the Hub's identifier.
LICENCE_TITLES = {"apache license": "apache-2.0", "mit license": "mit"}


def write_model_card(
    target: Path, folder: Path, manifest: Manifest, base: tuple[Path, BaseSource], refusals: list[str]
) -> None:
    """Write the card of the result in `folder` to the folder `target`. `base` are its files' folder and its place."""
    card = build_model_card(folder, manifest, *base, refusals)
    write_text(target / CARD, card, errors="backslashreplace")  # names of files may be no UTF-8


def build_model_card(folder: Path, manifest: Manifest, base_folder: Path, base: BaseSource, refusals: list[str]) -> str:
    """Return the card of the result in `folder`. The manifest has no secrets, and so the card has none.

    `base_folder` holds the base's files. `refusals` are sentences on why vLLM does not serve this result.
    """
    licence = find_licence(base_folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    data = build_metadata(manifest, base, is_adapter, licence)
    parts = [
        f"# {quote_text(manifest['training_job_name'] or 'Fine-tuned model')}",
        describe_result(manifest, describe_base(base), is_adapter, licence),
        *describe_lineage(manifest),
        "## Use",
        *describe_use(manifest, base, is_adapter, refusals),
        "## Data",
        *describe_data(manifest),
        "## Training",
        *describe_training(manifest),
    ]
    # ModelCard.from_template is not used: text that users wrote must not run as a Jinja template.
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def build_metadata(manifest: Manifest, base: BaseSource, is_adapter: bool, licence: dict[str, str]) -> ModelCardData:
    """Return the metadata by which the Hub lists the model."""
    return ModelCardData(
        base_model=base.hub_id,
        base_model_relation=("adapter" if is_adapter else "finetune") if base.hub_id else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=choose_task(manifest, base),
        tags=[REPOSITORY, *(["lora"] if "adapter" in manifest else []), manifest["settings"].get("method", "sft")],
        datasets=list_hub_data(manifest) or None,
        **{name: show_line(value) for name, value in licence.items()},
    )


def quote_text(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line: in a sentence, a heading, a link or a cell of a table.

    All that the job did not write itself comes into the card by it, or as JSON within a block of code.
    """
    return MARKUP.sub(r"\\\g<0>", show_line(text))


def describe_base(base: BaseSource) -> str:
    """Return the base's name as a link, and its revision."""
    name = base.hub_id
    address = f"https://huggingface.co/{quote(name)}" if name else ""
    link = f"[{quote_text(name)}]({address})" if name else "a model whose name is not known"
    return f"{link} (revision {quote_text(base.revision)})" if base.revision else link


def find_licence(base: Path) -> dict[str, str]:
    """Return the base's licence by its own card, else by its licence file; {} where neither tells.

    The keys are those of a model card's metadata. Raises OSError for a file that cannot be read.
    """
    stated, _ = read_stated_licence(base / CARD)
    if stated:
        return stated
    for path in (path for pattern in LICENCE_FILES for path in sorted(base.glob(pattern))):
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                head = file.read(LICENCE_CHARACTERS).lower()
            titled = next((licence for title, licence in LICENCE_TITLES.items() if title in head), None)
            return {"license": titled} if titled else {"license": "other", "license_name": path.name}
        if path.is_dir():  # such as LICENSES, which holds several
            return {"license": "other", "license_name": path.name}
    return {}


def read_stated_licence(card: Path) -> tuple[dict[str, str], str | None]:
    """Return what the metadata of a card say of the licence, and why they cannot be read: a sentence's end, or None.

    Values are never built, only the parser's events are read: hostile metadata can take neither time nor memory.
    """
    if not card.is_file():
        return {}, None
    with card.open(encoding="utf-8", errors="replace") as file:
        start, _, text = file.read(CARD_CHARACTERS).partition("\n")
    if start.strip() != "---":
        return {}, None
    nodes: list[str | None] = []  # of the topmost mapping: key, value, key, value; None for what is no text
    depth = 0
    try:
        for event in yaml.parse(re.split(r"^---\s*$", text, maxsplit=1, flags=re.MULTILINE)[0], yaml.CSafeLoader):
            if depth == 1 and isinstance(event, yaml.NodeEvent):
                nodes.append(getattr(event, "value", None))
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CARD_DEPTH:
                return {}, f"are nested deeper than {MAX_CARD_DEPTH}"
    except yaml.YAMLError as error:
        return {}, f"are no YAML ({quote_error(error)})"
    stated = zip(nodes[::2], nodes[1::2], strict=False)
    return {key: value for key, value in stated if key in LICENCE_KEYS and value}, None


def list_hub_data(manifest: Manifest) -> list[str]:
    """List the Hub ids of data sets that the settings name; a file or folder of the container is none."""
    names = (manifest["settings"].get(key) for key in ("train_dataset_path", "val_dataset_path"))
    return [name for name in dict.fromkeys(names) if name and HUB_ID.fullmatch(name) and "/" in name]


def describe_result(manifest: Manifest, base: str, is_adapter: bool, licence: dict[str, str]) -> str:
    """Return what the result is: its kind, its base, what was trained, and the licence."""
    kind = "A LoRA adapter of" if is_adapter else "All weights of a fine-tuned copy of"
    merged = " with its LoRA adapter merged in" if not is_adapter and "adapter" in manifest else ""
    trained = f"{manifest['trainable_parameters']:,} of {manifest['parameters']:,} weights were trained"
    stopped = "The training was stopped before its end. " if manifest["num_steps"] < manifest["total_steps"] else ""
    export = manifest.get("export") or {}
    if export.get("proven") is False:
        stopped += f"**Not proven**: {quote_text(export['reason'])}. "
    name = licence.get("license_name") or licence.get("license")
    terms = (
        f"The base's licence, {quote_text(name)}, applies."
        if name
        else "The base's licence was not found with its files."
    )
    return f"{kind} {base}{merged}; {trained}, by {REPOSITORY} {manifest['llm_trainer']}. {stopped}{terms}"


def describe_lineage(manifest: Manifest) -> Iterator[str]:
    """Yield a table of the adapters that the training went on from, the newest first."""
    rows = ["| adapter | sha256 | job | steps | base |", "|---|---|---|---|---|"]
    for entry in manifest.get("lineage") or ():
        places = [entry.get("adapter"), entry.get("model")]  # a folder of a container means nothing elsewhere
        adapter, base = (place if isinstance(place, str) and HUB_ID.fullmatch(place) else "" for place in places)
        told = (adapter, entry.get("sha256"), entry.get("training_job_name"), entry.get("num_steps"), base)
        rows.append(f"| {' | '.join(quote_text('' if value is None else str(value)) for value in told)} |")
    if len(rows) > 2:
        yield "The training went on from these adapters, the newest first:\n\n" + "\n".join(rows)


def describe_use(manifest: Manifest, base: BaseSource, is_adapter: bool, refusals: list[str]) -> Iterator[str]:
    """Yield how the result is loaded, what serves it, and how it was checked."""
    yield f"```python\n{write_example(manifest, base, is_adapter)}\n```"
    if refusals:
        yield "\n".join(f"- {quote_text(refusal)}" for refusal in refusals)
    elif gives_rewards(manifest):
        yield REWARD_SERVING
    else:
        yield (
            "On SageMaker: AWS's LMI container (vLLM) serves this folder by its `serving.properties`, or with the "
            "variables of `serving.env`."
        )
        if saw_images(manifest):
            yield f"{IMAGE_REQUEST}\n\n```json\n{json.dumps(build_image_request(is_adapter), indent=2)}\n```"
    targets = (manifest.get("adapter") or {}).get("targets", ())
    if is_adapter and any("experts" in name for name in targets):
        yield "Transformers 5 loads it. Transformers 4 has no fused experts, and would leave out what they learned."
    else:
        yield "Transformers 4.57 and 5 load it."
    check = manifest.get("export")
    if check:
        yield f"Checked when it was written:\n\n```json\n{json.dumps(check, indent=2, default=str)}\n```"


def saw_images(manifest: Manifest) -> bool:
    """Tell whether the model was trained on rows with images."""
    return any(report.get("num_images") for report in manifest["data"].values())


def build_image_request(is_adapter: bool) -> dict[str, Any]:
    """Return a request to a server with an image, in OpenAI's words. An adapter is asked by its name."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}
    return {"messages": [message], "max_tokens": 100, **({"adapters": ADAPTER_NAME} if is_adapter else {})}


def choose_task(manifest: Manifest, base: BaseSource) -> str:
    """Return the Hub's name of the result's task."""
    if gives_rewards(manifest):
        return "text-classification"
    return "image-text-to-text" if base.sees_images else "text-generation"


def gives_rewards(manifest: Manifest) -> bool:
    """Tell whether the result is a reward model."""
    return manifest["settings"].get("method") == "reward"


def write_loading(base: BaseSource, is_adapter: bool, auto_class: str, options: str = "") -> list[str]:
    """Return the lines of a program that load model and tokenizer from the folder of the artefacts.

    `auto_class` is Transformers' class, and `options` are further arguments for a base.
    """
    lines = [f"from transformers import {auto_class}, AutoTokenizer", ""]
    if is_adapter:
        revision = f", revision={base.revision!r}" if base.hub_id and base.revision else ""
        lines.insert(0, "from peft import PeftModel")
        name = repr(base.hub_id) if base.hub_id else '"path/to/the/base"'
        lines += [
            f'base = {auto_class}.from_pretrained({name}{revision}{options}, dtype="auto")',
            'model = PeftModel.from_pretrained(base, ".")',
        ]
    else:
        lines += [f'model = {auto_class}.from_pretrained(".", dtype="auto")']
    return [*lines, 'tokenizer = AutoTokenizer.from_pretrained(".")']


def write_reward_snippet(base: BaseSource, is_adapter: bool) -> str:
    """Return a Python program that rewards an answer."""
    return "\n".join(
        [
            *write_loading(base, is_adapter, "AutoModelForSequenceClassification", ", num_labels=1"),
            *(["base.config.pad_token_id = tokenizer.pad_token_id"] if is_adapter else []),
            'messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]',
            'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)',
            'print("reward:", model(**inputs).logits.item())',
        ]
    )


def write_example(manifest: Manifest, base: BaseSource, is_adapter: bool) -> str:
    """Return a Python program that uses the result, to be run in the folder of the artefacts."""
    if gives_rewards(manifest):
        return write_reward_snippet(base, is_adapter)
    if base.sees_images:
        return write_image_snippet(base, is_adapter, saw_images(manifest))
    return write_snippet(base, is_adapter)


def write_image_snippet(base: BaseSource, is_adapter: bool, with_image: bool) -> str:
    """Return a Python program that answers a message to a model that sees, with an image or without."""
    image = '{"type": "image", "path": "path/to/an/image.png"}, ' if with_image else ""
    loading = "\n".join(write_loading(base, is_adapter, "AutoModelForImageTextToText"))
    return "\n".join(
        [
            loading.replace("AutoTokenizer", "AutoProcessor").replace("tokenizer =", "processor ="),
            f'messages = [{{"role": "user", "content": [{image}{{"type": "text", "text": "Hello"}}]}}]',
            "inputs = processor.apply_chat_template(",
            '    messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True',
            ")",
            "answer = model.generate(**inputs, max_new_tokens=100)",
            'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def write_snippet(base: BaseSource, is_adapter: bool) -> str:
    """Return a Python program that answers a message."""
    return "\n".join(
        [
            *write_loading(base, is_adapter, "AutoModelForCausalLM"),
            'messages = [{"role": "user", "content": "Hello"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "answer = model.generate(**inputs, max_new_tokens=100)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def describe_data(manifest: Manifest) -> Iterator[str]:
    """Yield a table of the splits, and one of their files."""
    rows = ["| split | sources | rows | tokens | trained on |", "|---|---|---|---|---|"]
    files = ["| file | bytes | sha256 |", "|---|---|---|"]
    for split, report in manifest["data"].items():
        sources = ", ".join(f"{source}: {kind}" for source, kind in report["formats"].items())
        share = f"{report['supervised_share']:.1%} of the tokens"
        numbers = f"{report['num_rows']:,} | {report['num_tokens']:,}"
        rows.append(f"| {quote_text(split)} | {quote_text(sources)} | {numbers} | {share} |")
        files += [
            f"| {quote_text(file['name'])} | {file['bytes']:,} | {file.get('sha256', 'streamed')} |"
            for file in report["files"]
        ]
    yield "\n".join(rows)
    if len(files) > 2:
        yield "\n".join(files)


def describe_training(manifest: Manifest) -> Iterator[str]:
    """Yield steps, metrics, settings and versions."""
    metrics = {name: value for name, value in manifest["metrics"].items() if isinstance(value, int | float)}
    yield f"{manifest['num_steps']} of {manifest['total_steps']} steps on {manifest['world_size']} devices."
    yield "\n".join(
        ["| metric | value |", "|---|---|", *(f"| {quote_text(name)} | {value:g} |" for name, value in metrics.items())]
    )
    yield f"Settings:\n\n```json\n{json.dumps(select_given_settings(manifest), indent=2, default=str)}\n```"
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    yield f"Versions: {versions}."


def select_given_settings(manifest: Manifest) -> dict[str, Any]:
    """Return the settings that are set, without the container's folders, which mean nothing elsewhere."""
    return {
        name: value
        for name, value in manifest["settings"].items()
        if value is not None and not (isinstance(value, str) and value.startswith("/"))
    }
