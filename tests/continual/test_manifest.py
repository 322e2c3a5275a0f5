import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lilora.continual import record_files
from lilora.continual.evaluate import score
from lilora.continual.instructions import InstructionDataset, Sample, instruction_data
from lilora.continual.manifest import MANIFESTS, load_manifest
from lilora.continual.records import InstructionRecord
from lilora.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def suite(tmp_path):
    """A manifest file of two tasks, one with images and one without, and its content."""
    images = tmp_path / "data" / "pictures"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(images / f"{i}.png")
    seen = [
        {"id": i, "image": f"{i}.png", "conversations": turns("<image>\nWhat is it?", f"thing {i}")} for i in range(4)
    ]
    text = [{"id": "t", "conversations": turns("2 + 2?", "four")}]
    for name, records in (("seen", seen), ("text", text)):
        for split in ("train", "test"):
            (tmp_path / "data" / f"{name}-{split}.json").write_text(json.dumps(records))
    content = {
        "name": "small",
        "data": "data",
        "model": "./base",
        "tasks": [
            {
                "name": "seen",
                "train": "seen-train.json",
                "test": "seen-test.json",
                "images": "pictures",
                "scorer": "exact",
                "instruction": "Answer in two words.",
                "answer_format": r"\w+ \w+",
            },
            {"name": "text", "train": "text-train.json", "test": "text-test.json", "scorer": "containment"},
        ],
    }
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, content


def edited(suite, edit):
    path, content = suite
    edit(content)
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_manifest_resolves_paths_and_keeps_the_order_asked_for(suite):
    path, _ = suite
    manifest = load_manifest(path)
    assert [t.name for t in manifest.tasks] == ["seen", "text"]
    assert manifest.data == path.parent / "data"
    assert manifest.model == str(path.parent / "base")
    assert manifest.tasks[0].images == path.parent / "data" / "pictures"
    assert [t.name for t in load_manifest(path, order=["text", "seen"]).tasks] == ["text", "seen"]
    assert [t.name for t in load_manifest(path, order=["text"]).tasks] == ["text"]


def test_a_model_id_stays_as_it_is(suite):
    path = edited(suite, lambda m: m.update(model="llava-hf/llava-1.5-7b-hf"))
    assert load_manifest(path).model == "llava-hf/llava-1.5-7b-hf"


def test_data_replaces_the_folder_of_the_manifest(suite, monkeypatch):
    path = edited(suite, lambda m: m.update(data="elsewhere"))
    with pytest.raises(UserError, match=r"elsewhere.seen-train\.json cannot be read .*--data"):
        load_manifest(path)
    monkeypatch.chdir(path.parent)
    assert load_manifest(path, data="data").tasks[0].train == path.parent / "data" / "seen-train.json"


def first(**change):
    return lambda m: m["tasks"][0].update(change)


