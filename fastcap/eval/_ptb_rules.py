"""The rules of `ptb`: what a token of the Penn Treebank can look like, as the Stanford tokenizer 3.4.1 was measured to cut.

At each place the rule that reads furthest wins, and of equals the first; what a rule sees as `ahead` counts as read.
"""

from __future__ import annotations

# Letters, with the accents that Unicode keeps as characters of their own; the rest of a rule is ASCII.
L = r"(?:[^\W\d_]|[\u0300-\u036f\u0483-\u0487\u2010\u2011])"
W = r"(?:[^\W_]|[\u0300-\u036f\u0483-\u0487\u2010\u2011])"  # letters and digits
Q = "['\u2019\x92]"
QUOTES = "['\u2019\x92`\u2018\x91\u201b]"
NUMBER = r"(?:\d+(?:[.:,]\d+)*|(?:[.:,]\d+)+)"
PREFIXED = rf"(?:[dolDOL]{Q}{W}{W}+|{W}+)"

# Never the last word of a sentence, or now and then; the difference shows before a letter: "Dr.x" is a word, "Ltd.x" two.
TITLES = """
    adj adm adv alex assoc asst atty ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov govs hon
    insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof pvt rep reps rev sen sens sfc sgt
    spc st ste supt vs wm
""".split()
ABBREVIATIONS = """
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla
    fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc rd rt
    sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
""".split()
OF_STATES = "ark ariz az del ill la mass miss ore pa tex wash".split()  # not in lower case: "la.", "del." are words
IN_LOWER_OR_CAPITALISED = "mfg mtg ppte ppty pte ptes pty ptys".split()
BEFORE_NUMBERS = "art ca fig figs no nos op pp".split()
# After a single letter with a full stop these begin another sentence: "by J. The dog".
STARTERS = """
    a about according after an as at but earlier he her here however if in it last many more now once one other our she since
    so some such that the their then there these they this we what when while yet you
""".split()
SUFFIXES = """
    bat bmp c cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql tar txt wav x
    xml zip
""".split()


def _any(words: list[str]) -> str:
    return "|".join(sorted(words, key=lambda word: (-len(word), word)))


def _titled(words: list[str]) -> list[str]:
    return [word.capitalize() for word in words]


_ABBREVIATION = "|".join((
    f"(?i:{_any(ABBREVIATIONS)})",
    _any(_titled(OF_STATES) + [word.upper() for word in OF_STATES]),
    _any(IN_LOWER_OR_CAPITALISED + _titled(IN_LOWER_OR_CAPITALISED)),
))  # fmt: skip
_STARTER = "|".join(f"[{word[0].upper()}](?i:{word[1:]})" for word in sorted(STARTERS, key=lambda word: (-len(word), word)))
_WITH_APOSTROPHE = "|".join((
    rf"{Q}[nN]{Q}",
    r"'[nN](?=\s|$)|[\u2019\x92][nN]",
    rf"[dljDLJ]{Q}",
    rf"[yY]{Q}(?={L})",
    rf"(?i:dunkin|somethin|ol){Q}(?!{L})",
    rf"{Q}(?i:em|cause|till?)",
    rf"[A-HJ-XZn]{Q}{L}{{2,}}",
    rf"{L}+[aeiouyAEIOUY]{Q}[aeiouA-Z]{L}*",
    rf"(?i:cap{Q}n|cont{Q}d\.|nor{Q}easter|c'mon|e{Q}er|s'mores|ev{Q}ry|li{Q}l|nat{Q}l)",
))  # fmt: skip
_SUFFIX = "(?:[sSmMdD]|(?i:re|ve|ll))"
_NOT = rf"[nN]{QUOTES}[tT]"
_IN_URL = r"[^ \t\n\f\r\"<>|()]"
_LAST_IN_URL = r"[^ \t\n\f\r\"<>|().!?,{}]"
_IN_SITE = r"[^ \t\n\f\r\"`'<>|!(){},-_]"  # a range from the comma to the underline: no digits and no capitals
_ACRONYM = r"(?:[A-Za-z]\.){2,}"
_IN_EMAIL = r"[^ \t\n\f\r\"<>|(){}]"
_IN_DOMAIN = r"[^ \t\n\f\r\"<>|(){}.]"
_TAG = r"<(?:!--[^>\n]*--|[!?]?[A-Za-z][^<>\n]*|/[A-Za-z][^<>\n]*)>"
_WORD = rf"{L}{W}*(?:[.!?]{L}{W}*)*"
_THING = rf"{PREFIXED}(?:[-_]{PREFIXED})*"

