"""A Modelfile whose TEMPLATE renders what the model was trained on.

Ollama executes the TEMPLATE with Go's text/template (ollama, template/template.go; read at fb30760, August 2026) over
`.System`, all system texts joined, and `.Messages`, of which each has a `.Role` (system, user, assistant, tool) and a
`.Content`. The result equals `gemma.chat.render_prompt` as text, trimming included, without `<bos>`: the server adds
that one itself when the GGUF says `add_bos_token`, and for Gemma 4 whatever it says (llm/llama_server.go,
`tokenizerAddsBOS`), so that a TEMPLATE that held it would be read with two.

What cannot be had:
  - Ollama reads control tokens out of the text of a user, where our renderer writes them as text.
  - It joins turns of one role that follow each other by an empty line, before the TEMPLATE sees them.
  - For Gemma 4 it takes no TEMPLATE but code of its own, which the Modelfile names (`Family.ollama_code`). That code
    also renders thinking and tools, and does not count the control characters 1C to 1F as blanks. The TEMPLATE beside
    it has neither, and leaves thoughts that the text of an answer spells out where they are: Go's templates cannot
    search in a text.
  - Text with 100,000 blanks at one end: text/template goes no deeper.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family

MODELFILE = "Modelfile"

# What `str.strip` of Python, and with it `trim` of the official templates, takes away: by length in UTF-8, as Go spells
# it. Ollama gives templates no function that trims, and `slice` counts bytes.
_BLANKS = {
    1: r'"\t" "\n" "\v" "\f" "\r" "\x1c" "\x1d" "\x1e" "\x1f" " "',
    2: r'"\u0085" "\u00a0"',
    3: r'"\u1680" "\u2000" "\u2001" "\u2002" "\u2003" "\u2004" "\u2005" "\u2006" "\u2007" "\u2008" "\u2009" "\u200a" '
    r'"\u2028" "\u2029" "\u202f" "\u205f" "\u3000"',
}


def _trimming(name: str, then: str, reads: Mapping[int, tuple[str, str]]) -> str:
    """A template that takes one blank away and calls itself, until there is none.

    Args:
        reads: length of a blank in bytes -> (what reads so many bytes, what reads the others).
    """
    branch = 'if and (ge (len .) N) (eq (BLANK) KINDS) }}{{ template "NAME" (OTHERS) }}{{ else '
    branches = "".join(
        branch.replace("BLANK", blank).replace("OTHERS", others).replace("KINDS", _BLANKS[n]).replace("N)", f"{n})")
        for n, (blank, others) in reads.items()
    )
    body = '{{- define "NAME" }}{{ BRANCHES}}THEN{{ end }}{{ end }}'
    return body.replace("BRANCHES", branches).replace("THEN", then).replace("NAME", name) + "\n"


# `len (slice . 1)` is the length less one: there is no arithmetic.
_TRIM = _trimming("trim", '{{ template "trim_end" . }}', {n: (f"slice . 0 {n}", f"slice . {n}") for n in _BLANKS})
_TRIM += _trimming(
    "trim_end", "{{ . }}", {n: (f"slice . (len (slice . {n}))", f"slice . 0 (len (slice . {n}))") for n in _BLANKS}
)

# All system texts go before the text of the first user behind them, untrimmed, also where they are empty.
_FOLDING = r"""
{{- $system := "" }}{{ $told := false }}
{{- range .Messages }}
{{- if eq .Role "system" }}{{ if not $told }}{{ $system = printf "%s\n\n" $.System }}{{ $told = true }}{{ end }}
{{- else if eq .Role "user" }}TURN_START
{{- "user\n" }}{{ $system }}{{ $system = "" }}{{ template "trim" .Content }}TURN_END
{{ else if eq .Role "assistant" }}TURN_START
{{- "MODEL\n" }}{{ template "trim" .Content }}TURN_END
{{ end }}
{{- end }}TURN_START
{{- "MODEL\n" }}"""

_WITH_SYSTEM_TURNS = r"""
{{- range .Messages }}TURN_START
{{- if eq .Role "assistant" }}MODEL{{ else }}{{ .Role }}{{ end }}
{{ template "trim" .Content }}TURN_END
{{ end }}TURN_START
{{- "MODEL\n" }}"""


def template(family: Family) -> str:
    """The TEMPLATE of a generation: text up to and with what opens the model's answer."""
    body = _WITH_SYSTEM_TURNS if family.system_role == "turn" else _FOLDING
    spelled = {"TURN_START": family.turn_start, "TURN_END": family.turn_end, "MODEL": family.role_model}
    for word, spelling in spelled.items():
        body = body.replace(word, spelling)
    return _TRIM + body


