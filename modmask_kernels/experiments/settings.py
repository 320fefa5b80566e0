"""Settings of an experiment: a frozen dataclass whose fields carry their own help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with a help text and the range of its values.

    Args:
        default: default value.
        help: one sentence for the command line and the report.
        choices: the allowed values of a text field (default: any).
        minimum: smallest allowed number.
        above: bound that a number must exceed.
    """
    metadata = {"help": help, "choices": tuple(choices), "minimum": minimum, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


def _parse_widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas between them, got {text!r}"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. Fields are int, float, bool, str or tuple[int, ...], made by `option`.

    Raises:
        ValueError, TypeError: a value is of the wrong type or out of range; names the field.
    """

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, kind, meta = getattr(self, field.name), kinds[field.name], field.metadata
            if kind is float and type(value) is int:
                value = float(value)
            if typing.get_origin(kind) is tuple and isinstance(value, list):
                value = tuple(value)  # JSON has no tuples
            object.__setattr__(self, field.name, value)
            expected = typing.get_origin(kind) or kind
            if type(value) is not expected:
                raise TypeError(f"setting {field.name} must be {expected.__name__}, got {value!r}")
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(
                    f"setting {field.name} must be one of {', '.join(meta['choices'])}, got "
                    f"{value!r}"
                )
            for number in value if isinstance(value, tuple) else (value,):
                self._check_range(field.name, number, meta)

    @staticmethod
    def _check_range(name: str, number: Any, meta: Mapping[str, Any]) -> None:
        # written so that NaN fails too
        if meta["minimum"] is not None and not number >= meta["minimum"]:
            raise ValueError(f"setting {name} must be at least {meta['minimum']}, got {number!r}")
        if meta["above"] is not None and not number > meta["above"]:
            raise ValueError(f"setting {name} must be greater than {meta['above']}, got {number!r}")

    @classmethod
    def fields(cls) -> list[dataclasses.Field[Any]]:
        """All fields, those of an experiment before those that it inherits."""
        own = {field.name: field for field in dataclasses.fields(cls)}
        names = [name for base in cls.__mro__ for name in inspect.get_annotations(base)]
        return [own[name] for name in dict.fromkeys(names) if name in own]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in self.fields()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote.

        Raises:
            ValueError: a name that these settings do not have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
            )
        return cls(**values)

    def replace(self, **overrides: Any) -> Self:
        """A copy with some values changed, validated again."""
        return dataclasses.replace(self, **overrides)

    @classmethod
    def help_of(cls, name: str) -> str:
        """Help text of a field."""
        return str({f.name: f.metadata["help"] for f in dataclasses.fields(cls)}[name])

    @classmethod
    def add_arguments(
        cls, parser: argparse.ArgumentParser | argparse._ArgumentGroup, presets: Mapping[str, Self]
    ) -> None:
        """Add one flag per field; a flag that is not given leaves nothing in the namespace.

        Args:
            parser: where the flags go.
            presets: shown in the help, so that a reader sees what a preset means.
        """
        kinds = typing.get_type_hints(cls)
        for field in cls.fields():
            kind, meta = kinds[field.name], field.metadata
            values = {name: getattr(preset, field.name) for name, preset in presets.items()}
            if len(set(values.values())) == 1:
                shown = format_value(next(iter(values.values())))
            else:
                shown = ", ".join(f"{name}: {format_value(v)}" for name, v in values.items())
            arguments: dict[str, Any] = {
                "dest": field.name,
                "default": argparse.SUPPRESS,
                "help": f"{meta['help']} [{shown}]".replace("%", "%%"),
            }
            if kind is bool:
                arguments["action"] = argparse.BooleanOptionalAction
            elif meta["choices"]:
                arguments |= {"choices": meta["choices"]}
            else:
                arguments |= {
                    "type": kind if kind in (int, float, str) else _parse_widths,
                    "metavar": "W,W,..."
                    if kind not in (int, float, str)
                    else kind.__name__.upper(),
                }
            parser.add_argument("--" + field.name.replace("_", "-"), **arguments)

    @classmethod
    def parse(cls, name: str, text: str) -> Any:
        """The value of a field that a person wrote, as the command line takes it.

        Raises:
            ValueError: no such field, or not a value of its kind.
        """
        kinds = typing.get_type_hints(cls)
        if name not in kinds:
            raise ValueError(f"no setting is called {name!r}; they are {', '.join(kinds)}")
        kind = kinds[name]
        try:
            if kind is bool:
                return {"yes": True, "no": False}[text]
            return kind(text) if kind in (int, float, str) else _parse_widths(text)
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            kinds_text = {bool: "yes or no", int: "a whole number", float: "a number"}
            wanted = kinds_text.get(kind, "whole numbers with commas between them")
            raise ValueError(f"setting {name} takes {wanted}, not {text!r}") from None

    @classmethod
    def overrides(cls, namespace: argparse.Namespace) -> dict[str, Any]:
        """The fields that were given on the command line."""
        names = (field.name for field in dataclasses.fields(cls))
        return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


def format_value(value: Any) -> str:
    """A setting as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(str(v) for v in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