def misspelt(manifest):
    task = manifest["tasks"][0]
    task["scorrer"] = task.pop("scorer")


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (
            misspelt,
            "key 'scorrer' of task number 1 is unknown; did you mean 'scorer'?",
        ),
        (first(zzz=1), "key 'zzz' of task number 1 is unknown; known are name, train"),
        (lambda m: m.update(taskz=[]), "key 'taskz' is unknown; did you mean 'tasks'?"),
        (lambda m: m.pop("name"), "key 'name' is missing"),
        (
            lambda m: m["tasks"][1].update(nmae=m["tasks"][1].pop("name")),
            "key 'nmae' of task number 2 is unknown; did you",
        ),
        (
            lambda m: m["tasks"][1].pop("train"),
            "task number 2: a task that is no probe wants the key train; add it",
        ),
        (
            lambda m: m["tasks"][1].pop("scorer"),
            "task number 2: a task with test wants the key scorer; add it",
        ),
        (lambda m: m.update(tasks=[]), "key 'tasks' is []; it must have at least 1 item"),
        (lambda m: m.update(tasks=3), "key 'tasks' is 3; it must be a valid list"),
        (lambda m: m.update(tasks=[3]), "task number 1 is 3; it must be a mapping"),
        (first(learning_rate=0), "key 'learning_rate' of task number 1 is 0; it must be a number above 0"),
        (
            first(learning_rate={"lora": "fast"}),
            "is {'lora': 'fast'}; it must be a number above 0 and at most 1, or a",
        ),
        (lambda m: m.update(learning_rate=True), "key 'learning_rate' is True; it must be a number"),
        (first(learning_rate={"pcrl": 0.1}), "names the method 'pcrl', which is unknown; did you mean 'pclr'?"),
        (first(max_new_tokens=0), "key 'max_new_tokens' of task number 1 is 0; it must be greater than 0"),
        (first(answer_format="a{1,99999999999}"), "is not a regular expression: repeat count too big"),
        (first(answer_format="("), "'answer_format' of task number 1: '(' is not a regular expression"),
        (first(name="text"), "two tasks are called 'text'"),
        (first(name="TEXT"), "two tasks are called 'text' (case is ignored)"),
        (first(name="a.b"), "task name 'a.b' is not allowed"),
        (first(name="keys"), "task name 'keys' is reserved"),
        (first(scorer="bleu"), "task 'seen': scorer 'bleu' is unknown; choose one of exact"),
        (first(train="gone.json"), "gone.json cannot be read (No such file or directory)"),
        (first(images="gone"), "0.png is missing; add it or pass its folder with --data."),
    ],
)
def test_a_wrong_manifest_is_one_sentence(suite, edit, sentence):
    path = edited(suite, edit)
    with pytest.raises(UserError) as error:
        load_manifest(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "just words", "\x00"])
def test_a_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tasks\.yaml: "):
        load_manifest(tmp_path / "tasks.yaml")


def test_a_key_that_is_given_twice_is_named(suite):
    path, _ = suite
    path.write_text(path.read_text() + "model: other\n")
    with pytest.raises(UserError, match="has the key 'model' twice, again on line"):
        load_manifest(path)


def test_an_answer_is_in_format_as_a_whole(suite):
    task = load_manifest(suite[0]).tasks[0]
    said = ("two words", "two words.", "three more words", "one")
    assert [task.in_format(answer, []) for answer in said] == [True, False, False, False]


def test_an_answer_format_of_nested_repetitions_hangs_no_evaluation(suite):
    task = load_manifest(edited(suite, first(answer_format="(a+)+"))).tasks[0]
    assert [task.in_format(answer, []) for answer in ("a" * 60, "a" * 60 + "!")] == [True, False]


def test_a_format_that_takes_too_long_is_named(suite):
    task = load_manifest(edited(suite, first(answer_format="(a|aa)+"))).tasks[0]
    with pytest.raises(UserError, match=r"answer_format '\(a\|aa\)\+' takes more than a second"):
        score(task, [Sample("1", (), "?", ("a",))], [{"answer": "a" * 90 + "!"}])


def test_a_task_without_test_needs_no_scorer(suite):
    path = edited(suite, lambda m: [m["tasks"][0].pop(key) for key in ("test", "scorer", "answer_format")])
    task = load_manifest(path).tasks[0]
    assert (task.test, task.scorer, task.splits) == (None, None, ("train",))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_manifest(tmp_path / "none.yaml")