def modelfile(
    gguf_name: str,
    family: Family,
    *,
    licence: str,
    lora_name: str | None = None,
    system: str | None = None,
    sampling: Mapping[str, float] | None = None,
    thinking: bool = False,
) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: file beside the Modelfile with the model, or with the base of `lora_name`.
        family: what was trained.
        licence: terms that go with the model, or where they are found.
        lora_name: file beside the Modelfile with a LoRA adapter.
        system: a system turn for conversations that begin with none.
        sampling: Ollama's parameters; those that the makers of the generation use where it is None. What is in neither
            stays Ollama's default, as does the length of the context.
        thinking: whether Gemma 4 was trained to think: Ollama then lets it, unless it is told not to.

    Raises:
        UserError: a name or text that a Modelfile cannot carry.
    """
    code = family.ollama_code
    lines = [f"# {family.label}, fine-tuned with gemma-tune. `ollama create NAME -f {MODELFILE}` reads this."]
    lines.append(f"FROM ./{_file_name(gguf_name)}")
    if lora_name is not None:
        lines.append(f"ADAPTER ./{_file_name(lora_name)}")
    if code:
        lines += [
            "# Ollama renders this model with code of its own, which RENDERER and PARSER name, and reads no TEMPLATE.",
            "# Without these lines it chooses others, which open some answers in a way that was not trained.",
            f"RENDERER {code['renderer']}",
            f"PARSER {code['thinking_parser'] if thinking else code['parser']}",
            "# For programs that know no RENDERER. It has neither thinking nor tools.",
        ]
    lines.append(f"TEMPLATE {_quoted(template(family), 'TEMPLATE')}")
    lines += [f'PARAMETER stop "{text}"' for text in stop_texts(family)]
    chosen = family.sampling if sampling is None else sampling
    lines += [f"PARAMETER {name} {value:g}" for name, value in chosen.items()]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system, 'SYSTEM')}")
    lines.append(f"LICENSE {_quoted(licence, 'LICENSE')}")
    return "\n".join(lines) + "\n"


def stop_texts(family: Family) -> tuple[str, ...]:
    """Spellings at which an answer ends: turn ends, the hand-over to a tool, and the opening of another turn.

    `<eos>` is not among them: the GGUF names it, and a server never writes it as text.
    """
    spelled = {number: text for text, number in family.tokens.items()}
    return (*(spelled[number] for number in family.stop_ids if number != family.eos_id), family.turn_start)


def write_modelfile(
    folder: Path,
    gguf_name: str,
    family: Family,
    *,
    licence: str,
    lora_name: str | None = None,
    system: str | None = None,
    sampling: Mapping[str, float] | None = None,
    thinking: bool = False,
) -> Path:
    """`modelfile` as a file in `folder`, which holds the weights.

    Returns:
        Path of the Modelfile.

    Raises:
        UserError: see `modelfile`; or `folder` does not hold what the Modelfile names.
    """
    for name in filter(None, (gguf_name, lora_name)):
        if not (folder / name).is_file():
            raise UserError(f"there is no {name} beside the Modelfile", where=str(folder), fix="write the GGUF first")
    text = modelfile(
        gguf_name,
        family,
        licence=licence,
        lora_name=lora_name,
        system=system,
        sampling=sampling,
        thinking=thinking,
    )
    file = folder / MODELFILE
    file.write_text(text, encoding="utf-8", newline="\n")
    return file


def _file_name(name: str) -> str:
    if not name or not name.isprintable() or name != name.strip() or Path(name).name != name or name.endswith('"'):
        raise UserError("a Modelfile cannot name this file", where=ascii(name), fix="rename it: letters, digits, - . _")
    return name


def _quoted(text: str, where: str) -> str:
    """Text between three quotes.

    Three quotes inside would end it early; and Ollama drops every character that Go does not call printable, such as a
    no-break space or the joiner in an emoji, without a word (parser/parser.go, `strconv.IsPrint`).
    """
    if '"""' in text:
        raise UserError('it holds """, which ends a text in a Modelfile', where=where, fix="write it in another way")
    lost = sorted({character for character in text if not character.isprintable()} - set("\n\t\r"))
    if lost:
        raise UserError(
            f"Ollama would drop {len(lost)} kinds of characters from it: {', '.join(map(ascii, lost[:5]))}",
            where=where,
            fix="leave them out, or send this text with each request instead",
        )
    return f'"""{text}"""'
