# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub: files of models and adapters, patience with a busy Hub, and a sentence where it refuses."""

import errno
import glob
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from llm_trainer.common import log
from llm_trainer.common.activity_notes import note_activity
from llm_trainer.common.errors import UserError, quote_error, walk_causes
from llm_trainer.common.retry import Backoff
from llm_trainer.common.safetensors_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    SINGLE_FILE,
    check_weights,
    find_unasked_weights,
    list_weights,
    map_weights,
)
from llm_trainer.common.units import show_bytes

# A causal language model needs these beside its weights.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
PATIENCE_SECONDS = 180.0  # no attempt begins later than this after the first
BUSY = (408, 429, 500, 502, 503, 504)
NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
# A job waits for a network, as names may be resolved a little later where hundreds of workers ask at once.
WAITS_FOR_NETWORK = ContextVar("waits for a network", default=True)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub, and the settings and the channel by which a job asks for such a one."""

    name: str
    revision: str | None
    setting: str = "model_id"
    revision_setting: str = "model_revision"
    channel: str = "model"

    @property
    def subject(self) -> str:
        """The setting with its value, for a message."""
        return f"{self.setting}={self.name!r}"


@dataclass(frozen=True)
class HubWeights:
    """The weights of a model on the Hub, before they are downloaded."""

    model: str
    whole_bytes: int
    missing_bytes: int  # those that the cache does not hold yet

    def find_lack_of_room(self) -> str | None:
        """Return the sentence for a disk that cannot hold what is to be downloaded, else None."""
        cache_dir = constants.HF_HUB_CACHE
        free_bytes = shutil.disk_usage(cache_dir).free
        if self.missing_bytes <= free_bytes:
            return None
        return (
            f"model_id={self.model!r} has {show_bytes(self.missing_bytes)} of weights to download, and "
            f"{show_bytes(free_bytes)} are free in {cache_dir}: raise VolumeSizeInGB on SageMaker, mount a larger "
            "disk there with docker, or give a smaller model."
        )


def download_model(model: str, revision: str | None, with_weights: bool) -> str:
    """Download a model, and return the folder of its files in the cache.

    The small files come first. They tell which of the repository's weights are loaded: it may hold the same weights for
    other programs besides. Raises UserError when the Hub refuses, or the repository is not a plain base model.
    """
    repository = Repository(model, revision)
    with note_activity("downloading the model", Path(constants.HF_HUB_CACHE)):
        folder = download_files(repository, SMALL_FILES)
        if problems := list(find_unasked_weights(Path(folder), repository.subject)):
            raise UserError(*problems)
        if with_weights:
            download_weights(model, Path(folder))
    return folder


def download_adapter(name: str, revision: str | None, others: list[str]) -> str:
    """Download an adapter, and the files of these names beside it. Return their folder in the cache.

    Raises UserError when the Hub refuses. Whether the repository holds an adapter is for the caller to judge.
    """
    repository = Repository(name, revision, "adapter_path", "adapter_revision", "adapter")
    with note_activity("downloading the adapter", Path(constants.HF_HUB_CACHE)):
        return download_files(repository, [ADAPTER_CONFIG, ADAPTER_FILE, *others])


def find_downloaded(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the cache, without asking the Hub; None where the cache lacks files of it."""
    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if list_weights(folder) and not any(check_weights(folder)) else None


def download_weights(model: str, folder: Path) -> None:
    """Download a model's weights beside its small files.

    Raises UserError where they are missing or damaged, and before the first byte where the disk cannot hold them.
    """
    check_room(model, folder)
    by_commit = Repository(model, folder.name)  # of the small files
    download_files(by_commit, list_patterns(folder))
    if problems := list(check_weights(folder)):
        raise UserError(*problems)
    if not list_weights(folder):
        raise UserError(
            f"model_id={model!r} has no {SINGLE_FILE} and no index of .safetensors files, and no other weights are "
            "read: convert the model to safetensors, or give another one."
        )


def check_room(model: str, folder: Path) -> None:
    """Raise UserError where the disk cannot hold the weights that are to be downloaded beside these small files."""
    weights = measure_weights(model, folder)
    if weights is not None and (problem := weights.find_lack_of_room()):
        raise UserError(problem)


def measure_weights(model: str, folder: Path) -> HubWeights | None:
    """Return the size of the weights that belong to a model's small files, None where the Hub cannot be asked.

    The list of files that came with the small ones has the sizes. For files without xet each takes one more request.
    """
    try:
        files = ask_hub(
            Repository(model, folder.name),
            lambda: snapshot_download(model, revision=folder.name, allow_patterns=list_patterns(folder), dry_run=True),
        )
    except DryRunError:  # offline, and the cache is of an older huggingface_hub, which kept no list
        return None
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    missing_bytes = sum(size for size, is_missing in sizes if is_missing)
    return HubWeights(model, sum(size for size, _ in sizes), missing_bytes)


def list_patterns(folder: Path) -> list[str]:
    """Return the patterns of the weights that belong to a model's small files. Raises UserError for a bad index."""
    try:
        names = map_weights(folder) or {SINGLE_FILE: set()}
    except ValueError as error:
        raise UserError(str(error)) from error
    return [glob.escape(name) for name in names]


def download_files(repository: Repository, patterns: list[str]) -> str:
    """Download the files that match a pattern. Return the folder that stands for their commit in the cache.

    huggingface_hub repeats some requests itself, five times within half a minute. It does not repeat the first one,
    which asks for the repository, nor a request for a file after a server error.
    """
    name, revision = repository.name, repository.revision
    return ask_hub(repository, lambda: str(snapshot_download(name, revision=revision, allow_patterns=patterns)))


