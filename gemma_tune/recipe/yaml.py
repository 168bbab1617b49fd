"""A strict reader of YAML 1.2 core, with the line of every value.

Built on the event stream of PyYAML's parser, whose own loader follows YAML 1.1 and is therefore full of traps for a
recipe: there `2e-4` is text, `no` is false, `12:30` is 750, `010` is 8, and the last of two equal keys wins. Here

- `2e-4`, `1e+4` and `2E5` are numbers; only `true` and `false` are truth values; `no`, `12:30`, `010` and `1_000`
  stay text;
- equal keys, anchors, aliases, merges, tags and a second document are refused, each with its line;
- size, nesting and the length of a number are limited before anything is built.

Nothing here recurses, so no input can exhaust the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gemma_tune.console import TOKEN
from gemma_tune.errors import Problem, UserError
from gemma_tune.recipe.files import decode, read_bytes

MAX_DEPTH = 20
MAX_DIGITS = 400

COMMAND_LINE = 0
"""The line number of a value that was given on the command line."""


@dataclass(slots=True)
class Node:
    """One value of a document.

    Attributes:
        value: None, bool, int, float, str, a list of nodes or a dict of nodes.
        line: line of its key, or of itself in a list; COMMAND_LINE where it came from there.
        text: a scalar's text as written, without quotes.
        plain: True for a scalar without quotes, whose type was guessed from its text.
        raw: the whole text as typed on the command line; a key that holds text takes it verbatim.
        error: why `raw` is no YAML; it counts where the key does not hold text.
    """

    value: bool | int | float | str | list[Node] | dict[str, Node] | None
    line: int
    text: str = ""
    plain: bool = False
    raw: str | None = None
    error: Problem | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A document that could be parsed. `problems` are the findings that did not stop the parser, such as equal keys."""

    name: str
    text: str
    root: Node
    problems: tuple[Problem, ...] = ()


def load(path: str | Path) -> Document:
    """Read the file `path`.

    Raises:
        UserError: the file cannot be read, is no text, is no YAML, or holds no mapping.
    """
    name = str(path)
    return parse(decode(read_bytes(name), name), name)


