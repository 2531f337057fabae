"""Compute ROUGE-L of an answer against a reference, in any language.

    rouge_l("a cat sat", "the cat sat down")   # F-measure: 2 PR / (P + R) of the longest common subsequence of words

The definition is that of Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. On ASCII text the values
equal those of Google's rouge_score, which scores other scripts as 0, since it keeps only a-z and 0-9. Here a word is a
run of letters, digits and marks; in scripts without spaces between words each character is a word.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# Prefixes of Unicode names of characters
_WITHOUT_SPACES = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "BOPOMOFO ")


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """Return " " between words, "m" for a mark, "c" for a character that is a word by itself, "w" within a word."""
    category = unicodedata.category(character)[0]
    if category not in "LNM":
        return " "
    if category == "M":
        return "m"
    name = unicodedata.name(character, "")
    return "c" if name.startswith(_WITHOUT_SPACES) else "w"


def words(text: str) -> list[str]:
    """Return the words of a text for comparison: composed (NFKC), without case and punctuation.

    >>> words("Naïve_test, 3x: 数学")
    ['naïve', 'test', '3x', '数', '学']
    """
    found: list[str] = []
    open_word = False  # whether the next letter belongs to the last word
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = _kind(character)
        if kind == " ":
            open_word = False
        elif kind == "c":
            found.append(character)
            open_word = False
        elif found and (open_word or (kind == "m" and _kind(found[-1][0]) == "c")):
            found[-1] += character
        else:
            found.append(character)
            open_word = True
    return found


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words.

    Each word of b takes one addition of len(a) bits: Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004.
    """
    where: dict[str, int] = {}
    for position, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << position
    everything = (1 << len(a)) - 1
    row = everything
    for word in b:
        matches = row & where.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of ROUGE-L, in [0, 1]; 0 if the texts have no word in common."""
    a, b = words(answer), words(reference)
    common = common_subsequence(a, b)
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)
