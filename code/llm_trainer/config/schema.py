# SPDX-License-Identifier: Apache-2.0
"""All settings of a job. Users give them by flat names, and the code reads them by section."""

import types as pytypes
import typing
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic.fields import FieldInfo

from llm_trainer.common.redaction import REDACTED
from llm_trainer.config.sections import (
    SECRETS,
    AdapterSettings,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OutputSettings,
    ParallelismSettings,
    Section,
    TrackingSettings,
    TrainingSettings,
)

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "data": DataSettings,
    "methods": MethodSettings,
    "training": TrainingSettings,
    "parallelism": ParallelismSettings,
    "tracking": TrackingSettings,
    "output": OutputSettings,
}
# The key of the section that holds a setting, by the setting's name.
SECTION_OF = {name: key for key, section in SECTIONS.items() for name in section.model_fields}


class Settings(BaseModel):
    """All settings of a job: `Settings(lora_r=8)` takes flat names, and `settings.adapter.lora_r` reads them."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    config: str | None = Field(None, description="YAML file with settings. Default: the one in channel `config`.")
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    methods: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    parallelism: ParallelismSettings = ParallelismSettings()
    tracking: TrackingSettings = TrackingSettings()
    output: OutputSettings = OutputSettings()

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def sort_into_sections(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values of flat names, sorted into sections. Other names stay, and are refused later."""
        sections: dict[str, Any] = {}
        for name, value in values.items():
            if name in SECTION_OF:
                sections.setdefault(SECTION_OF[name], {})[name] = value
            else:
                sections[name] = value
        return sections

    def section_of(self, name: str) -> Section:
        """Return the section that holds the setting of that name."""
        section: Section = getattr(self, SECTION_OF[name])
        return section

    def value(self, name: str) -> Any:
        """Return the setting of that name."""
        return self.config if name == "config" else self.section_of(name).value(name)

    def is_given(self, name: str) -> bool:
        """Tell whether the user set this setting, rather than leaving it at its default."""
        return name in self.model_fields_set if name == "config" else self.section_of(name).is_given(name)

    @property
    def secrets(self) -> dict[str, SecretStr | None]:
        """The settings that hold secrets, by flat names."""
        return {name: self.value(name) for name in SECRETS}

    @property
    def given(self) -> dict[str, Any]:
        """All settings that the user set, by their flat names."""
        return {name: self.value(name) for name in FIELDS if self.is_given(name)}

    def replace(self, **values: Any) -> "Settings":
        """Return a copy in which some settings have other values, and count as given."""
        return Settings(**{**self.given, **values})


# Every setting by its flat name.
FIELDS: dict[str, FieldInfo] = {
    "config": Settings.model_fields["config"],
    **{name: field for section in SECTIONS.values() for name, field in section.model_fields.items()},
}


# The settings that are this project's own. All others are fields of TRL's configs.
OWN_NAMES = (
    "config",
    *(name for section in SECTIONS.values() for name in section.model_fields if name not in section.trl_config_fields),
)


def list_plain_types(name: str) -> tuple[frozenset[str], bool]:
    """Return the names of the plain types that a setting takes, such as "int", and whether it takes null."""
    return find_plain_types(FIELDS[name])


def find_plain_types(field: FieldInfo) -> tuple[frozenset[str], bool]:
    """Return the names of the plain types that a field takes, and whether it takes null."""
    names: set[str] = set()
    nullable = False
    for part in split_union(field.annotation):
        origin = typing.get_origin(part) or part
        if part is type(None):
            nullable = True
        else:
            names.add("str" if origin in (Literal, SecretStr) else origin.__name__)
    return frozenset(names), nullable


def split_union(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type itself as the only one."""
    is_union = typing.get_origin(annotation) in (typing.Union, pytypes.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def show_value(value: Any) -> str:
    """Return the text of a value as a user writes it: true and false in lower case, texts in quotes."""
    return str(value).lower() if isinstance(value, bool) or value is None else repr(value)


def describe_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that the user set and our own defaults, for a log or a manifest."""
    names = [name for name in FIELDS if name in OWN_NAMES or settings.is_given(name)]
    values = {name: settings.value(name) for name in names}
    return {name: REDACTED if isinstance(value, SecretStr) else value for name, value in values.items()}
