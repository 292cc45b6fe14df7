"""YAML files of settings: `--config FILE.yaml`, and config.yaml in the folder of a run, which holds every setting.

A small part of YAML 1.2 is read: mappings, lists, text, decimal numbers, true, false and null. Anchors, aliases, tags
and repeated keys are refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..data.untrusted import one_line, read_regular, shown
from .config import ConfigError, TrainConfig, config_of
from .files import write_atomically

NAME = "config.yaml"
MOST_YAML = 64 * 2**10  # bytes; all settings take 3 KiB
MOST_DEPTH = 20
# What text without quotes means other than itself; YAML 1.1 also knows 1:30, 0o17, yes and dates, and not 1e-4.
PLAIN = {
    "null": (re.compile(r"null|~|"), ["n", "~", ""]),
    "bool": (re.compile(r"true|false"), ["t", "f"]),
    "int": (re.compile(r"[-+]?[0-9]+"), list("-+0123456789")),
    "float": (
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"), list("-+.0123456789")
    ),
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="expected no anchors, aliases or tags", problem_mark=event.start_mark)
        if self.depth >= MOST_DEPTH:
            problem = f"expected at most {MOST_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if not isinstance(name, str) or names.count(name) > 1:
                problem = f"expected names, each once, got {shown(name)}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> yaml.ScalarNode:
        """In double quotes where a line separator of Unicode would else be written as it is, and read as a space."""
        style = '"' if {*text} & {"\x85", "\u2028", "\u2029"} else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in PLAIN.items():
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern.pattern})$"), _first)


def write_yaml(config: TrainConfig, path: Path) -> None:
    """Writes every setting. The file is complete or absent."""
    text = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def with_yaml(config: TrainConfig, path: Path) -> TrainConfig:
    """`config` with the settings that a file has. Raises ConfigError, naming the file and the setting."""
    try:
        content = yaml.load(read_regular(path, MOST_YAML), Loader=_Loader)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        said = one_line(error).replace(' in "<byte string>",', ", in").removeprefix(f"{path}: ")
        raise ConfigError(f"{path} is no YAML file of settings: {said}") from error
    return config_of(_merged(dataclasses.asdict(config), {} if content is None else content, "", path), path)


def _merged(settings: dict[str, Any], changes: Any, where: str, path: Path) -> dict[str, Any]:
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{path}: {where or 'the file'}: expected settings by name, got {shown(changes)}")
    merged = dict(settings)
    for name, value in changes.items():
        full = f"{where}.{name}".lstrip(".")
        if name not in settings:
            raise ConfigError(f"{path}: {shown(full)[1:-1]} is no setting; expected one of {', '.join(settings)}")
        merged[name] = _merged(settings[name], value, full, path) if isinstance(settings[name], dict) else value
    return merged
