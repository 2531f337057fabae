"""Fine-tuning data: rows and their kinds, answers token by token, packs, ROUGE-L against the reference package."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaggle_mgpu.recipes.sft import data, models, reading, rouge

# on a busy machine a draw may take seconds
patient = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
QUESTION, ANSWER = "What is 2 + 2?", "Four, naïvely: 数学."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": MESSAGES, "id": 7}],
    "instruction/input/output": [
        {"instruction": QUESTION, "output": ANSWER},
        {"instruction": "What is", "input": "2 + 2?", "output": ANSWER},
        {"instruction": QUESTION, "input": "", "output": ANSWER},
    ],
    "system/user/assistant": [{"user": QUESTION, "assistant": ANSWER, "role": "?"}],
    "input/target": [{"input": QUESTION, "target": ANSWER}],
    "conversations": [
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"conversations": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
    ],
    "instruction/context/response": [{"instruction": "What is", "context": "2 + 2?", "response": ANSWER, "id": 3}],
    "prompt/completion": [{"prompt": QUESTION, "completion": ANSWER}],
    "prompt/response": [{"prompt": QUESTION, "response": ANSWER}],
    "question/answer": [{"question": QUESTION, "answer": ANSWER}],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that merges over the boundary of a question and its answer, if one lets it."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.TINY, "vocab_size", 400)
        patch.setitem(models.TINY, "hidden_size", 16)
        models.make_tiny(folder, [QUESTION, ANSWER, "assistant\nFour", "### Answer:\nFour"] * 5, seed=0)
    return models.tokenizer(str(folder))[0]


def test_the_recipe_imports_nothing_heavy() -> None:
    code = "import sys, kaggle_mgpu.recipes.sft; print({'transformers', 'peft', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# Rows
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_each_kind_of_row_becomes_a_conversation(tmp_path: Path, kind: str, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    lines = [json.dumps(row) for row in ROWS[kind]]
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS[kind][:1]), file)
    elif suffix == ".csv":
        if kind in reading.LISTS:
            pytest.skip("a table of text holds no lists")
        with file.open("w", newline="", encoding="utf-8-sig") as lines_of_table:
            table = csv.DictWriter(lines_of_table, list({name: 0 for row in ROWS[kind] for name in row}))
            table.writeheader()
            table.writerows(ROWS[kind])
    else:
        file.write_text("[" + ",\n".join(lines) + "]" if suffix == ".json" else "\ufeff" + "\n\n".join(lines))
    found, conversations = reading.read_conversations(file)
    assert found == kind
    assert len(conversations) == (len(ROWS[kind]) if suffix != ".parquet" else 1)
    for conversation in conversations:
        assert conversation[-1] == MESSAGES[1]
        assert conversation[0]["role"] == "user"
        assert conversation[0]["content"].replace("\n\n", " ") == QUESTION


def test_a_system_message_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"system": "Be brief.", "user": QUESTION, "assistant": ANSWER}))
    _, (conversation,) = reading.read_conversations(tmp_path)
    assert conversation == [{"role": "system", "content": "Be brief."}, *MESSAGES]


CALL = {"name": "weather", "arguments": {"city": "Paris"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% for call in message.tool_calls or [] %}"
    "CALL {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_of_tools_are_learnt_as_the_template_writes_them(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, arguments: Any, tools: Any
) -> None:
    call = {"id": "1", "type": "function", "function": {**CALL, "arguments": arguments}}
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "sunny"},
        MESSAGES[1],
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}))
    _, conversations = reading.read_conversations(tmp_path)
    monkeypatch.setattr(tiny, "chat_template", WITH_TOOLS)
    (example,), _ = data.encode(tiny, conversations, 1000)
    text = tiny.decode(example.ids)
    assert f"system\n{json.dumps(TOOLS)}" in text
    assert "<|im_start|>tool\nsunny" in text
    learnt = tiny.decode([token for token, own in zip(example.ids, example.learnt, strict=True) if own])
    called = f"CALL weather {json.dumps(CALL['arguments'])}"
    assert learnt.replace("\n", "") == f"{called}<|im_end|>{ANSWER}<|im_end|>"
    assert [answer for _, answer in example.earlier] == [called]
    monkeypatch.setattr(tiny, "chat_template", models.CHATML)
    with pytest.raises(ValueError, match=r"leaves out the call of the tool 'weather': it renders the answer as \"\""):
        data.encode(tiny, conversations, 1000)


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}))
    assert reading.read_conversations(tmp_path) == ("prompt/completion", [MESSAGES])
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": MESSAGES[:1], "completion": ANSWER}))
    with pytest.raises(ValueError, match="line 1: expected text in 'prompt', got "):
        reading.read_conversations(tmp_path)


GOOD = json.dumps({"input": "a", "target": "b"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"user": "a", "assistant": "b"}', "line 4: a row of kind system/user/assistant, but FILE, line 1 is of"),
        ('{"question": "a"}', "line 4: expected a row with the fields of one of messages, conversations"),
        ("[1]", "line 4: expected a row with the fields of one of"),
        ('{"input": "a", "target": 3}', "line 4: expected text in 'target', got 3"),
        ('{"input": "a", "target": " "}', "line 4: no answer: expected a message of the assistant"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_row_that_does_not_fit_is_named_by_its_line(tmp_path: Path, line: str, says: str, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    text = f"{GOOD}\n\n{GOOD}\n{line}" if suffix == ".jsonl" else f"[{GOOD},\n\n{GOOD},\n{line}\n]"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file}, {says.replace('FILE', str(file))}")):
        reading.read_conversations(file)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", GOOD + '\n{"input": ', "a.jsonl, line 2: not valid JSON"),
        ("a.json", f"[{GOOD},\n{{'input'", "a.json: not valid JSON: .* line 2"),
        ("a.json", f"[{GOOD}", r"a.json, line 1: the list has no end: expected '\]'"),
        ("a.json", GOOD, "a.json, line 1: expected a list of rows, beginning with .* needs the suffix .jsonl"),
        ("a.json", f"[{GOOD}\n{GOOD}]", "a.json, line 2: expected ',' or .* after a row, got .*input"),
        ("a.json", f"[{GOOD}]\n[{GOOD}]", "a.json, line 2: expected nothing after the list, got "),
        ("a.jsonl", GOOD + '\n{"input": "a", "target": "\\ud83d"}', r"line 2: '\\ud83d' is half of a surrogate pair"),
        ("a.json", " [ ] ", "a.json: no rows"),
        ("a.txt", GOOD, "expected a file ending in .jsonl or .json or .csv or .parquet, got .*a.txt"),
        ("a.csv", "input,target\na,b\nc\n", "a.csv, line 3: expected a value for each column: input, target"),
        ("a.csv", 'input,target\na,"b\n', "a.csv: not a readable .csv in UTF-8: unexpected end of data"),
        ("a.parquet", "PAR", "a.parquet: not a readable .parquet file: "),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: expected messages"),
        ("a.jsonl", '{"conversations": "hello"}', "line 1: expected messages with a role and a content, both text"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', 'line 1: expected messages with a role and a content,'),
        ("a.jsonl", json.dumps({"messages": MESSAGES[1:]}), "line 1: the first message is the assistant's"),
        ("a.jsonl", json.dumps({"messages": MESSAGES, "tools": "f(x)"}), "expected a list of tool descriptions in"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [3]}]}', "line 1: expected messages with"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        reading.read_conversations(tmp_path / name)


def test_files_of_a_folder_must_agree(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.json").write_text(f"[\n{json.dumps({'messages': MESSAGES})}]")
    with pytest.raises(
        ValueError, match=r"b\.json, line 2: a row of kind messages, but .*a\.jsonl, line 1 is of kind input/ta"
    ):
        reading.read_conversations(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        reading.read_conversations(tmp_path / "none")
    (tmp_path / "b.json").unlink()
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7 what macOS leaves")
    assert len(reading.read_conversations(tmp_path)[1]) == 1


def test_the_largest_file_of_conversations_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path))
    assert reading.choose_source(None) == (None, "no data_path, and no file of conversations among the inputs")
    folder = tmp_path / "input" / "datasets" / "me" / "mine"
    folder.mkdir(parents=True)
    (folder / "SMALL.JSON").write_text(f"[{GOOD}]")
    assert reading.choose_source(None)[1] == "the only file of conversations among the inputs"
    (folder / "train.jsonl").write_text(f"{GOOD}\n" * 9)
    (folder / "metrics.jsonl").write_text('{"loss": 1.5}\n' * 99)
    (folder / "config.json").write_text('{"model_type": "llama"}' + " " * 999)
    assert reading.choose_source(None) == (
        folder / "train.jsonl",
        "the largest of 2 files of conversations among the inputs",
    )


def test_the_embedded_pairs() -> None:
    pairs = reading.embedded()
    assert len(pairs) > 1500
    by_question = {question["content"]: answer["content"] for question, answer in pairs}
    assert by_question["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace")
    assert "this" not in sys.modules, "nothing was imported to be read"


def test_conversations_that_begin_alike_are_held_out_together() -> None:
    conversations = [
        [{"role": "user", "content": f"q{i // 3}"}, {"role": "assistant", "content": str(i)}] for i in range(300)
    ]
    training, held = reading.split(conversations, 0.1)
    assert 24 <= len(held) <= 30
    assert not {c[0]["content"] for c in training} & {c[0]["content"] for c in held}
    again = reading.split(conversations[::-1], 0.1)[1]
    assert sorted(map(str, held)) == sorted(map(str, again)), "contents decide, not their order"
    assert reading.split(conversations, 0) == (conversations, [])


# Answers, token by token
def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_exactly_the_answers_are_learnt(tiny: Any) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, *MESSAGES, *MESSAGES]
    (example,), left_out = data.encode(tiny, [conversation], 1000)
    marked = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    pieces = [
        ("<|im_start|>system\nBe brief.<|im_end|>\n" + marked, False),
        (ANSWER + "<|im_end|>", True),
        ("\n" + marked, False),
        (ANSWER + "<|im_end|>", True),
        ("\n", False),
    ]
    expected = [(token, learnt) for text, learnt in pieces for token in ids(tiny, text)]
    assert list(zip(example.ids, example.learnt, strict=True)) == expected
    assert tiny.decode(example.ids) == "".join(text for text, _ in pieces)
    assert example.prompt == sum(len(ids(tiny, text)) for text, _ in pieces[:3])
    assert example.answer == ANSWER
    assert left_out == data.LeftOut()


def test_a_token_over_the_boundary_is_cut_there(tiny: Any) -> None:
    # "Answer:Four" would be tokens of its own; at generation the model sees "Answer:" and must begin with "Four"
    plain = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} assist{% else %}{{ m['content'] }}{% endif %}{% endfor %}"  # noqa: E501
    before, tiny.chat_template = tiny.chat_template, plain
    try:
        conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ant"}]
        (example,), _ = data.encode(tiny, [conversation], 100)
    finally:
        tiny.chat_template = before
    prompt, answer = ids(tiny, "x assist"), ids(tiny, "ant")
    assert ids(tiny, "x assistant") != prompt + answer
    assert example.ids == prompt + answer
    assert example.learnt == [False] * len(prompt) + [True] * len(answer)


FORGETS = (  # reasoning is left out of all but the last answer, as Qwen3's template does
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% if loop.last %}<think>{% endif %}{{ m['content'] }}"
    "<|im_end|>{% else %}Q:{{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def test_a_template_that_rewrites_history_gives_an_example_for_each_answer(tiny: Any) -> None:
    before, tiny.chat_template = tiny.chat_template, FORGETS
    try:
        examples, _ = data.encode(tiny, [[*MESSAGES, *MESSAGES]], 1000)
        texts = [
            (tiny.decode(example.ids), tiny.decode(np.array(example.ids)[example.learnt].tolist()))
            for example in examples
        ]
        tiny.chat_template = "{% if messages|length > 1 %}no{% endif %}{{ messages[0]['content'] }}"
        with pytest.raises(ValueError, match="chat template renders a question differently when its answer follows"):
            data.encode(tiny, [MESSAGES], 1000)
    finally:
        tiny.chat_template = before
    one = f"Q:{QUESTION}\nA:<think>{ANSWER}<|im_end|>"
    learnt = f"<think>{ANSWER}<|im_end|>"
    assert texts == [(one, learnt), (f"Q:{QUESTION}\nA:{ANSWER}<|im_end|>{one}", learnt)]


def test_a_tokenizer_without_a_template_gets_a_stated_one(tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    bare, said = models.tokenizer(str(tmp_path))
    assert said.startswith('the tokenizer has no chat template: "### Question:" and "### Answer:"')
    (example,), _ = data.encode(bare, [MESSAGES], 1000)
    assert bare.decode(example.ids).rstrip() == f"### Question:\n{QUESTION}\n\n### Answer:\n{ANSWER}<|im_end|>"
    assert (
        bare.decode([i for i, learnt in zip(example.ids, example.learnt, strict=True) if learnt])
        == f"{ANSWER}<|im_end|>"
    )


def test_no_part_of_a_row_is_left_out() -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": MESSAGES, "system": "Be brief."},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "chatgpt", "value": ANSWER}]},
        {"instruction": QUESTION, "input": "a table", "response": ANSWER, "system_prompt": "Be brief."},
        {"instruction": QUESTION, "context": "a table", "output": ANSWER},
    ]
    found = [reading._conversation(str(reading.kind_of(row)), row, "here") for row in rows]
    asked = {"role": "user", "content": f"{QUESTION}\n\na table"}
    assert found == [[system, *MESSAGES], MESSAGES, [system, asked, MESSAGES[1]], [asked, MESSAGES[1]]]


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{% for m in messages %}{{ m['x'"])
def test_what_a_template_refuses_is_shown(tiny: Any, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(tiny, "chat_template", template)
    with pytest.raises(ValueError, match=r"chat template refuses a conversation \(Template.*What is 2 \+ 2\?"):
        data.encode(tiny, [MESSAGES], 64)


def test_what_is_cut_off_is_counted(tiny: Any) -> None:
    (whole,), _ = data.encode(tiny, [MESSAGES], 1000)
    (cut,), left_out = data.encode(tiny, [MESSAGES], whole.prompt + 3)
    assert (cut.ids, cut.learnt) == (whole.ids[: whole.prompt + 3], whole.learnt[: whole.prompt + 3])
    assert left_out == data.LeftOut(truncated=1, tokens=sum(whole.learnt) - 3)
    none, left_out = data.encode(tiny, [MESSAGES], whole.prompt)
    assert none == []
    assert left_out == data.LeftOut(dropped=1, tokens=sum(whole.learnt))


def test_of_a_conversation_that_is_cut_the_last_answer_that_begins_is_the_last(tiny: Any) -> None:
    turns = [(f"Question {i}?", f"The answer to number {i}.") for i in range(3)]
    conversation = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    (whole,), _ = data.encode(tiny, [conversation], 1000)
    starts = [i for i, learnt in enumerate(whole.learnt) if learnt and not whole.learnt[i - 1]]
    assert (whole.prompt, whole.answer) == (starts[2], turns[2][1])
    for length, last in ((starts[2] + 1, 2), (starts[2], 1), (starts[1] + 2, 1), (starts[1], 0), (starts[0] + 1, 0)):
        (cut,), _ = data.encode(tiny, [conversation], length)
        assert (cut.prompt, cut.answer, len(cut.ids)) == (starts[last], turns[last][1], length)
        assert tiny.decode(cut.ids[: cut.prompt]).endswith(f"Question {last}?<|im_end|>\n<|im_start|>assistant\n")


def test_another_tokenizer_or_template_is_another_model(tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = {models.digest(str(tmp_path))}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "merges.txt"):
        file = tmp_path / name
        file.write_text((file.read_text() if file.exists() else "") + " ")
        found.add(models.digest(str(tmp_path)))
    assert len(found) == 6
    (tmp_path / "README.md").write_text("")
    assert models.digest(str(tmp_path)) in found


# Packs
@patient
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 80))
def test_packs_hold_each_example_once_and_no_two_could_be_one(lengths: list[int], capacity: int) -> None:
    packs = data.pack(lengths, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    filled = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert len(packs) < 2 or filled[0] + filled[1] > capacity, "no two packs could have been one"


def written(folder: Path, examples: list[data.Example]) -> data.Examples:
    data.write_examples(folder, "train", examples)
    return data.Examples(folder, "train")


def some_examples(count: int) -> list[data.Example]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 12, count)
    return [
        data.Example(draw.integers(1, 99, n).tolist(), [i >= n - 2 for i in range(n)], int(n - 2), f"answer {k}")
        for k, n in enumerate(lengths)
    ]


def test_a_pack_says_where_each_example_begins_and_what_is_learnt(tmp_path: Path) -> None:
    examples = some_examples(7)
    packs = data.Packs(written(tmp_path, examples), [[3, 0], [6], [1, 2, 4, 5]])
    batch = packs.batch(torch.tensor([2, 0]))
    width = batch["ids"].shape[1]
    assert width % 8 == 0
    for row, pack in enumerate(([1, 2, 4, 5], [3, 0])):
        chosen = [examples[i] for i in pack]
        ids = [token for example in chosen for token in example.ids]
        real = len(ids)
        assert batch["ids"][row].tolist() == ids + [0] * (width - real)
        assert batch["positions"][row, :real].tolist() == [p for e in chosen for p in range(len(e.ids))]
        assert batch["segments"][row].tolist() == [
            *(s for s, e in enumerate(chosen, 1) for _ in e.ids), *[0] * (width - real)
        ]  # fmt: skip
        pairs = [
            (at, target) for at, target in zip(batch["at"][row].tolist(), batch["targets"][row].tolist(), strict=True)
        ]
        learnt = [learnt for e in chosen for learnt in e.learnt]
        expected = [(i - 1, ids[i]) for i in range(real) if learnt[i]]
        assert [pair for pair in pairs if pair[1] != data.IGNORED] == expected
    assert packs[1]["ids"].shape[0] == 1


def test_a_first_token_is_never_predicted_from_another_example(tmp_path: Path) -> None:
    every = [data.Example([5, 6], [True, True], 0, ""), data.Example([7, 8], [True, True], 0, "")]
    batch = data.Packs(written(tmp_path, every), [[0, 1]])[0]
    assert (batch["at"].tolist(), batch["targets"].tolist()) == ([[0, 2]], [[6, 8]])


def test_the_mask_is_causal_within_each_example() -> None:
    mask = data.block_mask(torch.tensor([[1, 1, 2, 0, 0]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_prompts_to_answer_are_spread_among_the_packs(tmp_path: Path) -> None:
    packs = data.Packs(written(tmp_path, some_examples(7)), [[0, 1, 2], [3, 4], [5], [6]], prompt_batches=[[0, 1], [2]])
    rows, asked = [], []
    for start in range(0, len(packs), 2):
        batch = packs.batch(torch.arange(start, start + 2))
        rows += batch["segments"].max(1).values.tolist()
        asked.append(batch["generate"].tolist())
    assert rows == [3, 2, 1, 1], "each pack once, in order"
    assert asked == [[0], [], [1]]


# ROUGE-L
def test_rouge_l_is_the_reference_packages() -> None:
    table = json.loads((Path(__file__).parents[1] / "reference" / "rouge_l.json").read_text(encoding="utf-8"))
    assert len(table) > 60
    for answer, reference, expected in table:
        assert rouge.rouge_l(answer, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_reads_every_script() -> None:
    assert rouge.words("Cafe\u0301 CAFÉ, naïve; straße \uff12") == ["café", "café", "naïve", "straße", "2"]
    assert rouge.words("数学は楽しい hello_world") == [*"数学は楽しい", "hello", "world"]
    assert rouge.words("हिन्दी में") == ["हिन्दी", "में"]
    assert rouge.rouge_l("数学が好き", "数学は好き") == pytest.approx(0.8)
    assert rouge.rouge_l("привет мир", "Привет, мир!") == 1


@patient
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_common_subsequences_by_the_textbook(a: list[str], b: list[str]) -> None:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    assert rouge.common_subsequence(a, b) == table[-1, -1]
