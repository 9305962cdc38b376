"""Recipe files: YAML as plain values, with the line of every key.

Only what a recipe has a use for is read: mappings with text as keys, lists, plain values and
aliases, each within a limit. All else is a `RecipeError` with its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from curvprune.places import other_kind
from curvprune.run.recipe_errors import KeyPath, RecipeError, cut, nearest_of

MAX_FILE_BYTES = 1 << 20
# Counted after aliases are expanded, so a few nested aliases cannot grow without bound.
MAX_NODES = 20_000
MAX_DEPTH = 32

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

Lines = dict[KeyPath, int]  # the line of every key, from 1


def read_yaml(path: str | Path) -> tuple[dict[str, object], Lines]:
    """The plain values of a YAML file and the line of each key path.

    Raises:
        RecipeError: a file that cannot be read, is no YAML, or uses what a recipe has no use for.
    """
    shown = str(path)
    return _parse(_read(Path(path), shown), shown)


def line_of(lines: Mapping[KeyPath, int], key: KeyPath) -> int:
    """The line of a key, or of the nearest section around it that was written."""
    while key not in lines:
        key = key[:-1]
    return lines[key]


def _read(path: Path, shown: str) -> str:
    try:
        kind = other_kind(path)
        if kind:
            raise RecipeError(f"cannot be read ({kind}); expected a recipe in YAML", path=shown)
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent
        # A name that is spelt much like the one asked for is most likely the one that was meant.
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise RecipeError(
            f"no such file; expected a recipe in YAML{nearest_of(path.name, names)}", path=shown
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError(
            f"cannot be read ({reason}); expected a recipe in YAML", path=shown
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise RecipeError(
            f"larger than {MAX_FILE_BYTES} bytes; expected a recipe in YAML", path=shown
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            "not UTF-8 text; expected a recipe in YAML, saved as UTF-8", path=shown, line=line
        ) from None


def _parse(text: str, shown: str) -> tuple[dict[str, object], Lines]:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            "character that YAML does not allow; expected plain text", path=shown, line=line
        ) from None
    try:
        # Nodes, not values: only they know their lines.
        root = loader.get_single_node()
        if root is None or root.tag == "tag:yaml.org,2002:null":
            raise RecipeError(
                "the file is empty; expected the keys model, data and compress", path=shown, line=1
            )
        line = root.start_mark.line + 1
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(
                "the top level is not a mapping; expected the keys model, data and compress",
                path=shown,
                line=line,
            )
        walk = _Walk(loader, shown)
        return walk.mapping(root, (), line), walk.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = None if mark is None else mark.line + 1
        raise RecipeError(_yaml_problem(error), path=shown, line=at) from None
    except RecursionError:
        raise RecipeError(
            f"nested too deeply; expected at most {MAX_DEPTH} levels", path=shown
        ) from None
    finally:
        loader.dispose()


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    # The mistakes that people make most get words of their own.
    if r"'\t'" in problem:
        return "a tab where YAML wants spaces; expected indentation by spaces"
    if "could not determine a constructor" in problem:
        tag = problem.rsplit(" ", 1)[-1]
        return f"the tag {cut(tag)} is not supported; expected plain YAML values"
    if "single document" in (error.context or ""):
        return "a second YAML document starts here; expected one document; remove the --- line"
    return f"YAML syntax: {cut(problem)}; expected `key: value` lines and `- item` lists"


class _Walk:
    """Turns nodes into values as `yaml.safe_load` does, and notes their lines."""

    def __init__(self, loader: yaml.SafeLoader, shown: str) -> None:
        self.loader, self.shown = loader, shown
        self.lines: Lines = {}
        self.nodes = 0  # seen so far, one behind an alias each time that it is used

    def mapping(self, node: yaml.MappingNode, key: KeyPath, line: int) -> dict[str, object]:
        self._enter(key, line)
        content: dict[str, object] = {}
        for key_node, value_node in node.value:
            own_line = key_node.start_mark.line + 1
            name = self._name(key_node, key, own_line)
            path = (*key, name)
            if path in self.lines:
                first = f"duplicate key, first on line {self.lines[path]}"
                raise self._error(f"{first}; expected each key once; remove one", own_line, path)
            # What an earlier run found and `lock_text` wrote is not read back.
            if path == ("resolved",):
                self.lines[path] = own_line
            else:
                content[name] = self._value(value_node, path, own_line)
        return content

    def _value(self, node: yaml.Node, key: KeyPath, line: int) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, key, line)
        self._enter(key, line)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [
                self._value(entry, (*key, index), entry.start_mark.line + 1)
                for index, entry in enumerate(node.value)
            ]
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(
                f"the tag {cut(node.tag)} is not supported; expected plain YAML values", line, key
            )
        if node.tag in _NUMBERS and not node.style:
            # YAML 1.1 takes 1:30 for 90, and so a pattern 2:4 for 124.
            if ":" in node.value:
                return node.value
            self._check_decimal(node.value, key, line)
        try:
            return self.loader.construct_object(node)
        # For example 2024-13-45, which looks like a date, or !!bool with a word that is none.
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise self._error(
                f"{cut(node.value)} cannot be read ({cut(str(error))}); put text in quotes",
                line,
                key,
            ) from None

    def _check_decimal(self, written: str, key: KeyPath, line: int) -> None:
        """Refuse whole numbers that are not what they look like."""
        digits = written.lstrip("+-").replace("_", "")
        if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
            near = "" if written[0] == "-" else f"; nearest: {cut(digits.lstrip('0') or '0')}"
            raise self._error(
                f"{cut(written)} has a leading zero, with which YAML 1.1 reads an octal number and "
                f"YAML 1.2 a decimal one; expected a number without{near}",
                line,
                key,
            )

    def _enter(self, key: KeyPath, line: int) -> None:
        """Note the line of a value, and count it."""
        self.lines[key] = line
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            limit = f"{MAX_NODES} values" if self.nodes > MAX_NODES else f"{MAX_DEPTH} levels"
            # Without the key, which may be as long as the limit.
            raise self._error(
                f"grows beyond {limit} once aliases are expanded; write the values out", line, ()
            )

    def _name(self, node: yaml.Node, key: KeyPath, line: int) -> str:
        """The text of a key in the mapping at ``key``."""
        if node.tag == "tag:yaml.org,2002:merge":
            raise self._error("merge keys (<<) are not supported; write the keys out", line, key)
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            written = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise self._error(f"the key {cut(written)} is not text; expected a name", line, key)
        return str(node.value)

    def _error(self, message: str, line: int, key: KeyPath) -> RecipeError:
        return RecipeError(message, path=self.shown, line=line, key=key)