RULES: dict[str, str] = {
    "tag": _TAG,
    "entity": r"&(?i:amp|lt|gt|quot|nbsp);|&\#\d+;",
    "bracket": r"-(?i:l[rsc]b|r[rsc]b)-",
    "url": rf"(?i:https?://){_IN_URL}{{2,}}{_LAST_IN_URL}",
    "www": rf"(?i:www)\.(?:[^ \t\n\f\r\"`'<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}(?:/{_IN_URL}+{_LAST_IN_URL})?",
    "site": rf"(?:{_IN_SITE}+\.)+(?i:com|net|org|edu)(?:/{_IN_URL}+{_LAST_IN_URL})?",
    "email": rf"<?[a-zA-Z0-9]{_IN_EMAIL}*@(?:{_IN_DOMAIN}+\.)*{_IN_DOMAIN}+>?",
    "user": r"@[a-zA-Z_][a-zA-Z_0-9]*",
    "hashtag": rf"\#{L}+",
    "split": r"(?i:cannot|gonna|gotta|lemme|gimme|wanna)",
    "it": r"'[tT](?=(?P<ahead>(?i:is|was)))",
    "doctor": r"[pP][hH]\.[dD]\.?(?=(?P<ahead>.?))",
    "abbreviation": rf"(?:{_ABBREVIATION})\.(?=(?P<ahead>.?))",
    "word": _WORD,
    "title": rf"(?i:{_any(TITLES)})\.",
    "numbered": rf"(?i:{_any(BEFORE_NUMBERS)})\.(?=\s?\d)",
    "initials": _ACRONYM,
    "initial": rf"[A-Za-z]\.(?!\s+(?:(?:{_STARTER})(?:\s|$)|M[rs]\.|{_TAG}))(?!{L})",
    "hyphened": rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{_ACRONYM}|[A-Za-z0-9]+))+",
    "thing": _THING,
    "dotted": rf"(?:{_WORD}|{_THING}|{NUMBER})\.(?=[,;:])",
    "measure": rf"\d+(?:[.,]\d+)*(?:[-_]{PREFIXED})+",
    "not": rf"[A-Za-z]*[A-MO-Za-mo-z](?=(?P<ahead>{_NOT}))",
    "ended": rf"{L}{W}*(?=(?P<ahead>{Q}{_SUFFIX})(?![A-Za-z]))",
    "apostrophe": _WITH_APOSTROPHE,
    "n't": _NOT,
    "ending": rf"'{_SUFFIX}(?![A-Za-z])|[\u2019\x92]{_SUFFIX}",
    "year": rf"{Q}\d\d(?:s|(?=\s|$))",
    "number": rf"[-+]?{NUMBER}",
    "fraction": r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}",
    "date": r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|\d{4}[-/]\d{1,2}[-/]\d{1,2}",
    "phone": r"(?:\(\d{2,3}\)[- ]?|\d{2,3}[- ])\d{3,4}[- ]\d{3,5}(?![-\d])",
    "choice": r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    "company": r"[A-Z]+(?:(?:[&+]|&amp;)[A-Z]+)+",
    "language": r"[cC]\+\+|[cCfF]\#",
    "file": rf"{W}+(?:\.{W}+)*\.(?i:{_any(SUFFIXES)})(?=[\s.,!?]|$)",
    "money": r"[A-Z]{1,2}\$",
    "smiley": rf"(?:[<>]?[:;=][-o'*]?[)(\[\]{{DdPpO|\\@]|:3)(?!{W})",
    "face": r"[-^x=~<>']_[-^x=~<>']",
    "signs": r"\\\*|\*+|_+|\#+|@+|[!?]{2,}|<<|>>",
    "mark": r"-{2,}|\.{3,5}|\.(?: \.){2,4}|''|``",
    "one": r"(?s:.)",
}
