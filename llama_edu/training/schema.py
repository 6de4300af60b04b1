"""Dataclasses filled from files and command lines: one schema, and a sentence for each mistake.

The fields of a dataclass, their types and their docstring are the schema. A layer is a nested dict of plain values,
from a file or a command line; each is checked by itself, so that a mistake is told with the place where it was made.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import reprlib
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llama_edu.errors import UserError

__all__ = ["Schema", "brief", "convert_fields", "merge", "read_layer"]

_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?$")
_MOST = 1_000_000  # values in a file, each alias counted as often as it stands there
# What other programs call our fields.
_SYNONYMS = {"learning_rate": "lr", "max_steps": "steps", "context_length": "seq_len", "grad_clip": "clip"}
_SYNONYMS |= {"block_size": "seq_len", "hidden_size": "model.dim", "n_layer": "model.n_layers", "wd": "weight_decay"}


class Schema:
    """Names and types of all that may be set.

    Args:
        top: dataclasses whose fields stand at the top.
        sections: name -> dataclass; its fields are `name.field`. A field of `top` that is a dataclass is a section too.
        short: further names for fields, name -> full name.
    """

    def __init__(
        self, top: Sequence[type], sections: Mapping[str, type] = types.MappingProxyType({}), short=None
    ) -> None:
        self.hints: dict[str, Any] = {}
        self.help: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        self.sections = set(sections)
        self.may_be_none = set(sections)  # such a section then has its defaults
        self.short = dict(short or {})
        for cls in top:
            self._add("", cls)
        for name, cls in sections.items():
            self._add(f"{name}.", cls)

    def _add(self, prefix: str, cls: type) -> None:
        hints, help_texts = typing.get_type_hints(cls), _argument_help(cls)
        for field in dataclasses.fields(cls):
            name, hint = prefix + field.name, hints[field.name]
            nested = next((h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)), None)
            if nested is not None:
                self.sections.add(name)
                if type(None) in get_args(hint):
                    self.may_be_none.add(name)
                if hasattr(nested, "preset"):
                    self.hints[f"{name}.preset"] = str
                    self.help[f"{name}.preset"] = f"a published {name} by name; --{name} NAME says the same."
                self._add(f"{name}.", nested)
                continue
            if field.default is not dataclasses.MISSING:
                self.defaults[name] = field.default
            self.hints[name], self.help[name] = hint, help_texts.get(field.name, "")

    def check(self, layer: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A layer with its values converted. Raises UserError for unknown names and wrong types.

        Args:
            where: begins the sentence: the file's name and a colon.
        """
        checked: dict[str, Any] = {}
        self._check(layer, where, "", checked)
        return checked

    def _check(self, layer: Mapping[str, Any], where: str, prefix: str, checked: dict[str, Any]) -> None:
        for key, value in layer.items():
            name = self.short.get(prefix + str(key), prefix + str(key))
            if name in self.sections and f"{name}.preset" in self.hints and isinstance(value, str):
                value = {"preset": value}
            if name in self.may_be_none and value is None:  # an optional part, such as rope_scaling
                _put(checked, name, None)
            elif name in self.sections:
                if not isinstance(value, Mapping):
                    raise UserError(f"{where}{name} is {brief(value)}; it must be a table of its fields")
                self._check(value, where, f"{name}.", checked)
            elif name in self.hints:
                _put(checked, name, _typed(where + name, value, self.hints[name]))
            else:
                raise UserError(f"{where}{name} is no setting{self._nearest(name)}")

    def _nearest(self, name: str, shown=lambda name: name) -> str:
        """The end of a sentence about a name that is not known."""
        last = name.rpartition(".")[2]
        if last in _SYNONYMS:
            return f"; did you mean {shown(_SYNONYMS[last])}?"
        known = [*self.hints, *self.short]
        by_last = {full.rpartition(".")[2]: full for full in reversed(known)}
        found = difflib.get_close_matches(name, known, 1, 0.6) or [
            by_last[match] for match in difflib.get_close_matches(last, by_last, 1, 0.6)
        ]
        if found:
            return f"; did you mean {shown(found[0])}?"
        top = [known_name for known_name in known if "." not in known_name]
        return f"; there are {', '.join(map(shown, top))}"

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """A layer from a command line, and the files named by `--config`."""
        layer: dict[str, Any] = {}
        files: list[str] = []
        seen: set[str] = set()
        words = list(argv)
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                raise UserError(f"{word!r} belongs to no option; options begin with --, such as --lr 1e-3")
            option, equals, value = word[2:].partition("=")
            values = [value] if equals else []
            while not equals and words and not words[0].startswith("--"):
                values.append(words.pop(0))
            name = option.replace("-", "_")
            name = self.short.get(name, name)
            if name in seen:
                raise UserError(f"--{option} is given twice")
            seen.add(name)
            if name == "config":
                files += values
                continue
            if name in self.sections and f"{name}.preset" in self.hints:
                name = f"{name}.preset"
            negated = name.startswith("no_") and self.hints.get(name[3:]) is bool and not values
            if negated:
                name, values = name[3:], ["false"]
            if name not in self.hints:
                raise UserError(f"there is no option --{option}{self._nearest(name, _option)}")
            _put(layer, name, self._from_words(option, values, self.hints[name]))
        return layer, files

    def _from_words(self, option: str, values: list[str], hint: Any) -> Any:
        try:
            if hint is bool and not values:
                return True
            if not values:
                raise UserError(f"--{option} needs a value: {_describe(hint)}")
            if get_origin(hint) is tuple and not (len(values) == 1 and values[0][:1] in "[,"):
                inner = get_args(hint)[0]
                return _convert([_from_text(value, inner) for value in values], hint)
            if len(values) > 1:
                raise UserError(f"--{option} takes one value, and here are {len(values)}: {' '.join(values)}")
            return _convert(_from_text(values[0], hint), hint)
        except _Wrong as wrong:
            raise UserError(f"--{option} is {brief(' '.join(values))}; it must be {wrong}") from None

    def usage(self, prog: str, about: str) -> str:
        """What `--help` prints."""
        lines = [f"usage: {prog} [--config FILE] [options]", "", *textwrap.wrap(about, 100), ""]
        for name, hint in self.hints.items():
            default = self.defaults.get(name)
            text = self.help[name] + ("" if default in (None, "", ()) else f" (default {_shown(default)})")
            lines.append(f"  {_option(name)} {_metavar(hint)}")
            lines += textwrap.wrap(text, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
        return "\n".join(lines)


def read_layer(path: str | Path) -> dict[str, Any]:
    """The nested dict in a .yaml, .toml or .json file. Raises UserError for what is no table, or says a thing twice."""
    path = Path(path).expanduser()
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise UserError(f"there is no configuration file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration file {path} cannot be read: {error}") from error
    readers = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": _json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is no configuration: its name must end in .yaml, .toml or .json")
    try:
        layer = readers[path.suffix.lower()](text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be understood: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UserError(f"{path} cannot be understood: it is nested too deeply; a few levels say all") from None
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"{path} holds a {type(layer).__name__}; a configuration is a table of names and values")
    return layer


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`low` with what `high` says otherwise. A model named in `high` replaces the one described in `low`."""
    merged = dict(low)
    for name, value in high.items():
        inside = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping) and "preset" not in value
        merged[name] = merge(merged[name], value) if inside and name != "train_data" else value
    return merged


# --- values ----------------------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """A value is not of its type; holds what it must be."""


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 80, 80


def brief(value: Any) -> str:
    """`repr`, shortened: a few lines of YAML can stand for billions of values."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "a number of thousands of digits"