# Line separators other than LF and CR are here as well: YAML 1.1 parsers break lines at them, YAML 1.2 does not.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def parse(text: str, name: str, *, line: int | None = None, mapping: bool = True) -> Document:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what errors call it.
        line: the line number that all nodes get; None counts the lines of `text`.
        mapping: refuse an empty document and one that is no mapping.

    Raises:
        UserError: not YAML, or above a limit.
    """
    if found := FORBIDDEN.search(text):
        raise _Syntax(text, name, line).error(
            found.start(), f"the character U+{ord(found[0]):04X} may not stand in a recipe", _forbidden_fix(found[0])
        )
    builder = _Builder(text, name, line)
    root = builder.build()
    if mapping:
        _check_root(root, name)
    return Document(name, text, root or Node(None, 1 if line is None else line), tuple(builder.problems))


def _forbidden_fix(character: str) -> str:
    if character == "\0":
        return "remove it; a file full of them is UTF-16 without a byte order mark: save it as UTF-8"
    return f'remove it, or write it inside double quotes as "\\u{ord(character):04x}"'


def _check_root(root: Node | None, name: str) -> None:
    if root is None or root.value is None:
        raise UserError("the recipe is empty", where=name, fix="start from one: gemma-tune recipes list")
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else "a single value"
        raise UserError(
            f"a recipe is a mapping of sections, this is {kind}",
            where=f"{name}:{root.line}",
            fix="write sections such as `model:` and `data:` at the left margin, without a leading `-`",
        )


class _Syntax:
    """Turns a position in a text into an error that shows the line with a caret."""

    def __init__(self, text: str, name: str, line: int | None) -> None:
        self.text = text
        self.name = name
        self.line = line

    def error(self, index: int, what: str, fix: str) -> UserError:
        before = self.text[: max(0, index)]
        # The parser counts CR, LF and CRLF as one line break each.
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        start = max(before.rfind("\n"), before.rfind("\r")) + 1
        content = re.split(r"[\r\n]", self.text[start:], maxsplit=1)[0]
        column = index - start
        first = max(0, column - 60)
        # Masked before it is cut: a piece of a token is still a secret.
        content = TOKEN.sub(lambda token: token[1] + "*" * (len(token[0]) - len(token[1])), content)
        excerpt = FORBIDDEN.sub("?", content[first : first + 80].replace("\t", " "))
        where = f"{self.name}:{line}:{column + 1}" if self.line is None else self.name
        return UserError(f"{what}\n    {excerpt}\n    {' ' * (column - first)}^", where=where, fix=fix)


@dataclass(slots=True)
class _Frame:
    """A mapping or list that is being built."""

    node: Node
    key: str | None = None
    key_line: int = 0
    keep: bool = True
    lines: dict[str, int] = field(default_factory=dict)


class _Builder:
    """Builds nodes from PyYAML's events with its own stack."""

    def __init__(self, text: str, name: str, line: int | None) -> None:
        self.syntax = _Syntax(text, name, line)
        self.name = name
        self.line = line
        self.problems: list[Problem] = []
        self.stack: list[_Frame] = []
        self.root: Node | None = None

    def build(self) -> Node | None:
        for event in self._events():
            line = self._line_of(event)
            if isinstance(event, yaml.DocumentStartEvent):
                self._start_document(event, line)
            elif isinstance(event, yaml.AliasEvent):
                self._refuse(line, f"alias *{event.anchor}", "write the value out")
                self._add(Node(None, line))
            elif isinstance(event, yaml.ScalarEvent):
                self._refuse_decoration(event, line)
                self._add_scalar(event, line)
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self._refuse_decoration(event, line)
                self._open(event, line)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                self.stack.pop()
        return self.root

    def _line_of(self, event: yaml.Event) -> int:
        if self.line is not None:
            return self.line
        return event.start_mark.line + 1 if event.start_mark else 1

    def _where(self, line: int) -> str:
        return f"{self.name}:{line}" if line else self.name

    def _events(self) -> Iterator[yaml.Event]:
        loader = yaml.SafeLoader(self.syntax.text)
        try:
            while loader.check_event():
                yield loader.get_event()
        except yaml.MarkedYAMLError as error:
            raise self._explain(error) from None
        except (ValueError, OverflowError, yaml.YAMLError):
            # An escape such as "\UFFFFFFFF" names no character; PyYAML lets chr() fail.
            raise self.syntax.error(loader.index, "an escape that names no character", "correct the escape") from None

    def _explain(self, error: yaml.MarkedYAMLError) -> UserError:
        what, fix, at_context = _plain_words(error)
        mark = (error.context_mark if at_context else error.problem_mark) or error.context_mark
        return self.syntax.error(mark.index if mark else 0, what, fix)

    def _start_document(self, event: yaml.DocumentStartEvent, line: int) -> None:
        if self.root is not None:
            raise UserError(
                "a second document starts here; a recipe is one document",
                where=self._where(line),
                fix="remove the line `---`, or write two files",
            )
        if event.version and tuple(event.version) != (1, 2):
            raise UserError("recipes are YAML 1.2", where=self._where(line), fix="remove the line with %YAML")

    def _refuse(self, line: int, what: str, fix: str) -> None:
        self.problems.append(Problem(f"{what} is not supported in recipes", self._where(line), fix))

    def _refuse_decoration(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, line: int) -> None:
        if event.anchor:
            self._refuse(line, f"anchor &{event.anchor}", "write the value out where it is needed")
        if event.tag:
            self._refuse(line, f"tag {event.tag}", "remove the tag; the key decides the type")

    def _open(self, event: yaml.Event, line: int) -> None:
        if len(self.stack) >= MAX_DEPTH:
            start = event.start_mark.index if event.start_mark else 0
            raise self.syntax.error(start, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
        node = Node({} if isinstance(event, yaml.MappingStartEvent) else [], line)
        self._add(node)
        self.stack.append(_Frame(node))

    def _add_scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        text = _joined_surrogates(event.value)
        if re.search("[\x00\ud800-\udfff]", text):
            self._refuse(line, "an escape for U+0000 or for half a character", "remove it")
            text = ""
        if event.style is not None:
            self._add(Node(text, line, text))
        elif len(text) > MAX_DIGITS and _NUMBER.match(text):
            self._refuse(line, f"a number of {len(text):,} characters", "write a shorter one")
            self._add(Node(None, line))
        else:
            self._add(Node(resolve(text), line, text, plain=True))

    def _add(self, node: Node) -> None:
        """Put `node` where it belongs: as the root, as a list item, as a key, or as the value of the last key."""
        if not self.stack:
            self.root = node
            return
        frame = self.stack[-1]
        parent = frame.node.value
        if isinstance(parent, list):
            parent.append(node)
        elif frame.key is None:
            self._take_key(frame, node)
        else:
            assert isinstance(parent, dict)
            node.line = frame.key_line
            if frame.keep:
                parent[frame.key] = node
            frame.key = None

    def _take_key(self, frame: _Frame, node: Node) -> None:
        if isinstance(node.value, (dict, list)):
            raise UserError("a key must be a single word", where=self._where(node.line), fix="write `key: value`")
        key, frame.key_line = node.text, node.line
        frame.keep = key not in frame.lines
        if node.plain and key == "<<":
            self._refuse(node.line, "a merge (<<)", "write the keys out")
            frame.keep = False
        elif not frame.keep:
            first = frame.lines[key]
            what = f"{key}: this key already stands in line {first}"
            self.problems.append(Problem(what, self._where(node.line), "remove one of the two"))
        frame.lines.setdefault(key, node.line)
        frame.key = key


def _joined_surrogates(text: str) -> str:
    """JSON writes characters beyond U+FFFF as two escapes; joined they are one character. Half a pair stays."""

    def character(pair: re.Match[str]) -> str:
        high, low = map(ord, pair[0])
        return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))

    return re.sub("[\ud800-\udbff][\udc00-\udfff]", character, text)


