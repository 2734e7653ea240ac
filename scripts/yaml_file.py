"""YAML files that people write: strict reading, and the line of each value for messages about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.problems import Problem

Where = tuple[str | int, ...]


@dataclass
class YamlFile:
    """A parsed file: its data, and for each value the line it stands on, by the path of keys and indices to it."""

    path: Path
    data: Any
    lines: dict[Where, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set, repr=False)  # while it is read: the nodes that were met

    def at(self, where: Where) -> str:
        """`config/endpoint.yaml:12`: the line of a value, or of the nearest thing above it."""
        while where and where not in self.lines:
            where = where[:-1]
        return f"{self.path}:{self.lines.get(where, 1)}"


def read(path: Path) -> YamlFile:
    """Read one document. A key that stands twice is an error, not a silent choice. Raises Problem with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Problem(f"{path} does not exist; restore it: git checkout {path}") from None
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise Problem(f"{path} is not UTF-8 text") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        found = YamlFile(path, None)
        if node is not None:
            _walk(node, (), found)
            found.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Problem(f"{path}:{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that no calendar has
        raise Problem(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from None
    return found


def _walk(node: yaml.Node, where: Where, found: YamlFile) -> None:
    line = node.start_mark.line + 1
    if id(node) in found.seen:
        # Anchors and aliases: nobody needs them here, and nested ones grow without bound.
        raise Problem(f"{found.path}:{line}: anchors (&, *) are not allowed; write the value out")
    found.seen.add(id(node))
    found.lines[where] = line
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise Problem(
                    f"{found.path}:{key.start_mark.line + 1}: the key {key.value!r:.100} must be text: put it in quotes"
                )
            name = str(key.value)
            if name in seen:
                raise Problem(f"{found.path}:{key.start_mark.line + 1}: the key {name!r:.100} stands twice")
            seen.add(name)
            _walk(value, (*where, name), found)
            # The key's own line: a value can begin on a later one.
            found.lines[*where, name] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*where, index), found)
