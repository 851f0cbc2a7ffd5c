"""Penn Treebank tokens of captions, as caption scores are defined on them, without Java.

pycocoevalcap runs Stanford's PTBTokenizer (CoreNLP 3.4.1, lower case, one caption per line) and drops
punctuation. The rules below were found by looking at what that program answers, and tests compare with it: of
all rules the one that reads most wins, what it looks ahead included, and of equals the first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Tokens that do not count. Brackets do: pycocoevalcap drops capital ones, but they come in lower case."""

# Characters beyond ASCII are read as one of these, each the stand-in of a class.
_LETTER, _ENTITY_LETTER, _DIGIT, _MARK, _SYMBOL, _UNKNOWN = "éø٣ˇ§\x7f"
_ITSELF = frozenset(
    "\x80\x85\x91\x92\x93\x94\xa0¢£¤«\xad»¼½¾²³¹–—―‘’‚‛“”„‟…‹›⁄⅓⅔、₠€⁰⁴⁵⁶⁷⁸⁹⁺⁻₊₋₀₁₂₃₄₅₆₇₈₉٫٬"  # noqa: RUF001
)
"""What rules name."""
_HYPHEN, _SPACE = "\u2010", "\u3000"
"""Two words make one with the first; neither is a token."""
_MARKS = """2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2
5c4-5c5 5c7 615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e
951-955 962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82
bbe-bc2 bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44 d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd"""
"""Code points that belong to a word and are no letters."""
_SYMBOLS = """a1 a5-a9 ac ae-b1 b4 b6-b8 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b
61e-61f 66a 66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 2020-2023 2030-2038 203b 203e-2042
207a-207e 208a-208e 20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b
2140-2144 214a-214d 214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65
ffe0-ffe1 ffe5-ffe6"""
"""Code points that are a token each; what has no class is left out and ends a token."""
_LATER = """37f 528-52f 560 588 5ef 860-88e 8a1 8ad-8c9 978 980 9fc af9 c34 c5a-c5d c80 cdd d04 d54-d5f
de6-def e86 e89 e8c e8e-e93 e98 ea0 ea8-ea9 eac 13f5-13fd 16f1-16f8 170d 171f 1878 191d-191e 19b0-19c0
19c8-19c9 1b4c 1c80-1cbf 1cf2-1cf3 1cfa 2c2f 2c5f 312e-312f 31bb-31bf 4db6-4dbf 9fcd-9fff a698-a69d a78f
a794-a79f a7ab-a7f7 a8fd-a8fe a9e0-a9fe aa7e-aa7f ab30-abbf"""
"""Letters and digits that Unicode did not have when the original was made: they have no class."""

_L, _D, _M = f"A-Za-z{_LETTER}{_ENTITY_LETTER}", f"0-9{_DIGIT}", f"{_MARK}\xad"
_WORD = f"[{_L}{_M}][{_L}{_D}{_M}]*"
_ALNUM = f"[A-Za-z{_LETTER}{_D}]"
_APOS, _APOS_OR_TICK = "['’\x92]", "['’`‘‛\x91\x92]"  # noqa: RUF001
_NUMBER = f"(?:[{_D}]*(?:[.,:٫٬\xad][{_D}]+)+|[{_D}]+)"  # noqa: RUF001
_PIECE = f"(?:[dDoOlL]{_APOS_OR_TICK}{_ALNUM})?{_ALNUM}+"
_THING = f"{_PIECE}(?:[-_{_HYPHEN}]{_PIECE})*"
_COMPOUND = r"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:(?:[A-Za-z]\.){2,}|[A-Za-z0-9\xad]+))+"
_MARKUP = (
    r"<(?:[!?][A-Za-z-][^>\r\n]*"
    r"|/?[A-Za-z][A-Za-z0-9_:.-]*(?: +[A-Za-z][A-Za-z0-9_:.-]*(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */?) *>"
)
_COMPANY = "[A-Z]+(?:(?:(?i:&amp;)|[&+])[A-Z]+)+"
_QUOTES = "`‘’‚‛“”„‟«»‹›\x91-\x94"  # noqa: RUF001
_BLANK = r"[ \t\n\xa0]"
_PART = (
    r'[^ø \t\n"`\'<>|.!?(){},-_$]+'  # of a host; the range from , to _ leaves small letters and a few signs
)
_WWW = r'(?i:www)\.(?:[^ \t\n"<>|.!?(){},]+\.)'
_PATH, _BRACED_PATH = (rf'[^ \t\n"<>|(){braces}]+[^ \t\n"<>|.!?(){{}},-]' for braces in ("{}", ""))