@pytest.mark.parametrize("order", [["seen", "gone"], ["seen", "seen"], []])
def test_a_wrong_order_is_refused(suite, order):
    with pytest.raises(UserError, match="order: "):
        load_manifest(suite[0], order=order)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("[]", "has no samples"),
        ("[{", "is no JSON list: line 1: expecting property name"),
        ("[", "is no JSON list: line 1: expecting value"),
        ("", "is no JSON list: line 1: it does not start with ["),
        ('"records"', "is no JSON list: line 1: it does not start with ["),
        ('[{"id": 1}\n{"id": 2}]', "is no JSON list: line 2: a comma or ] is missing"),
        ('[{"id": 1},\n\n{"id": 2},]', "is no JSON list: line 3: "),
        ("[" * 100_000, "is no JSON list: line 1: a record is nested too deeply"),
        ("{}", "line 1 is no LLaVA instruction record (conversations is missing)"),
        ('[\n{"id": 1}]', "record 1, line 2 is no LLaVA instruction record (conversations is missing)"),
        ("[3]", "record 1, line 1 is no LLaVA instruction record ("),
        ('[\n\n{"id": 1, "conversations": []}]', "record 1, line 3: sample '1' has no human turn"),
        (
            '[{"id": 1, "conversations": [{"from": "human", "value": "x"}]}]',
            "sample '1' has no answer, neither a gpt turn behind its last question",
        ),
    ],
)
def test_a_broken_data_file_is_named(suite, content, sentence):
    path, _ = suite
    (path.parent / "data" / "text-test.json").write_text(content)
    with pytest.raises(UserError, match=r"task 'text': .*text-test\.json") as error:
        load_manifest(path)
    assert sentence in str(error.value)


@pytest.mark.parametrize("keep", [0, 30, 60])
def test_a_broken_image_is_named(suite, keep):
    path, _ = suite
    image = path.parent / "data" / "pictures" / "2.png"
    image.write_bytes(image.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"image .*2\.png cannot be opened"):
        load_manifest(path)


def test_samples_hold_question_instruction_images_and_references(suite):
    path, _ = suite
    records = [
        {"id": "a", "image": ["0.png", "1.png"], "conversations": turns("<image><image>\nSame?", "no")},
        {"id": 7, "conversations": turns("x", "two"), "answers": ["one", "two", "two"]},
        {"id": 8, "conversations": turns("x", "three"), "answers": ["one"]},
        {"id": 9, "conversations": turns("x", "y")[:1], "answers": ["one", "two"]},
    ]
    (path.parent / "data" / "seen-test.json").write_text(json.dumps(records))
    task = load_manifest(path).tasks[0]
    samples = list(InstructionDataset(task, "test"))
    assert samples[0].images == (task.images / "0.png", task.images / "1.png")
    assert samples[0].question == "Same?\nAnswer in two words."
    assert [s.answers for s in samples] == [("no",), ("two", "one", "two"), ("three", "one"), ("one", "two")]
    assert [s.id for s in samples] == ["a", "7", "8", "9"]
    assert all((s.history, s.system, s.images_ahead) == ((), "", ()) for s in samples)


def read(suite, *records):
    path, _ = suite
    (path.parent / "data" / "seen-test.json").write_text(json.dumps(records))
    return list(InstructionDataset(load_manifest(path).tasks[0], "test"))


QUESTIONS = [
    {"question_id": 3, "image": "0.png", "text": "What is it?\nAnswer in two words.", "answer": "thing 0"},
    {"question_id": "b", "image": "1.png", "text": "<image>\nWhat is it?", "answer": "thing 1", "answers": ["a thing"]},
    {"text": "2 + 2? Answer  in\ntwo words. ", "answer": "just four"},
]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_questions_of_an_evaluation_are_read_and_instructed_once(suite, form):
    lines = [json.dumps(question).encode() for question in QUESTIONS]
    samples = write(suite, json.dumps(QUESTIONS).encode() if form == "list" else b"\n".join(lines))
    assert [s.id for s in samples] == ["3", "b", "2"]
    assert [len(s.images) for s in samples] == [1, 1, 0]
    assert [s.question for s in samples] == [
        "What is it?\nAnswer in two words.",
        "What is it?\nAnswer in two words.",
        "2 + 2? Answer  in\ntwo words.",
    ]
    assert [s.answers for s in samples] == [("thing 0",), ("thing 1", "a thing"), ("just four",)]


def test_a_question_of_an_evaluation_without_an_answer_is_one_sentence(suite):
    with pytest.raises(
        UserError,
        match=r"sample '3' has no answer, neither a gpt turn .* nor the key answer or answers; add one",
    ):
        write(suite, json.dumps([{"question_id": 3, "text": "What is it?"}]).encode())