_NUMBER = re.compile(r"[-+]?[0-9.]")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
# Digits alone are not here: `010` is neither an integer that all readers agree on nor a float.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def resolve(text: str) -> bool | int | float | str | None:
    """The value of a scalar without quotes (YAML 1.2, section 10.3.2), save that `010` stays text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


_FLOW = "[ ] { } ,"


def _on_one_line(error: yaml.MarkedYAMLError) -> bool:
    start, end = error.context_mark, error.problem_mark
    return bool(start and end and start.line == end.line and end.index < len(end.buffer or "") - 1)


def _plain_words(error: yaml.MarkedYAMLError) -> tuple[str, str, bool]:
    """What a parser's error means, what to do, and whether it is best shown where the construct began."""
    problem, context = str(error.problem or ""), str(error.context or "")
    if "'\\t'" in problem:
        return "YAML forbids tabs here", "indent with spaces", False
    for opening, closing in ("[]", "{}"):
        if f"expected ',' or '{closing}'" in problem:
            if _on_one_line(error):
                return (
                    f"a comma or {closing} is missing here",
                    f"add it, or quote text that contains any of {_FLOW}",
                    False,
                )
            return f"the {opening} that opens here is not closed", f"add {closing} or a missing comma", True
    if "unexpected end of stream" in problem and "quoted" in context:
        return "the quote that opens here is not closed", "add the closing quote", True
    if "mapping values are not allowed" in problem:
        return "a second `:` where none may stand", "quote text that contains `: `, or correct the indentation", False
    if "could not find expected ':'" in problem:
        return "a key without `:`", "write `key: value`", True
    if "cannot start any token" in problem:
        return "text may not start with this character", "put the text in quotes", False
    if "expected <block end>" in problem or "expected '<document start>'" in problem:
        return "this does not fit the lines above", "check the indentation and the quotes", False
    return problem or context or "not YAML", "correct the line that is shown", False