_ABBREVIATED = """adj adm adv alex asst attys? ave brig capt cf cie cmdr col comdr cpl dept det drs? elec
ens ft gen govs? hon insp invt jos lieut lt maj messrs mfg mlle mme mrs? ms msgr mt mtg natl pfc ph pres
profs? pvt reps? rev sens? sfc sgt spc ste? supt vs wm cont'd [A-Za-z]"""
_ABBREVIATED_LAST = """al ala apr ariz assn aug bancorp bhd bldg blvd bros calif colo conn corp cos? ct dak
dec esq est etc ext feb fla fri ga inc ind intl jan jr jul jun kans? ky ltd mar md mich minn mo mon mont neb
nev nov oct okla penn plc ppte ppty ptes? ptys? rd rt sept? seq sq sr sys tel tenn thu thurs tues? univ va
vt wed wisc? wyo"""
"""Those that may end a sentence."""
_ABBREVIATED_NAMES = (
    "A(?i:rk) A(?i:z) D(?i:el) I(?i:ll) L(?i:a) M(?i:ass) M(?i:iss) O(?i:re) P(?i:a) T(?i:ex) W(?i:ash)"
)
"""Words of their own where the first letter is small."""
_BEFORE_NUMBERS = "art ca figs? nos? op pp prop"
_STARTERS = """About According Additionally After A An As At But Earlier He Her Here However If In It Last
Many More Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There These They
This We What When While Yet You"""
"""Words that begin a sentence: the period of a single letter before them ends one."""


