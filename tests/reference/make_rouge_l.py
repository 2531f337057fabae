"""Makes rouge_l.json with the reference package, in an environment of its own:

python -m venv /tmp/rouge && /tmp/rouge/bin/pip install rouge_score==0.1.2
/tmp/rouge/bin/python tests/reference/make_rouge_l.py
"""

import json
import random
from pathlib import Path

from rouge_score import rouge_scorer

WORDS = "the a cat Cat sat on mat, mat. dog_house 3x 12 it's don't (yes) re-entry e.g. x=1 END\nnew\tline".split(" ")
CHOSEN = [
    ["", ""], ["word", ""], ["", "word"], ["...", "!?"], ["same words here", "same words here"],
    ["The quick_brown fox", "the Quick fox jumps"], ["a b c d e f", "f e d c b a"], ["a a a b", "a b a a"],
    ["Return the absolute value of the argument.", "Return the absolute value."],
    ["Store a file in line mode.", "Retrieve data in line mode. A new port is created for you."],
    ["True if this file is closed.", "Return True if the file has been closed"],
    ["tokens2words 4u", "tokens 2 words 4 u"], ["UPPER lower MiXeD", "upper LOWER mixed"],
]  # fmt: skip

draw = random.Random(7)
pairs = list(CHOSEN)
for _ in range(60):
    sides = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(2)]
    pairs.append(sides)
scorer = rouge_scorer.RougeScorer(["rougeL"])
table = [[answer, reference, scorer.score(reference, answer)["rougeL"].fmeasure] for answer, reference in pairs]
rows = ",\n".join(json.dumps(row) for row in table)
Path(__file__).with_name("rouge_l.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