def ask_hub(repository: Repository, action: Callable[[], Result]) -> Result:
    """Return the result of an action on a repository's files. Raises UserError where the Hub refuses or stays away."""
    return retry_while_busy(
        action,
        f"Downloading {repository.name}",
        lambda error: (
            find_refusal(error, repository.subject, repository.revision_setting)
            or describe_outage(repository, find_answer(error))
        ),
    )


def find_barrier(model: str, others_may_read: bool) -> str | None:
    """Return why the Hub does not let this process read a model, though a job may be let; None where it lets both.

    With `others_may_read` the job has a token of its own, so that a refusal here says nothing of it.
    """
    try:
        HfApi().auth_check(model)
    except HfHubHTTPError as error:
        if is_passing(error):
            return f"the Hub is busy ({quote_error(error)})"
        return find_refusal(error, f"model_id={model!r}") if others_may_read else None
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        return f"the Hub cannot be reached ({quote_error(error)})"
    return None


def needs_token(model: str) -> bool:
    """Tell whether a model on the Hub is gated or private. A Hub that is not reached tells nothing: then it is not."""
    try:
        HfApi(token=False).auth_check(model)
    except (GatedRepoError, RepositoryNotFoundError):
        return True
    except (HfHubHTTPError, HFValidationError, httpx2.TransportError, OfflineModeIsEnabled):
        return False
    return False


@contextmanager
def expect_network() -> Iterator[None]:
    """Give up at once, within the block, where there is no network. A busy Hub is waited for nevertheless."""
    token = WAITS_FOR_NETWORK.set(False)
    try:
        yield
    finally:
        WAITS_FOR_NETWORK.reset(token)


def retry_while_busy(action: Callable[[], Result], what: str, refuse: Callable[[BaseException], str]) -> Result:
    """Return the action's result. Repeat it while the Hub is busy or away; the log names each repetition by `what`.

    Raises UserError with the sentence that `refuse` makes from the last error.
    """
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
    while True:
        try:
            return action()
        except (httpx2.HTTPError, LocalEntryNotFoundError, HFValidationError) as error:
            answer = find_answer(error)
            # Longer by chance, since all hosts ask at the same time.
            seconds = max(backoff.note_failure(), read_asked_wait(answer)) * random.uniform(1, 1.5)
            if not is_passing(answer) or time.monotonic() + seconds > give_up_at:
                raise UserError(refuse(error)) from error
            log.info(f"{what}: {quote_error(answer)}: next try in {seconds:.1f} s", every_rank=True)
            time.sleep(seconds)


def describe_outage(repository: Repository, answer: BaseException) -> str:
    """Return the sentence on a Hub or network that stayed away."""
    way = "start the job again later" if isinstance(answer, HfHubHTTPError) else "give the container a network"
    return (
        f"{repository.subject} could not be downloaded ({quote_error(answer)}): {way}, or give the "
        f"{repository.channel}'s files as channel '{repository.channel}'."
    )


def find_answer(error: BaseException) -> BaseException:
    """Return the Hub's or network's own error inside of huggingface_hub's, else the error itself."""
    return next((link for link in walk_causes(error) if isinstance(link, httpx2.HTTPError)), error)


def is_passing(answer: BaseException) -> bool:
    """Tell whether the same request may succeed a little later."""
    if isinstance(answer, HfHubHTTPError):
        return answer.response.status_code in BUSY
    return isinstance(answer, httpx2.TransportError) and (WAITS_FOR_NETWORK.get() or not lacks_network(answer))


def lacks_network(answer: BaseException) -> bool:
    """Tell whether no name server answers, or no route leads to the Hub, as on a machine without a network."""
    return any(
        isinstance(link, socket.gaierror) or (isinstance(link, OSError) and link.errno in NO_ROUTE)
        for link in walk_causes(answer)
    )


def read_asked_wait(answer: BaseException) -> float:
    """Return the seconds that the Hub asks to wait for, in its own header or the standard one; 0 where it does not."""
    if not isinstance(answer, HfHubHTTPError):
        return 0
    limits = parse_ratelimit_headers(answer.response.headers)
    if limits is not None and limits.remaining == 0:
        return limits.reset_in_seconds
    seconds = answer.response.headers.get("Retry-After", "")
    return int(seconds) if seconds.isdigit() else 0


def find_refusal(error: BaseException, what: str, revision_setting: str = "model_revision") -> str | None:
    """Return the sentence for a refusal that would come again, else None. `what` is the setting with its value."""
    given = "the given token may not read it" if get_token() else "no token is given"
    permit = "give a token that may read it as HF_TOKEN in the job's Environment."
    for link in walk_causes(error):
        status = link.response.status_code if isinstance(link, HfHubHTTPError) else None
        if isinstance(link, GatedRepoError):
            return f"{what} is gated and {given}: accept its licence on its Hub page, and {permit}"
        is_unknown = isinstance(link, RepositoryNotFoundError) or (type(link) is HfHubHTTPError and status == 404)
        if is_unknown:
            return f"{what} is not on the Hugging Face Hub, or is private and {given}: check the name, and {permit}"
        if isinstance(link, RevisionNotFoundError):
            return f"{what} has no such revision on the Hugging Face Hub: check {revision_setting}."
        if isinstance(link, HFValidationError):
            return f"{what} is neither a folder nor a Hugging Face Hub id: give one of them."
        if status in (401, 403):
            return f"{what} is refused by the Hugging Face Hub ({status}) and {given}: {permit}"
    return None
