"""Words of a caption as the tokenizer of COCO's caption evaluation makes them, without Java.

COCO's evaluation (Chen et al. 2015, arXiv:1504.00325) runs the Stanford PTBTokenizer 3.4.1 with its option for lower
case, then removes a list of punctuation. The rules here reproduce what that program was observed to answer; nothing is
taken from its source. docs/evaluation.md says on how many captions both agree, and where they do not.

Two behaviours of the reference are kept on purpose, since figures change with them: brackets become the words -lrb-,
-rrb-, -lsb-, -rsb-, -lcb- and -rcb-, which its list of punctuation names in capitals only and so never removes; runs
such as `!!` and `?!` stay, too. One is not: there all captions go to the program as one text, a line each, so that a
caption with a line break of any kind but `\\n` in it shifts every later caption to another image. Here each caption is
read by itself, and a line break is a space.
"""

import re
from collections.abc import Callable

import regex

# What the reference removes: single marks, quotation marks, dashes and ellipses. Longer runs (`!!`) stay words.
PUNCTUATION = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}
# with a full stop behind it one word; the second list only where it begins with a capital, the third before a number
_ABBREVIATIONS = r"""
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt
    cf cie cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga
    gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn
    mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph\.d ph plc pres prof profs pte
    ptes pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs
    treas tue tues univ va vs vt wed wis wisc wm wyo"""
_CAPITAL_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"
_NUMBER_ABBREVIATIONS = "art ca fig figs no nos op pp prop"
# a capital letter with a full stop before one of these ends a sentence, else it is an initial
_SENTENCE_STARTERS = r"""
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once
    One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"""

_L = r"[\p{L}\p{M}]"
_A = r"[\p{L}\p{M}0-9]"
_APOS = "['’]"
_NUM = r"(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+\."
_IN_URL = r'[^\s"<>|()]'
_URL_END = r'[^\s"<>|.!?(){},\-]'
_PATH = f"/{_IN_URL}+{_URL_END}"
_HOST = r'[^\s"`\'<>|.!?,;:$()\[\]{}@/\-]+'
_SMILEY_EYES = r"[<>]?[:;=]"


