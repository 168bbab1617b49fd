"""The YAML reader: what it takes, what it refuses, and where it says so."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.errors import UserError
from gemma_tune.recipe import files
from gemma_tune.recipe.files import MAX_BYTES
from gemma_tune.recipe.yaml import Document, load, parse, resolve


def refusal(text: str) -> str:
    """Everything that is said against `text`."""
    try:
        document = parse(text, "r.yaml")
    except UserError as error:
        return str(error)
    assert document.problems, "the document was accepted"
    return "\n".join(map(str, document.problems))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1e+4", 1e4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("2024-02-21", "2024-02-21"),
        ("nan", "nan"),
        ("0b101", "0b101"),
        ("tRue", "tRue"),
        ("1e", "1e"),
        ("٣", "٣"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = resolve(text)
    assert found == value
    assert type(found) is type(value)


def test_quotes_make_text() -> None:
    root = parse("a: '1e-4'\nb: \"true\"\nc: 1e-4\n", "r.yaml").root.value
    assert isinstance(root, dict)
    assert (root["a"].value, root["b"].value, root["c"].value) == ("1e-4", "true", 1e-4)
    assert not root["a"].plain and root["c"].plain


def test_lines_are_those_of_the_keys() -> None:
    root = parse("a:\n\n  b: 1\n  c:\n    - x\n    -\n      y: 2\n", "r.yaml").root.value
    assert isinstance(root, dict)
    inner = root["a"].value
    assert isinstance(inner, dict) and isinstance(inner["c"].value, list)
    assert (root["a"].line, inner["b"].line, inner["c"].line) == (1, 3, 4)
    assert [item.line for item in inner["c"].value] == [5, 7]


@pytest.mark.parametrize(
    ("text", "where", "what", "fix"),
    [
        ("a: [1, 2\nb: 3\n", "r.yaml:1:4", "the [ that opens here is not closed", "add ]"),
        ("a: {b: 1\n", "r.yaml:1:4", "the { that opens here is not closed", "add }"),
        ("a: 'x\n", "r.yaml:1:4", "the quote that opens here is not closed", "closing quote"),
        ("a:\n\tb: 1\n", "r.yaml:2:1", "YAML forbids tabs", "spaces"),
        ("a:\tb\n", "r.yaml:1:3", "YAML forbids tabs", "spaces"),
        ("a: b: c\n", "r.yaml:1:5", "a second `:`", "quote text"),
        ("a: @x\n", "r.yaml:1:4", "may not start", "quotes"),
        ("a: 1\nb\nc: 2\n", "r.yaml:2:1", "a key without `:`", "key: value"),
        ("a: |\n  x\n b: 2\n", "r.yaml:3:2", "does not fit", "indentation"),
        ('a: "\\UFFFFFFFF"\n', "r.yaml:1:7", "names no character", "escape"),
        ("a: [{x, ${HOME}}]\n", "r.yaml:1:", "is missing here", "quote"),
    ],
)
def test_syntax_errors_name_line_and_column_and_show_a_caret(text: str, where: str, what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "r.yaml")
    problem = caught.value.problems[0]
    assert problem.where.startswith(where)
    assert what in problem.what and problem.what.endswith("^")
    assert fix in problem.fix


def test_the_caret_stands_under_the_character_of_a_long_line() -> None:
    said = refusal("a: " + "x" * 200 + ": b: c\n")
    line, caret = said.splitlines()[1:3]
    assert line[caret.index("^")] == ":"
    assert len(line) < 100


def test_equal_keys_name_both_lines_and_the_first_wins_meanwhile() -> None:
    document = parse("a: 1\nb: 2\na: 3\n", "r.yaml")
    assert [str(problem) for problem in document.problems] == [
        "r.yaml:3: a: this key already stands in line 1\n  fix: remove one of the two"
    ]
    assert isinstance(document.root.value, dict) and document.root.value["a"].value == 1


def test_equal_keys_in_one_line_and_in_a_nested_mapping() -> None:
    assert "r.yaml:1: x: this key already stands in line 1" in refusal("a: {x: 1, x: 2}\n")


def test_a_key_may_return_in_another_mapping() -> None:
    assert parse("a: {x: 1}\nb: {x: 2}\n", "r.yaml").problems == ()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: &x 1\n", "r.yaml:1: anchor &x is not supported"),
        ("a: 1\nb: *x\n", "r.yaml:2: alias *x is not supported"),
        ("a: 1\n<<: {b: 2}\n", "r.yaml:2: a merge (<<) is not supported"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1: tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!str 1\n", "r.yaml:1: tag tag:yaml.org,2002:str"),
        ("a: ! 1\n", "r.yaml:1: tag !"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: a second document"),
        ("%YAML 1.1\n---\na: 1\n", "recipes are YAML 1.2"),
        ("- a\n", "r.yaml:1: a recipe is a mapping of sections, this is a list"),
        ("word\n", "this is a single value"),
        ("", "the recipe is empty"),
        ("# nothing\n\n", "the recipe is empty"),
        ("---\n...\n", "the recipe is empty"),
        ("? [a]\n: b\n", "a key must be a single word"),
        ("a: \x00\n", "U+0000 may not stand"),
        ("a: \x1b[31m\n", "U+001B may not stand"),
        ("a: x\u2028y\n", "U+2028 may not stand"),
        ("a: \ud800\n", "U+D800 may not stand"),
        ('a: "\\0"\n', "U+0000 or for half a character"),
        ('a: "\\ud800"\n', "U+0000 or for half a character"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: " + "[" * 5000, "nested deeper than 20"),
        ("a: " + "{a: " * 5000, "nested deeper than 20"),
        ("- " * 5000, "nested deeper than 20"),
    ],
)
def test_refused(text: str, what: str) -> None:
    said = refusal(text)
    assert what in said
    assert "fix: " in said


def test_all_forbidden_constructs_are_named_at_once() -> None:
    problems = parse("a: &x 1\nb: *x\nc: !t 1\na: 2\n", "r.yaml").problems
    assert len(problems) == 4


@pytest.mark.parametrize("word", ["'<<': 1", '"<<": 1'])
def test_a_quoted_merge_key_is_a_key(word: str) -> None:
    root = parse(word, "r.yaml").root.value
    assert isinstance(root, dict) and list(root) == ["<<"]


def test_json_escapes_of_one_emoji_are_joined() -> None:
    root = parse('a: "\\ud83d\\ude00"\n', "r.yaml").root.value
    assert isinstance(root, dict) and root["a"].value == "😀"


def test_an_access_token_is_masked_in_the_line_that_an_error_shows() -> None:
    said = refusal("a: [hf_" + "A" * 34 + "\n")
    assert "hf_*" in said and "AAA" not in said


# Files


def write(folder: os.PathLike[str], data: bytes) -> str:
    path = os.path.join(folder, "r.yaml")
    with open(path, "wb") as file:
        file.write(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"a: caf\xc3\xa9\nb: 2\n",
        b"\xef\xbb\xbfa: caf\xc3\xa9\nb: 2\n",
        "a: café\nb: 2\n".encode("utf-16"),
        b"\xfe\xff" + "a: café\nb: 2\n".encode("utf-16-be"),
        "a: café\nb: 2\n".encode("utf-32"),
        b"a: caf\xc3\xa9\r\nb: 2\r\n",
        b"a: caf\xc3\xa9\rb: 2\r",
    ],
    ids=["utf8", "bom", "utf16", "utf16be", "utf32", "crlf", "cr"],
)
def test_encodings_and_line_ends(tmp_path: os.PathLike[str], data: bytes) -> None:
    root = load(write(tmp_path, data)).root.value
    assert isinstance(root, dict)
    assert (root["a"].value, root["b"].value, root["b"].line) == ("café", 2, 2)


def test_latin_1_names_the_byte(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(UserError, match=r"r\.yaml:2: byte 11 \(0xe9\) is not UTF-8"):
        load(write(tmp_path, b"a: 1\nb: caf\xe9\n"))


def test_cut_utf_16_is_refused(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(UserError, match="is not UTF-16"):
        load(write(tmp_path, "a: 1\n".encode("utf-16")[:-1]))


def test_utf_16_without_a_mark_says_so(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(UserError, match="UTF-16 without a byte order mark"):
        load(write(tmp_path, "a: 1\n".encode("utf-16-le")))


def test_size_limit_is_exact(tmp_path: os.PathLike[str]) -> None:
    fits = b"a: 1\n#" + b"x" * (MAX_BYTES - 7) + b"\n"
    assert len(fits) == MAX_BYTES
    load(write(tmp_path, fits))
    with pytest.raises(UserError, match="is larger than 1,048,576 bytes"):
        load(write(tmp_path, fits + b"\n"))


def test_no_more_than_the_limit_is_read(tmp_path: os.PathLike[str]) -> None:
    # A sparse file of 1 TiB: reading it whole would end in a MemoryError.
    path = write(tmp_path, b"")
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match="is larger than"):
        load(path)


def test_missing_file_names_the_nearest(tmp_path: os.PathLike[str]) -> None:
    path = write(tmp_path, b"a: 1\n")
    with pytest.raises(UserError) as caught:
        load(path.replace("r.yaml", "rr.yaml"))
    assert caught.value.problems[0].what == "no such file"
    assert path in caught.value.problems[0].fix


def test_a_shipped_recipe_outside_of_a_checkout(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(UserError, match=r"fix: gemma-tune recipes copy quickstart$"):
        load(os.path.join(tmp_path, "recipes", "quickstart.yaml"))


def test_missing_folder(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(os.path.join(tmp_path, "nowhere", "r.yaml"))


def test_a_folder_names_the_recipes_in_it(tmp_path: os.PathLike[str]) -> None:
    path = write(tmp_path, b"a: 1\n")
    with pytest.raises(UserError, match="is a folder, not a recipe") as caught:
        load(str(tmp_path))
    assert path in str(caught.value)


def test_a_pipe_is_refused_without_waiting(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "pipe")
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe or a device"):
        load(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero")
def test_a_device_is_refused() -> None:
    with pytest.raises(UserError, match="is a pipe or a device"):
        load("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path: os.PathLike[str]) -> None:
    path = write(tmp_path, b"a: 1\n")
    os.chmod(path, 0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(path)


def test_an_unreadable_file_also_for_root(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(os.path.join(tmp_path, "r.yaml"))


@pytest.mark.parametrize("path", ["a\0b", "", "x" * 5000])
def test_impossible_paths(path: str) -> None:
    with pytest.raises(UserError):
        load(path)


# Arbitrary input ends in a document or in a UserError, never in anything else.

FRAGMENTS = st.sampled_from(
    [
        *("a", "b: ", ": ", "- ", "\n", "\n  ", "[", "]", "{", "}", ",", "'", '"', "&x ", "*x", "!t ", "|\n", ">\n"),
        *("#", "?", "%YAML 1.2\n", "---\n", "...\n", "\t", "\\", "<<: ", "~", "1e-4", "\r", "\x85", "\u2028"),
        *("\ufeff", "@", "`", "\0"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=40).map("".join)))
def test_any_text_gives_a_document_or_a_user_error(text: str) -> None:
    try:
        assert isinstance(parse(text, "r.yaml"), Document)
    except UserError as error:
        assert error.problems[0].what and error.problems[0].where.startswith("r.yaml")


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_survives_being_written_and_read(number: float) -> None:
    assert resolve(repr(number)) == number
    assert resolve(f"{number:e}") == float(f"{number:e}")


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_any_integer_survives_being_written_and_read(number: int) -> None:
    assert resolve(str(number)) == number


def test_the_depth_limit_is_exact() -> None:
    parse("a: " + "[" * 19 + "]" * 19, "r.yaml")
    with pytest.raises(UserError, match="nested deeper than 20"):
        parse("a: " + "[" * 20 + "]" * 20, "r.yaml")