def _any(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


def _rule(body: str, ahead: str = "", case: bool = True) -> re.Pattern[str]:
    """What a token looks like, and what has to follow it."""
    context = f"(?=({ahead}))" if ahead else "()"
    return re.compile(f"({body}){context}", re.NOFLAG if case else re.IGNORECASE)


_RULES = (
    _rule(_MARKUP),
    *(
        _rule(*parts, case=False)
        for parts in (
            ("can", "not"),
            ("gon", "na"),
            ("got", "ta"),
            ("lem|gim", "me"),
            ("wan", "na"),
            ("'t", "is|was"),
        )
    ),
    # Words with what may be cut off behind them.
    _rule(_WORD, f"{_APOS}(?:[msd]|re|ve|ll)", case=False),
    _rule("[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*", f"n{_APOS_OR_TICK}t", case=False),
    _rule(f"n{_APOS_OR_TICK}t", case=False),
    _rule(f"{_APOS}(?:[msd]|re|ve|ll)", "[^A-Za-z]", case=False),
    _rule("[’\x92](?:n|[msd]|re|ve|ll)", case=False),  # noqa: RUF001
    _rule(_WORD),
    # Apostrophes that stay.
    _rule(f"(?:[A-HJ-XZ]|[dlno]){_APOS_OR_TICK}[{_L}]{{2,}}"),
    _rule(f"[{_L}]+[aeiouyAEIOUY]{_APOS_OR_TICK}[aeiouA-Z][{_L}]*"),
    _rule(
        f"nor'easter|nat'l|cap{_APOS}n|e'er|s'mores|c'mon|ol{_APOS}|o{_APOS_OR_TICK}o|{_APOS}(?:em|till?|cause)",
        case=False,
    ),
    _rule(f"{_APOS}n{_APOS}|{_APOS}[2-9]0s", case=False),
    _rule(f"{_APOS}n", _BLANK, case=False),
    _rule(f"{_APOS}[0-9]{{2}}", f"{_BLANK}|{_SPACE}"),
    _rule(f"[dljDLJ]{_APOS}"),
    _rule(f"[yY]{_APOS}", f"[{_L}]"),
    # The web.
    _rule(rf"(?i:https?)://{_PATH}"),
    *(  # of what has several slashes the path that begins first is the longest, whatever the host
        _rule(rf"{host}{end}")
        for host, end in (
            (f"{_WWW}+", "[A-Za-z]{2,4}"),
            (f"{_WWW}+?", f"[A-Za-z]{{2,4}}/{_BRACED_PATH}"),
            (rf"(?:{_PART}\.)+", "(?i:com|net|org|edu)"),
            (rf"(?:{_PART}\.)+?", f"(?i:com|net|org|edu)/{_BRACED_PATH}"),
        )
    ),
    _rule(
        r'(?:<|&lt;)?[A-Za-z0-9][^ \t\n"<>|()\xa0{}]*'
        r'@(?:[^ \t\n"<>|().\xa0{}]+\.)*[^ \t\n"<>|().\xa0{}]+(?:>|&gt;)?'
    ),
    _rule(f"@[A-Za-z_][A-Za-z_0-9]*|#[{_L}{_M}]+"),
    # Words with other signs inside.
    _rule(_THING),
    _rule(f"{_WORD}(?:[.!?]{_WORD})+", f"{_APOS}(?:[msd]|re|ve|ll)", case=False),
    _rule(f"{_WORD}(?:[.!?]{_WORD})+"),
    _rule(rf"{_any(_ABBREVIATED_LAST)}\.", r"[\s\S]{2}", case=False),
    _rule(rf"{_any(_ABBREVIATED_NAMES)}\.", r"[\s\S]{2}"),
    _rule(r"(?:Ph|Ed)\.D\.", r"[\s\S]{2}", case=False),
    _rule(_COMPOUND),
    _rule(_COMPANY),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule(r"[Cc]\+\+|[CcFf]#"),
    # Numbers.
    _rule(f"[-+]?{_NUMBER}"),
    _rule("[0-9٣]{1,2}[-/][0-9٣]{1,2}[-/][0-9٣]{2,4}"),
    _rule(r"(?:[0-9٣]{1,4}[- \xa0])?[0-9٣]{1,4}(?:\\?/|⁄)[0-9٣]{1,4}|[¼½¾⅓⅔]"),  # noqa: RUF001
    _rule(
        r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
        r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}"
    ),
    _rule(r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    _rule(r"[A-Z]*\$"),
    # Periods that belong to what they follow.
    _rule(rf"(?:{_any(_ABBREVIATED)}|{_any(_ABBREVIATED_LAST)})\.", case=False),
    _rule(rf"{_any(_ABBREVIATED_NAMES)}\."),
    _rule(rf"{_any(_BEFORE_NUMBERS)}\.", rf"\s?[{_D}]", case=False),
    _rule(r"[A-Za-z](?:\.[A-Za-z])*\.?"),
    _rule(r"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))\.?"),
    _rule("[A-Za-z]", rf"\.\s+(?:{_any(_STARTERS)}|{_any(_STARTERS.upper())}|{_MARKUP})\s"),
    _rule(r"(?:Ph|Ed)\.D\.?", case=False),
    *(_rule(rf"{body}\.", "[,;:、]") for body in (f"{_WORD}(?:[.!?]{_WORD})*", _THING, _COMPOUND, _COMPANY)),
    _rule(
        rf"[{_L}{_D}]+(?:\.[{_L}{_D}]+)*\.(?i:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov"
        r"|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip)",
        r"[\s.?!,]",
    ),
    # Entities and faces.
    _rule(
        "&(?:amp|lt|gt|quot|apos|nbsp|[mn]dash|ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);",
        case=False,
    ),
    _rule(r"[<>]?[:;=][-o*']?[\])(\[dDpP@\\O{|]|:3", "[^A-Za-z0-9]"),
    _rule(r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"),
    # Signs, several of some kinds together.
    _rule(
        r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|-+|_+|#+|@+|[?!]+|\*+|(?:\\\*){1,3}|<<|>>|[⁺⁻₊₋]?(?:[²³¹⁰-⁹]+|[₀-₉]+)"
    ),
    _rule(f"''|[{_QUOTES}]{{1,2}}|[^ \\t\xa0{_UNKNOWN}{_HYPHEN}{_SPACE}٫٬]"),  # noqa: RUF001
)

_PLAIN = re.compile(r"(?!(?:cannot|gonna|gotta|lemme|gimme|wanna)[ \n])[A-Za-z]{2,}(?=[ \n])", re.IGNORECASE)
"""A word that no rule would read further or cut; it only saves time."""

_NAMED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    **dict.fromkeys(("‘", "‛", "‹", "\x91"), "`"),  # noqa: RUF001
    **dict.fromkeys(("’", "›", "\x92"), "'"),  # noqa: RUF001
    **dict.fromkeys(("“", "«", "\x93"), "``"),
    **dict.fromkeys(("”", "»", "\x94", '"', "&quot;"), "''"),
    **dict.fromkeys(("–", "—", "―", "\x96", "\x97", "---", "----", "&mdash;", "&ndash;"), "--"),  # noqa: RUF001
    **dict.fromkeys(("€", "¤", "₠", "\x80"), "$"),
    "£": "#",
    "¢": "cents",
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "…": "...",
    "\x85": "...",
    "\xad": "-",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&apos;": "'",
    "&nbsp;": "",
}
_AS_WRITTEN = ("&quot;", "&apos;")
"""Stand for their signs in small letters only."""
_QUOTE_PAIR = re.compile(f"[{_QUOTES}]{{2}}")
_ENTITY = re.compile("&[aeiou](?:acute|grave|uml);", re.IGNORECASE)
"""A letter, however it is written."""
_CUT_OFF = re.compile(f"{_APOS}(?:[msd]|re|ve|ll)", re.IGNORECASE)
_NOT = re.compile(f"n{_APOS_OR_TICK}t", re.IGNORECASE)
_WITH_HYPHENS = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\xa0"})
_BRACKETS = {**_WITH_HYPHENS, ord("\xad"): None}

_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\v\f\r\u2028\u2029", " "))
_SPANNING = re.compile(
    rf"<|\d[)]?\s+[(]?\d|\.\s+\.|(?i:{_any(_BEFORE_NUMBERS)})\.\s\d"
    rf"|(?<![A-Za-z])[A-Za-z]\.\s+(?:<|{_any(_STARTERS)}|{_any(_STARTERS.upper())})"
)
"""Where a token may depend on what follows the next blank."""


def tokenize(texts: Sequence[str]) -> list[str]:
    """Each text's tokens without punctuation, in lower case, with one blank between them.

    A few tokens depend on how the next text begins, since the original reads all texts in one go: "the letter
    t." ends a sentence where "A dog" follows.
    """
    lines = [one_line(text) for text in texts]
    found = []
    for i, line in enumerate(lines):
        following = _following(lines, i)
        far = _SPANNING.search(line + following)
        if not following or (far is not None and far.start() < len(line)):
            tokens = _tokens(line, following)
        else:
            tokens = " ".join(map(_piece, line.replace("\t", " ").split(" ")))
        found.append(without_punctuation(tokens))
    return found


def _following(lines: Sequence[str], i: int) -> str:
    """What comes behind line `i`, as far as rules look: the next line that is not blank, with its end."""
    after = i + 1
    while after < len(lines) and not lines[after].strip():
        after += 1
    return "".join("\n" + line for line in lines[i + 1 : after + 1]) + (
        "\n" if after + 1 < len(lines) else ""
    )


def one_line(text: str) -> str:
    """`text` with blanks for its line breaks, which pycocoevalcap would take for the end of the caption."""
    return text.translate(_LINE_BREAKS)


def without_punctuation(tokens: str) -> str:
    """The tokens that count, of tokens with blanks between them."""
    return " ".join(token for token in tokens.rstrip().split(" ") if token and token not in DROPPED)


@lru_cache(maxsize=1 << 17)
def _piece(piece: str) -> str:
    """The tokens of what stands between two blanks. Captions repeat their words, so this is remembered."""
    return _tokens(piece, "\n")


def _tokens(text: str, following: str) -> str:
    """The tokens of `text`, which `following` comes behind, with blanks between them."""
    shadow = _ENTITY.sub(
        lambda found: _ENTITY_LETTER * len(found[0]), "".join(map(_stand_in, text + following))
    )
    tokens = []
    at, end = 0, len(text)
    while at < end:
        if (plain := _PLAIN.match(shadow, at)) is not None:
            tokens.append(plain[0].lower())
            at = plain.end()
            continue
        most, stop = 0, at
        for rule in _RULES:
            found = rule.match(shadow, at)
            if found is not None and at < found.end() <= end:
                length = found.end() - at + len(found[2])
                if length > most:
                    most, stop = length, found.end()
        tokens.append(_written(text[at:stop]))
        at = max(stop, at + 1)
    return " ".join(tokens)


def _written(token: str) -> str:
    """How a token is written down."""
    known = token.lower()
    if (named := _NAMED.get(token if known in _AS_WRITTEN else known)) is not None:
        return named
    if _QUOTE_PAIR.fullmatch(token):
        return "".join(_NAMED.get(sign, sign) for sign in token)
    if _CUT_OFF.fullmatch(token):
        return "'" + token[1:].lower()
    if _NOT.fullmatch(token):
        return ("n't" if token[1] in "'’\x92" else "n`t").lower()  # noqa: RUF001
    if not token.strip(". \xa0") and len(token) > 1:
        return "..."
    if re.fullmatch(rf"{_COMPANY}\.?", token):
        token = re.sub("(?i:&amp;)", "&", token)
    if re.fullmatch(_MARKUP, token):
        return _lower(token.replace(" ", "\xa0"))
    return _lower(token.translate(_WITH_HYPHENS if token[:1] == "#" or "@" in token else _BRACKETS))


def _lower(token: str) -> str:
    """In lower case as Java has it, which takes a sigma for a final one if no letter comes behind it."""
    if "Σ" in token:
        cased = [i for i, char in enumerate(token) if char.lower() != char.upper()]
        if len(cased) > 1 and token[cased[-1]] == "Σ":
            token = f"{token[: cased[-1]]}ς{token[cased[-1] + 1 :]}"
        token = token.replace("Σ", "\u03c3")
    return token.lower()


@lru_cache(maxsize=1 << 16)
def _stand_in(char: str) -> str:
    """A character that the rules know."""
    code = ord(char)
    if code < 0x7F or char in _ITSELF:
        return char if code > 0x1F or char in "\t\n" else _UNKNOWN
    if code > 0xFFFF:
        return _UNKNOWN
    if char in "\u058a\u2010\u2011":
        return _HYPHEN
    if char == _SPACE or "\u2000" <= char <= "\u200a":
        return _SPACE
    if _within(code, _MARKS):
        return _MARK
    if _within(code, _SYMBOLS):
        return _SYMBOL
    if _within(code, _LATER):
        return _UNKNOWN
    if char in "\u1885\u1886":  # letters they have been
        return _LETTER
    category = unicodedata.category(char)
    return _LETTER if category[0] == "L" else _DIGIT if category == "Nd" else _UNKNOWN


def _within(code: int, ranges: str) -> bool:
    bounds = (part.split("-") for part in ranges.split())
    return any(int(pair[0], 16) <= code <= int(pair[-1], 16) for pair in bounds)