def _any(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


def _keep_spaces(word: str) -> str:
    return word.replace(" ", "\u00a0")


# Of all rules that match at a place the one that matches most wins, of equally long ones the first, as in the
# reference's lexer. What is looked ahead at counts for the length: a rule's word is its group `w`, if it has one.
_RULES: tuple[tuple[str, str | Callable[[str], str] | None], ...] = (
    # markup and characters by name
    (
        r"</?[a-z][a-z0-9:.\-]*(?:[ ]+[a-z][a-z0-9_:.\-]*(?:=\"[^\"]*\"|='[^']*')?)*[ ]*/?>|<[!?][a-z\-][^>]*>",
        _keep_spaces,
    ),
    (r"&(?:mdash|ndash|nbsp|quot|apos);", ""),
    (r"&amp;", "&"),
    (r"&lt;", "<"),
    (r"&gt;", ">"),
    (r"&#[0-9]+;", None),
    # addresses
    (rf"https?://{_IN_URL}+{_URL_END}", None),
    (rf"www\.(?:{_HOST}\.)+[a-z]{{2,4}}(?:{_PATH})?|(?:{_HOST}\.)+(?:com|net|org|edu)(?:{_PATH})?", None),
    (r'<?(?:mailto:)?[a-z0-9][^\s"<>|(){}@]*@(?:[^\s"<>|(){}.@]+\.)*[a-z0-9_]+>?', None),
    (r"@[a-z_][a-z0-9_]*|#[a-z]+|##+|@@+", None),
    # words, alone and before an ending that is a word of its own
    (r"(?P<w>[a-z]*[a-mo-z])n['’`]t", None),
    (r"n['’`]t", lambda word: word.replace("’", "'")),
    (rf"(?P<w>{_A}+(?:-{_A}+)*){_APOS}(?:[msd]|re|ve|ll)(?!{_A})", None),
    (rf"{_APOS}(?:[msd]|re|ve|ll)(?![a-z])", lambda word: "'" + word[1:]),
    (rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*", None),
    (rf"{_A}+", None),
    (r"[a-z0-9]+(?:_[a-z0-9]+)+(?:-[a-z0-9]+)*", None),
    (rf"{_A}[\p{{L}}\p{{M}}0-9.,]*(?:-(?:{_ACRONYM}|{_A}+))+", None),
    (rf"{_A}+(?:-{_L}+){{0,2}}(?:/{_A}+(?:-{_L}+){{0,2}}){{1,2}}", None),
    (rf"[dlno]{_APOS}[a-z]{_A}*(?:-[a-z0-9]+)*", None),
    (r"(?-i:[A-Z]+(?:&(?:amp;)?[A-Z]+)+)", lambda word: word.replace("&amp;", "&")),
    (r"c\+\+|[cf]#", None),
    # words with an apostrophe
    (rf"(?P<w>{_APOS}t)(?:is|was)", None),
    (rf"{_APOS}(?:em|till?|cause)", None),
    (rf"{_APOS}n(?:{_APOS}|(?!{_A}))", None),
    (rf"[dljy]{_APOS}|(?:ol|somethin|dunkin){_APOS}", None),
    (rf"(?:c{_APOS}mon|cap{_APOS}n|ma{_APOS}am|o{_APOS}clock|[eo]{_APOS}er|ne{_APOS}er|ev{_APOS}ry|d{_APOS}ye)", None),
    (rf"(?:hallowe{_APOS}en|ba{_APOS}ath|hawai{_APOS}i|xi{_APOS}an|shi{_APOS}a)", None),
    (rf"{_APOS}[0-9]0s|{_APOS}[0-9][0-9](?=\s|$)", None),
    # abbreviations
    (rf"{_any(_ABBREVIATIONS)}\.|(?-i:{_any(_CAPITAL_ABBREVIATIONS.title())}\.)", None),
    (rf"(?-i:{_any(_CAPITAL_ABBREVIATIONS.upper())}\.)", None),
    (rf"(?P<w>{_any(_NUMBER_ABBREVIATIONS)}\.)\s*[0-9]", None),
    (rf"{_ACRONYM}", None),
    (rf"[a-z]\.(?!\s+(?-i:{_any(_SENTENCE_STARTERS)})(?!{_A}))", None),
    # numbers, dates, sums
    (r"[0-9]{1,2}[\-/][0-9]{1,2}[\-/][0-9]{2,4}", None),
    (rf"[+\-]?{_NUM}", None),
    (r"(?:[0-9]{1,4}[- ])?[0-9]{1,4}[/⁄][0-9]{1,4}", _keep_spaces),
    (r"\([0-9]{3}\)[ ]?[0-9]{3}[\- ]?[0-9]{4}", _keep_spaces),
    (r"(?-i:[A-Z]*\$)|€", lambda word: word.replace("€", "$")),
    ("£", "#"),
    ("¢", "cents"),
    ("¼", "1/4"),
    ("½", "1/2"),
    ("¾", "3/4"),
    ("⅓", "1/3"),
    ("⅔", "2/3"),
    # faces
    (rf"{_SMILEY_EYES}[\-o*']?[()dp\\{{@\[\]](?!{_A})", None),
    (r"[\-^x=~<>']_[\-^x=~<>']|\([\-^x=~<>'][_.]?[\-^x=~<>']\)", None),
    # marks
    (r"\.{3,5}|(?:\.[ ]){2,4}\.|…|--(?!-)|---(?!-)|----(?!-)|[‐‑‒–—―]", ""),
    (r"-{5,}|[!?]{2,}|\*+|_+|<<|>>", None),
    (r"[\s\u00ad\u200b]+|[\"'`“”‘’«»‹›.,:;!?\-]|''|``", ""),
    (r"[()\[\]{}]", lambda mark: _BRACKETS[mark]),
)
_COMPILED = tuple((regex.compile(pattern, regex.IGNORECASE), replacement) for pattern, replacement in _RULES)
# emoji, rare scripts, variation selectors and the replacement character, which the reference drops
_DROPPED = re.compile("[\U00010000-\U0010ffff\ufe00-\ufe0f\ufffd]")
_PLAIN_WORDS = re.compile(r"[ ]*([A-Za-z]+)(?=[ ]|$)")


def caption_words(caption: str) -> tuple[str, ...]:
    """The words of a caption as COCO's evaluation counts them: in lower case, without punctuation.

    >>> caption_words("A dog's T-shirt (brown) can't fit.")
    ('a', 'dog', "'s", 't-shirt', '-lrb-', 'brown', '-rrb-', 'ca', "n't", 'fit')
    """
    text = " ".join(_DROPPED.sub(" ", caption).split())
    words: list[str] = []
    place = 0
    while place < len(text):
        # most of a caption is words between spaces, on which the rules agree
        plain = _PLAIN_WORDS.match(text, place)
        if plain:
            word = plain[1].lower()
            words += _SPLIT_WORDS.get(word, (word,))
            place = plain.end()
            continue
        end, found = _longest_match(text, place)
        words += _SPLIT_WORDS.get(found, (found,) if found and found not in PUNCTUATION else ())
        place = end
    return tuple(words)


def _longest_match(text: str, place: int) -> tuple[int, str]:
    """Where the token at this place ends, and the word it becomes; empty if it is dropped."""
    longest = 0
    end = place + 1
    word = text[place]
    for pattern, replacement in _COMPILED:
        match = pattern.match(text, place)
        if match is None or len(match[0]) <= longest:
            continue
        longest = len(match[0])
        name = "w" if "w" in pattern.groupindex else 0
        end = match.end(name)
        word = match[name]
        if callable(replacement):
            word = replacement(word)
        elif replacement is not None:
            word = replacement
    # a bracket inside a face or a telephone number
    return end, word.lower().replace("(", "-lrb-").replace(")", "-rrb-")
