"""Texts on which tokenizers differ: runs, control characters, emoji, scripts, bytes, code, and chance."""

from __future__ import annotations

import random
from pathlib import Path

_SCRIPTS = (
    "Zażółć gęślą jaźń. Ärger mit Öl, große Straße; l'été où ça gèle déjà, ¿qué?",
    "Съешь же ещё этих мягких французских булок да выпей чаю. Ґанок їжака.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "עטלף אבק נס דרך מזגן שהתפוצץ כי חם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "আমি বাংলায় গান গাই। தமிழ் எழுத்துகள் అక్షరాలు ಅಕ್ಷರ",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ກຂຄງ ခဂဃင",
    "いろはにほへと ちりぬるを。カタカナ、漢字とひらがなの混在。",
    "天地玄黃,宇宙洪荒。简体字与繁體字。「引號」『』",
    "다람쥐 헌 쳇바퀴에 타고파. 한글",
    "ᚠᛇᚻ ᛒᛦᚦ ᚠᚱᚩᚠᚢᚱ 𐎀𐎁𐎂 𓀀𓀁 𒀀𒀁 𐀀𐀁 ꙮ ⸘ ⁂",
    "Việt Nam: Tiếng Việt có dấu thanh; ğüşiöç İı; ŋ ʃ ʒ θ",
    "ሰማይ አይታረስ ንጉሥ አይከሰስ። გამარჯობა Բարեւ",
    "∀x∈ℝ: ∃y ≥ x² ⇒ ∑ᵢ₌₁ⁿ aᵢ ≠ ∫₀^∞ e^{-t} dt; 𝔹𝕆𝕃𝔻 𝒮𝒸𝓇𝒾𝓅𝓉",
)
_EMOJI = (
    "👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪🇫🇷☺️❤️‍🔥👨🏿‍🚀",
    "😀😀😀😀😀😀😀😀 🤷🏻‍♀️ 1️⃣2️⃣#️⃣ ©️™️ ⌚️⏰",
    "‍‍‍ a‍b ‌c‌ \ufeffBOM \u200b\u200b zero \u2060\u00ad soft",
    "e\u0301e\u0301 a\u030a n\u0303 Z̸̡̧̢̛̺̲͔a̵̢̛l̷̨̛g̶̨̧o̵̧",
)
_CODE = (
    "def f(x):\n    if x:\n\treturn  x ** 2  # square\n\n\n    return None\n",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] += b[i]\t/* sum */;\r\n}\r\n",
    '{"a": [1, 2.50, -3e-7], "b": {"c": null, "d": "\\u00e9\\n"}}',
    "SELECT *  FROM t WHERE a >= 10 AND b LIKE '%x%';  -- note",
    "$ ls -la | grep '^d' && echo \"$HOME\" > /dev/null 2>&1",
    "<html><body><h1>Title</h1><table><tr><td>1</td></tr></table></body></html>",
    "<p class='x'>a &nbsp;&amp; b</p><br/><ul><li>x</li></ul><code>y</code>",
    "\\begin{align} x &= \\frac{1}{2} \\\\ y^{2}_{i} \\end{align} $a_1$ $$b$$",
    "https://example.org/a/b?c=d&e=%20f#g mail@example.org 192.168.0.1 ::1 2024-02-29T23:59:60Z",
    "=>===>!==<=>->>>::&&||??..//**+++---~~~^^^",
    "0 00 000 1234567890 3.14159265358979 0xDEADBEEF 1e-10 ½ ⅓ ① Ⅷ",
)
_CONTROL = (
    "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<eos><pad><unk><mask> <unused0> <unused98> </s> <s> [PAD1] <0x41> <0x0A>",
    "< start_of_turn> <start_of_turn <start_of_turn>> <<bos>> <|im_end|> [INST]",
)
_REPEATED = (
    "-",
    "=",
    "*",
    "#",
    "_",
    ".",
    "~",
    "/",
    "\\",
    "a",
    "ha",
    "ab",
    "lol ",
    "0",
    "!?",
    "的",
    "é",
    "—",
    "()",
    "{}",
)
_RARE = [(0x00, 0x20), (0x7F, 0xA1), (0x0870, 0x0898), (0xE000, 0xE008), (0xFFF0, 0xFFFE), (0x10FFF0, 0x10FFFE)]


def hard_texts(seed: int = 0) -> list[str]:
    """At least 1,000 texts, always the same for a seed. None has U+2581 in it."""
    texts = [*_SCRIPTS, *_EMOJI, *_CODE, *_CONTROL, "", " ", "\n", "\t", "\r", "a", " a", "a "]
    for count in range(2, 101):
        texts += [" " * count, f"a{' ' * count}b", f"\n{' ' * count}x = 1", f".{' ' * count}\n"]
    for count in range(1, 71):
        texts += [
            "\n" * count,
            f"a{chr(10) * count}b",
            "\t" * count,
            f"x{chr(9) * count}y",
            f"{' ' * count}{chr(9) * 3}z",
        ]
    texts += [unit * count for unit in _REPEATED for count in (2, 3, 5, 8, 13, 21, 34, 55)]
    texts += [chr(code) for first, last in _RARE for code in range(first, last)]
    texts += [f"a{chr(code)}b {chr(code) * 3}" for first, last in _RARE for code in range(first, last)]
    texts += Path(__file__).read_text(encoding="utf-8").split("\n\n")
    draw = random.Random(seed)
    texts += [_mixed(draw) for _ in range(300)]
    return [text for text in texts if "▁" not in text]


def _mixed(draw: random.Random) -> str:
    pool = (*_SCRIPTS, *_EMOJI, *_CODE, *_CONTROL)
    parts = []
    for _ in range(draw.randrange(1, 9)):
        match draw.randrange(5):
            case 0:
                text = draw.choice(pool)
                start = draw.randrange(len(text))
                parts.append(text[start : start + draw.randrange(1, 30)])
            case 1:
                parts.append(draw.choice((" ", "\n", "\t", "\r\n")) * draw.randrange(1, 70))
            case 2:
                parts.append(draw.choice(_REPEATED) * draw.randrange(1, 40))
            case 3:
                parts.append("".join(chr(draw.randrange(0x20, 0x3000)) for _ in range(draw.randrange(1, 12))))
            case _:
                parts.append("".join(chr(draw.randrange(0x1F300, 0x1FB00)) for _ in range(draw.randrange(1, 4))))
    return "".join(parts)