def test_an_instruction_that_a_conversation_has_already_is_not_said_twice(suite):
    said = "What is it?\nAnswer in two words."
    (sample,) = read(suite, {"conversations": [*turns(said, "a thing"), *turns("And\tthis?", "no idea")]})
    assert sample.history == ((said, "a thing"),)
    assert sample.question == "And\tthis?\nAnswer in two words."


@pytest.mark.parametrize("scorer", ["option_letter", "iou_50"])
def test_a_scorer_that_no_reference_suits_is_refused(suite, scorer):
    path = edited(suite, first(scorer=scorer))
    with pytest.raises(UserError, match=f"task 'seen': scorer '{scorer}' gives 0 even to the references .* 'thing 0'"):
        load_manifest(path)


def write(suite, content):
    path, _ = suite
    (path.parent / "data" / "seen-test.json").write_bytes(content)
    return list(InstructionDataset(load_manifest(path).tasks[0], "test"))


RECORDS = [{"id": i, "image": f"{i}.png", "conversations": turns("what?", f"line\u2028{i}")} for i in range(3)]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_json_lines_are_read_as_a_list_is(suite, bom, end):
    lines = end.join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + end
    listed = write(suite, bom + json.dumps(RECORDS).encode())
    assert [s.answers for s in listed] == [("line\u20280",), ("line\u20281",), ("line\u20282",)]
    assert write(suite, bom + lines.encode()) == listed


def test_a_broken_line_is_named(suite):
    lines = [json.dumps(record).encode() for record in RECORDS]
    for broken, said in ((b'{"id": 1', "invalid JSON"), (b"{}", "conversations is missing")):
        with pytest.raises(UserError, match=rf"json: line 3 is no LLaVA instruction record \({said}"):
            write(suite, b"\n".join([lines[0], b"", broken, lines[1]]))


@pytest.mark.parametrize("window", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_record_by_record_whatever_is_looked_at_together(suite, window, indent, monkeypatch):
    texts = ['\u2028 é 𝄞 \\ " ] , [', "{", "}]", "[[]]"]
    records = [{"id": i, "conversations": turns(text, text * i)} for i, text in enumerate(texts, 1)]
    wanted = read(suite, *records)
    assert [sample.answers[0] for sample in wanted] == [text * i for i, text in enumerate(texts, 1)]
    monkeypatch.setattr(record_files, "_WINDOW", window)
    content = json.dumps(records, ensure_ascii=False, indent=indent).encode()
    assert write(suite, b"\xef\xbb\xbf \n" + content + b"\n") == wanted


def test_a_file_is_read_once_and_its_records_when_they_are_asked_for(suite, monkeypatch):
    reads, parsed = [], []
    index, parse = record_files.JSONRecords.__init__, InstructionRecord.model_validate_json
    monkeypatch.setattr(record_files.JSONRecords, "__init__", lambda *a: (reads.append(a[1].name), index(*a))[1])
    monkeypatch.setattr(InstructionRecord, "model_validate_json", lambda c: (parsed.append(c), parse(c))[1])
    task = load_manifest(suite[0]).tasks[0]
    assert reads == ["seen-train.json", "seen-test.json", "text-train.json", "text-test.json"]
    data = instruction_data(task, "train")
    assert instruction_data(load_manifest(suite[0]).tasks[0], "train") is data
    assert len(reads) == 4
    del parsed[:]
    assert (data[2].id, data[0].id) == ("2", "0")
    assert len(parsed) == 2
    assert pickle.loads(pickle.dumps(data))[3] == data[3], "for the processes that prepare batches"


def test_a_file_that_changes_during_a_run_is_named(suite):
    task = load_manifest(suite[0]).tasks[0]
    data = instruction_data(task, "train")
    task.train.write_text(task.train.read_text().replace("thing 3", "nothing"))
    with pytest.raises(UserError, match=r"seen-train\.json has changed since this run read it; run the same command"):
        data[3]
    assert instruction_data(task, "train")[3].answers == ("nothing",)


@pytest.mark.parametrize("image", ["", None, [], [""]])
def test_an_empty_image_is_none(suite, image):
    assert read(suite, {"id": 1, "image": image, "conversations": turns("what?", "it")})[0].images == ()


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [{"from": "user", "value": "<image>what?"}, {"from": "assistant", "value": "it"}],
            "image": "0.png",
        },
        {
            "conversations": [{"from": "Human", "value": "what?"}, {"from": "ChatGPT", "value": "it"}],
            "images": ["0.png"],
        },
        {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it"}], "images": "0.png"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "it"}]},
            ],
            "images": ["0.png"],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image", "image": "0.png"}]},
                {"role": "assistant", "content": "it"},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "0.png"}},
                        {"type": "text", "text": "what?"},
                    ],
                },
                {"role": "assistant", "content": "it"},
            ],
        },
    ],
)
def test_relatives_of_the_format_say_the_same(suite, record):
    plain = {"id": "0", "image": "0.png", "conversations": turns("what?", "it")}
    system = {"role": "system", "content": "be brief"}
    key = "messages" if "messages" in record else "conversations"
    assert read(suite, record) == read(suite, plain)
    assert read(suite, record | {key: [system, *record[key]]}) == read(suite, record | {"system": "be brief"})
    assert read(suite, record | {"system": "be brief"})[0].system == "be brief"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn number 1 of human and gpt is from 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video' is neither text nor image"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "0 images and 1 parts of the messages"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "is from 'system' where 'human'"),
    ],
)
def test_records_that_would_lose_something_are_refused(suite, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read(suite, {"id": 1, **change})


def parquet(suite):
    return edited(suite, first(test="seen-test.parquet")).parent / "data" / "seen-test.parquet"


def test_parquet_without_datasets_says_what_to_install(suite, monkeypatch):
    parquet(suite).write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"task 'seen': .*parquet wants the package datasets; pip install datasets"):
        load_manifest(suite[0])