def convert_fields(config: Any) -> None:
    """Convert the fields of a dataclass, frozen or not, to their types, as those from a file. Raises UserError."""
    for name, hint in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, _typed(name, getattr(config, name), hint))


def _typed(name: str, value: Any, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except _Wrong as wrong:
        raise UserError(f"{name} is {brief(value)}; it must be {wrong}") from None


def _convert(value: Any, hint: Any) -> Any:
    """The value as the type wants it: a whole number is a float, a list a tuple, "1e-3" (YAML's text) a number."""
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in options:
            return value
    elif origin in (types.UnionType, typing.Union):
        for option in options:
            try:
                return _convert(value, option)
            except _Wrong:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
    elif hint is int or hint is float:
        try:
            if isinstance(value, str) and _NUMBER.match(value):
                value = float(value) if not re.fullmatch(r"[+-]?[\d_]+", value) else int(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if hint is float:
                    return float(value)
                if math.isfinite(value) and value == int(value):
                    if abs(value) >= 2**64:
                        raise OverflowError
                    return int(value)
        except (OverflowError, ValueError):  # ValueError: more digits than Python reads
            raise _Wrong("a number below 1.8e308" if hint is float else "a whole number below 2**64") from None
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = [options[0]] * len(value) if options[-1] is ... else options
            if len(inner) == len(value):
                try:
                    return tuple(_convert(v, h) for v, h in zip(value, inner))
                except _Wrong:
                    raise _Wrong(_describe(hint)) from None
    elif origin is list:
        if isinstance(value, list):
            return [_convert(v, options[0]) for v in value]
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _Wrong(_describe(hint))


def _describe(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, options[:-1])) + f" or {options[-1]}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in options)
    if origin is tuple and options[-1] is not ...:
        return f"{len(options)} values, each {_describe(options[0])}"
    if origin in (tuple, list):
        return f"a list, each {_describe(options[0])}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    plain |= {dict: "a table", Path: "a path"}
    return plain.get(origin or hint) or f"a {getattr(hint, '__name__', hint)}"


def _from_text(text: str, hint: Any) -> Any:
    """A word of the command line as the plain value it stands for; `_convert` checks it."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(None) in options and text.lower() in ("none", "null"):
            return None
        if any(get_origin(option) is dict or option is dict for option in options) and text[:1] == "{":
            return _structure(text)
        return _from_text(text, next(option for option in options if option is not type(None)))
    if hint is bool:
        return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)
    if origin is tuple:
        if text[:1] == "[":
            return _structure(text)
        parts = re.split("[,:]", text)
        inner = [options[0]] * len(parts) if options[-1] is ... else options
        return [_from_text(part, h) for part, h in zip(parts, inner)] if len(inner) == len(parts) else text
    if hint in (int, float) and text.lower() in ("nan", "inf", "-inf"):
        return float(text)
    return text


def _structure(text: str) -> Any:
    try:
        return _yaml(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{brief(text)} cannot be understood: {' '.join(str(error).split())}") from error


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError("reading YAML takes the package PyYAML: pip install pyyaml, or write TOML") from error

    class Loader(yaml.SafeLoader):
        """safe_load with the numbers of YAML 1.2 (0200 is no octal, 4:00 no sexagesimal); no key stands twice."""

        yaml_implicit_resolvers: typing.ClassVar = {
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_yaml_int(self, node):
            text = self.construct_scalar(node).replace("_", "")
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))

        def construct_mapping(self, node, deep=False):
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                line = node.start_mark.line + 1
                raise UserError(f"<< merges tables (line {line} and after), which is not read: write the fields out")
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
            if twice is not None:
                raise UserError(f"{twice} is given twice (line {node.start_mark.line + 1} and after)")
            return super().construct_mapping(node, deep)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    decimal, other = r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    # The first pattern that fits counts.
    for kind, pattern in (("int", r"[-+]?\d[\d_]*|0x[\da-fA-F]+|0o[0-7]+"), ("float", f"{decimal}|{other}")):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"({pattern})$"), list("-+.0123456789"))
    try:
        value = yaml.load(text, Loader)
        if _size(value, {}) > _MOST:
            raise UserError(f"its aliases stand for more than {_MOST:,} values: write out what is needed")
        return value
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else str(problem)) from error


def _size(value: Any, known: dict[int, int | None]) -> int:
    """Values in lists and tables, each alias counted as often as it stands there."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = None
        known[id(value)] = 1 + sum(_size(v, known) for v in (value.values() if isinstance(value, dict) else value))
    if known[id(value)] is None:
        raise UserError("an alias stands inside of what it names: write out what is needed")
    return known[id(value)]


def _toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UserError(f"{twice} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


# --- names -----------------------------------------------------------------------------------------------------------


def _put(nested: dict[str, Any], name: str, value: Any) -> None:
    """Set `a.b.c` in nested dicts."""
    *path, last = name.split(".")
    for part in path:
        nested = nested.setdefault(part, {})
    nested[last] = value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) in (types.UnionType, typing.Union):
        return _metavar(get_args(hint)[0])
    if get_origin(hint) is tuple:
        return f"{_metavar(get_args(hint)[0])} ..."
    return {int: "INT", float: "FLOAT", bool: "[true|false]", str: "TEXT", Path: "PATH"}.get(hint, "VALUE")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _argument_help(cls: type) -> dict[str, str]:
    """What the `Args:` of a docstring say of each name; "a, b: text" says it of both."""
    found: dict[str, str] = {}
    block = inspect.getdoc(cls) or ""
    block = block.partition("Args:\n")[2] or block.partition("Attributes:\n")[2]
    current: list[str] = []
    for line in block.splitlines():
        if line and not line.startswith("    "):
            break
        match = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if match:
            current = match[1].split(", ")
            found |= dict.fromkeys(current, match[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found
