# SPDX-License-Identifier: Apache-2.0
"""The form of a rule between settings: when it is broken, and the sentence that says so.

The message of a rule is a format text. It names settings, whose values stand there as a user writes them.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_trainer.config.environment import Environment
from llm_trainer.config.schema import FIELDS, Settings, show_value

Values = Mapping[str, Any]


def fill_nothing(settings: Settings) -> tuple[Values, ...]:
    """Return one empty set of values, for a message that names nothing but settings."""
    return ({},)


@dataclass(frozen=True)
class Rule:
    """A combination of settings that cannot hold together."""

    settings: tuple[str, ...]  # the names of the settings that contradict each other
    when: Callable[[Settings], bool]  # tells whether the rule is broken
    message: str  # key, value, rule and fix; a format text over the settings and the values of `fill`
    fill: Callable[[Settings], Iterable[Values]] = fill_nothing  # returns further values, once for each sentence

    def find_problems(self, settings: Settings) -> list[str]:
        """List a sentence for each time that these settings break the rule."""
        if not self.when(settings):
            return []
        return [format_message(self.message, settings, values) for values in self.fill(settings)]


@dataclass(frozen=True)
class HardwareRule:
    """A setting that asks for what the machines of a job do not have."""

    settings: tuple[str, ...]  # the names of the settings that ask for it
    when: Callable[[Settings, Environment], bool]  # tells whether the machines lack it
    message: str  # a format text over the settings, `num_gpus` and `num_hosts`

    def find_problems(self, settings: Settings, environment: Environment) -> list[str]:
        """List the sentence of the rule, if these settings break it on this machine."""
        if not self.when(settings, environment):
            return []
        machines = {"num_gpus": environment.num_gpus, "num_hosts": len(environment.hosts)}
        return [format_message(self.message, settings, machines)]


class MessageFormatter(string.Formatter):
    """A formatter whose `{name}` is a value without quotes, and whose `{name!r}` is one with them.

    Both write true and false as users do.
    """

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the value of a placeholder; raise KeyError where there is none."""
        return kwargs[str(key)]

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Return the value as the message shows it."""
        if conversion == "r":
            return show_value(value)
        is_plain = not (value is None or isinstance(value, bool | dict))
        return value if is_plain else json.dumps(value)


def format_message(message: str, settings: Settings, values: Values) -> str:
    """Return the message with the values of the settings, and these further values, in their places."""
    names = [name for _, name, _, _ in string.Formatter().parse(message) if name]
    from_settings = {name: settings.value(name) for name in names if name in FIELDS and name not in values}
    return MessageFormatter().format(message, **from_settings, **values)
