"""The accuracy of VQA."""

import re

from .registry import register_scorer

# What the official VQA evaluation evens out (github.com/GT-Vision-Lab/VQA, vqaEval.py): these marks, full stops that no
# digit follows, articles, number words, and these words with one of their apostrophes missing.
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_VQA_WORDS = {word: str(number) for number, word in enumerate(_VQA_NUMBERS)} | {"none": "0"}
_VQA_APOSTROPHES = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
"""
_VQA_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1 :]: word
    for word in _VQA_APOSTROPHES.split()
    for i, character in enumerate(word)
    if character == "'"
}


def _vqa_plain(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    together = re.search(r"\d,\d", text) is not None
    evened = text
    for mark in _VQA_MARKS:  # judged by the text as it came
        glued = together or f"{mark} " in text or f" {mark}" in text
        evened = evened.replace(mark, "" if glued else " ")
    evened = re.sub(r"\.(?!\d)", "", evened)
    words = [_VQA_WORDS.get(word, word) for word in evened.lower().split()]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


@register_scorer
def vqa_soft(prediction: str, references: list[str]) -> float:
    """VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving each annotator out once.

    Punctuation, articles, number words and contractions are evened out first. Source: the official evaluation of VQA v2
    (github.com/GT-Vision-Lab/VQA, vqaEval.py), with two differences: it evens nothing out where all references are equal,
    which is done here too; and it wants ten references. With fewer than four all the others must agree; with one, the
    answer must equal it.
    """
    said = _vqa_plain(prediction)
    agree = [said == _vqa_plain(r) for r in references]
    others = len(agree) - 1
    if others == 0:
        return float(agree[0])
    return sum(min(1.0, (sum(agree) - left_out) / min(3, others)) for left_out in agree) / len(agree)
