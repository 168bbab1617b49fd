"""TEMPLATEs of Ollama, rendered by the engine that it uses; and what was rendered so once.

    python -m tests.ollama_engine      renders the conversations below again (needs Go 1.18 or later)

The files in tests/golden/ollama are what `render.go` there made of them, so that machines without Go compare as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from gemma_tune.export.ollama import template
from gemma_tune.gemma.chat import render_prompt
from gemma_tune.gemma.conversation import Conversation, Message, as_messages
from gemma_tune.gemma.families import FAMILIES, Family

GOLDEN = Path(__file__).parent / "golden" / "ollama"
NAMES = ("gemma3_text", "gemma4_text")
"""One family of each TEMPLATE; `test_every_template_is_golden` says whether that is all of them."""

_BLANKS = "".join(character for character in map(chr, range(0x110000)) if character.isspace())
_FIRST = (
    "Hello",
    "",
    " ",
    "\n\n  What is {{ .System }}? {{ end }} {{/* no */}} {% if x %}\t\n",
    'Say "yes", \'no\' or `maybe`; even """all three""".',
    "Ünïcødé 東京 مرحبا 👩\u200d👩\u200d👧 e\u0301 \u200b\ufeff",
    f"{_BLANKS}inside{_BLANKS}stays{_BLANKS}",
    _BLANKS * 5,
    "\x00\x01\x08\x0e\x1b kept \x7f\x1b\x00",
    "\u0085\u00c2\u00a0\u00a0\u00c2",  # bytes that end one character and begin another
    "<b>&amp;</b> %s %d $system \\n \\",
    "C:\\new\\table\n```py\nprint('{}'.format(1))\n```",
    "a\r\nb\r\n",
    "x" * 300 + " " * 300,
)
_SYSTEM = ("You are terse.", "", " \n Keep my edges. \n ", 'Quote "this" {{ .Messages }} and """that"""')


def conversations() -> list[Conversation]:
    """Every text as a user's, a model's and, of some, a system's; up to five turns."""
    made = [Conversation((Message("user", text),)) for text in _FIRST]
    for text in _FIRST:
        made.append(Conversation((Message("user", "Hi."), Message("model", text), Message("user", "And?"))))
        made.append(Conversation((Message("user", text), Message("model", "Fine."))))
    for system in _SYSTEM:
        opening = Message("system", system)
        made += [Conversation((opening, Message("user", text))) for text in _FIRST[:5]]
        turns = [Message("model" if index % 2 else "user", text) for index, text in enumerate(_FIRST[5:10])]
        made.append(Conversation((opening, *turns)))
    return made


class Spelling:
    """An encoder whose ids are characters: it turns ids back into the text that they came from."""

    OFFSET = 10_000_000

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.OFFSET + ord(character) for character in text] for text in texts]

    def decode(self, ids: Sequence[int], family: Family) -> str:
        spelled = {number: text for text, number in family.tokens.items()}
        return "".join(chr(i - self.OFFSET) if i >= self.OFFSET else spelled[i] for i in ids)


def prompt_text(conversation: Conversation, family: Family) -> str:
    """What our renderer gives a model, as text, without `<bos>`."""
    spelling = Spelling()
    ids = render_prompt(conversation, family, spelling)
    assert ids[0] == family.bos_id
    return spelling.decode(ids[1:], family)


@functools.cache
def _engine() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """`render.go`, compiled once a process; the folder goes with the process."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("this needs Go (1.18 or later) on the PATH, whose text/template Ollama uses")
    folder = tempfile.TemporaryDirectory()
    binary = Path(folder.name) / "render"
    places = {
        "PATH": os.environ["PATH"],
        "HOME": folder.name,
        "GOCACHE": f"{folder.name}/cache",
        "GOTOOLCHAIN": "local",
    }
    done = subprocess.run(
        [go, "build", "-o", str(binary), str(GOLDEN / "render.go")], capture_output=True, text=True, env=places
    )
    assert done.returncode == 0, done.stderr
    return binary, folder


def rendered_by_go(text: str, asked: Sequence[Conversation]) -> list[str]:
    """What the TEMPLATE `text` makes of the conversations. Skips the test where there is no Go."""
    task = {"template": text, "conversations": [as_messages(one) for one in asked]}
    done = subprocess.run([str(_engine()[0])], input=json.dumps(task), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered: list[str] = json.loads(done.stdout)["rendered"]
    return rendered


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_golden() -> None:
    for name in NAMES:
        text = template(FAMILIES[name])
        asked = conversations()
        cases = [
            {"messages": as_messages(one), "rendered": made}
            for one, made in zip(asked, rendered_by_go(text, asked), strict=True)
        ]
        document = {"template_sha256": digest(text), "cases": cases}
        (GOLDEN / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