def test_a_conversation_is_one_sample_with_all_its_answers(suite):
    talk = [*turns("<image>\nfirst", "1st"), *turns("second", "2nd"), *turns("third", "3rd")]
    system = {"from": "system", "value": "be brief"}
    whole, open_end, greeted = read(
        suite,
        {"id": 1, "image": "0.png", "conversations": [system, *talk]},
        {"id": 2, "image": "0.png", "conversations": talk[:-1], "answers": ["a", "b"]},
        {
            "id": 3,
            "image": "0.png",
            "conversations": [system, {"from": "gpt", "value": "hello"}, *talk[:2]],
            "answers": ["a"],
        },
    )
    says = "\nAnswer in two words."
    assert whole.history == ((f"first{says}", "1st"), (f"second{says}", "2nd"))
    assert (whole.question, whole.answers, whole.system) == (f"third{says}", ("3rd",), "be brief")
    assert (open_end.history, open_end.answers) == (whole.history, ("a", "b"))
    assert (greeted.history, greeted.question, greeted.answers) == ((), f"first{says}", ("1st", "a"))


@pytest.mark.parametrize("key", ["img", "imge"])
def test_a_mark_without_an_image_is_refused(suite, key):
    with pytest.raises(UserError, match=r"sample '1' has 1 marks <image> and no image; name its files under the key"):
        read(suite, {"id": 1, key: "0.png", "conversations": turns("<image>\nfirst", "1st")})


@pytest.mark.parametrize("more", ["[{}]", "garbage", ",", "]", "{}"])
@pytest.mark.parametrize("records", [1, 0])
def test_nothing_may_follow_a_list_of_records(suite, records, more):
    path, _ = suite
    content = json.dumps([{"id": 1, "conversations": turns("first", "1st")}] * records)
    (path.parent / "data" / "seen-test.json").write_text(f"{content}\n  {more}")
    with pytest.raises(UserError, match="line 2: something follows the list"):
        InstructionDataset(load_manifest(path).tasks[0], "test")


def test_images_come_with_the_questions_that_mark_them(suite):
    talk = [*turns("<image>\nfirst", "1st"), *turns("with <image> and <image>", "2nd")]
    images = ["0.png", "1.png", "2.png"]
    (sample,) = read(suite, {"id": 1, "image": images, "conversations": talk})
    assert [path.name for path in sample.images] == images
    assert sample.images_ahead == (1, 2)
    (sample,) = read(
        suite, {"id": 1, "image": images, "conversations": [*turns("first", "1st"), *turns("second", "2nd")]}
    )
    assert sample.images_ahead == ()
    with pytest.raises(UserError, match="sample '1' has 1 images and 3 marks <image>"):
        read(suite, {"id": 1, "image": "0.png", "conversations": talk})


@pytest.mark.parametrize(
    "speakers, sentence",
    [
        (["human", "human"], "turn number 2 of human and gpt is from 'human' where 'gpt' is wanted"),
        (["human", "gpt", "gpt"], "turn number 3 of human and gpt is from 'gpt' where 'human' is wanted"),
        (["human", "gpt", "system"], "is from 'system' where 'human' is wanted"),
        (["human", "gpt", "human"], "has no answer, neither a gpt turn behind its last question"),
        (["system"], "has no human turn"),
    ],
)
def test_turns_that_do_not_alternate_are_refused(suite, speakers, sentence):
    with pytest.raises(UserError, match=f"sample '5'.*{sentence}"):
        read(suite, {"id": 5, "conversations": [{"from": speaker, "value": "x"} for speaker in speakers]})


def test_the_published_learning_rates_of_the_examples():
    def rates(name, method, default, edit=lambda text: text):
        content = yaml.safe_load(edit((EXAMPLES / name).read_text()))
        manifest = MANIFESTS[content.get("kind", "instruction")].model_validate(content)
        of_all, own = manifest.learning_rates(method, default)
        return {task.name: own.get(task.name, of_all) for task in manifest.tasks}

    assert list(rates("continual_next.yaml", "pclr", 0.5).values()) == [2e-4] * 3 + [1e-4] * 12
    assert set(rates("continual_next.yaml", "lilora", 0.5).values()) == {0.5}
    order_two = rates("mtil.yaml", "dac", 2e-3, lambda text: text.replace("# learning_rate", "learning_rate"))
    order = [
        "StanfordCars",
        "Food",
        "MNIST",
        "OxfordPet",
        "Flowers",
        "SUN397",
        "Aircraft",
        "Caltech101",
        "DTD",
        "EuroSAT",
        "CIFAR100",
    ]
    assert [round(1000 * order_two[name]) for name in order] == [2, 2, 1, 2, 2, 2, 3, 2, 2, 1, 3]
    assert set(rates("mtil.yaml", "dac", 2e-3).values()) == {2e-3}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_learning_rates_of_a_manifest_by_method_and_task(kind):
    def rates(manifest, *tasks, method="pclr"):
        of_tasks = [{"name": f"t{i}", "train": "x", "test": "x", "scorer": "exact"} for i in range(len(tasks))]
        for task, rate in zip(of_tasks, tasks, strict=True):
            task.update({} if rate is None else {"learning_rate": rate})
            if kind == "classification":
                del task["scorer"]
        content = {"name": "m", "kind": kind, "tasks": of_tasks} | (
            {} if manifest is None else {"learning_rate": manifest}
        )
        return MANIFESTS[kind].model_validate(content).learning_rates(method, 0.5)

    assert rates(None, None) == (0.5, {})
    assert rates("2e-4", None, 1e-4) == (2e-4, {"t1": 1e-4})
    assert rates({"lora": 1e-3}, None, {"lora": 1e-4}) == (0.5, {})
    assert rates({"pclr": 2e-4}, {"pclr": 1e-4, "lora": 1e-2}, {"lora": 1e-2}, 2e-4) == (2e-4, {"t0": 1e-4})
