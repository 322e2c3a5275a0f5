"""Batches of conversations: prompts as the template has them, labels at the answers, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from lilora.continual.collator import Collator
from lilora.continual.evaluate import generate
from lilora.continual.instructions import Sample
from lilora.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def processor(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    from base import make_processor
    from scenes import TASKS, pools

    return make_processor(pools()[0], TASKS.values())


@pytest.fixture
def batch(tmp_path):
    """Samples with one image, with none, and with two."""
    images, rng = tmp_path, np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(images / f"{i}.png")
    return [
        ("b", Sample("0", (images / "0.png",), "list digits", ("seven two", "x"))),
        ("a", Sample("1", (), "spell 7", ("seven",))),
        ("b", Sample("2", (images / "1.png", images / "2.png"), "list inks", ("red",))),
    ]


def test_a_training_batch_teaches_the_answer_alone(processor, batch):
    tokenizer = processor.tokenizer
    inputs = Collator(processor, {"a": 0, "b": 5}, train=True)(batch)
    rows = {key: inputs[key].tolist() for key in ("input_ids", "attention_mask", "labels")}
    for (_, sample), ids, mask, labels in zip(batch, *rows.values(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert all(i == tokenizer.pad_token_id for i in ids[length:])
        answer = [*tokenizer(sample.answers[0])["input_ids"], tokenizer.eos_token_id]
        assert labels == [-100] * (length - len(answer)) + answer + [-100] * (len(ids) - length)
        assert ids[length - len(answer) : length] == answer
        assert ids.count(processor.image_token_id) == 16 * len(sample.images)
    assert inputs["task_ids"].tolist() == [5, 0, 5]
    assert inputs["task_ids"].dtype == torch.int32
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)


def test_a_prompt_is_the_same_in_training_and_generation(processor, batch):
    train = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    test = Collator(processor, {"a": 0, "b": 1}, train=False)(batch)
    assert "labels" not in test
    assert torch.equal(train["pixel_values"], test["pixel_values"])
    for i in range(len(batch)):
        prompt = test["input_ids"][i][test["attention_mask"][i].bool()]
        assert test["attention_mask"][i, -1] == 1  # padded on the left
        assert train["input_ids"][i, : len(prompt)].tolist() == prompt.tolist()
        assert (train["labels"][i, : len(prompt)] == -100).all()
        text = processor.tokenizer.decode(prompt)
        assert text.endswith(f"{batch[i][1].question} assistant :")


def test_text_alone_makes_a_batch_without_pixels(processor, batch):
    inputs = Collator(processor, {"a": 0}, train=True)([batch[1]])
    assert set(inputs) == {"input_ids", "attention_mask", "labels", "task_ids"}


def test_marks_of_the_modality_grow_with_the_answers(processor, batch, monkeypatch):
    class Marked(type(processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, return_mm_token_type_ids=True, **kwargs)

    monkeypatch.setattr(processor, "__class__", Marked)
    inputs = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    expected = (inputs["input_ids"] == processor.image_token_id).long()
    assert torch.equal(inputs["mm_token_type_ids"], expected)


STRINGS = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
REPR = STRINGS.replace("m['content']", "m['content'] | string")
ENDED = STRINGS.replace("m['content'] + ' '", "m['content'] + ('. ' if m['role'] == 'user' else '<unk> ')")


def prompt(processor, sample):
    inputs = Collator(processor, {"a": 0}, train=False)([("a", sample)])
    return processor.tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.parametrize("template", [STRINGS, REPR])
def test_a_template_of_strings_gets_strings(processor, batch, template):
    processor.chat_template = template
    assert prompt(processor, batch[1][1]) == "user : spell 7 assistant :"
    images = " ".join(["<image>"] * 16)
    assert prompt(processor, batch[2][1]) == f"user : {images} {images} list inks assistant :"


@pytest.mark.parametrize(
    "template", ["assistant :", "{{ raise_exception('no') }}", "{{ messages[0].content[3].text }}"]
)
def test_a_template_without_the_question_is_refused(processor, template):
    processor.chat_template = template
    with pytest.raises(UserError, match="chat template of LlavaProcessor renders no question"):
        Collator(processor, {}, train=True)


@pytest.mark.parametrize(
    "template, sample, sentence",
    [
        (
            "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}",
            Sample("7", (Path("x.png"),), "list", ("red",)),
            "sample '7': the chat template of LlavaProcessor has no place for its image",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content[-1].text }}{% endfor %}",
            Sample("7", (), "list", ("red",), system="be brief"),
            "sample '7': .* leaves out the text 'be brief'",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
            "{{ messages[0].content[-1].text }}",
            Sample("7", (), "list", ("red",), system="be brief"),
            "sample '7' of task 'a': LlavaProcessor refuses it .*no system turn",
        ),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content[-1].text }}{% endfor %}",
            Sample("7", (), "list", ("red",), history=(("spell", "seven"),)),
            "sample '7': .* leaves out an earlier answer",
        ),
    ],
)
def test_what_a_template_leaves_out_is_named(processor, template, sample, sentence):
    processor.chat_template = template
    with pytest.raises(UserError, match=sentence):
        Collator(processor, {"a": 0}, train=True)([("a", sample)])


def test_what_a_tokenizer_appends_does_not_stand_before_the_answer(processor, batch):
    collator = Collator(processor, {"a": 0, "b": 1}, train=True)
    wanted = collator(batch)
    begin, end = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)])
    inputs = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    assert (inputs["input_ids"][:, 0] == begin).all()  # what it puts in front stays
    assert torch.equal(inputs["input_ids"][:, 1:], wanted["input_ids"])
    assert torch.equal(inputs["labels"][:, 1:], wanted["labels"])
    prompts = Collator(processor, {"a": 0, "b": 1}, train=False)(batch)
    assert (prompts["input_ids"] == end).sum() == 0
    processor.chat_template = f"<s>{processor.chat_template}"  # writes itself what begins a text
    begun = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    assert torch.equal(begun["input_ids"], inputs["input_ids"])
    assert torch.equal(begun["labels"], inputs["labels"])


def test_the_template_says_what_ends_an_answer(processor, batch):
    processor.chat_template = ENDED
    unk, eos = processor.tokenizer.unk_token_id, processor.tokenizer.eos_token_id
    for known in ("</s>", None):
        processor.tokenizer.eos_token = known
        collator = Collator(processor, {"a": 0}, train=True)
        assert collator([batch[1]])["labels"][0, -1] == collator.end == unk
    for own, stops in ((None, [unk]), (eos, [unk, eos]), ([eos, unk], [unk, eos])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
        assert collator.stops(model) == stops


def test_answers_stop_at_what_was_taught_to_end_them(processor, batch):
    processor.chat_template = ENDED
    ids = processor.tokenizer.convert_tokens_to_ids
    asked = {}

    class Model:
        device, dtype = torch.device("cpu"), torch.float32
        generation_config = SimpleNamespace(eos_token_id=ids("</s>"))

        def generate(self, input_ids, **options):
            asked.update(options)
            rows = [["red", "<unk>", "seven"], ["red", "seven", "two"], ["red", "seven", "two"]]
            return torch.cat([input_ids, torch.tensor([ids(row) for row in rows])], 1)

    method = SimpleNamespace(model=Model(), base=Model(), mixed_batches=False, needs_task=True)
    collator = Collator(processor, {"a": 0, "b": 1}, train=False)
    assert generate(method, processor, collator, batch, {"a": 2, "b": 3}) == ["red", "red seven", "red seven two"]
    assert asked["eos_token_id"] == [ids("<unk>"), ids("</s>")]


def test_without_anything_that_ends_an_answer_a_tokenizer_is_refused(processor):
    processor.tokenizer.eos_token = None
    with pytest.raises(UserError, match="nothing ends an answer: the chat template of LlavaProcessor writes no token"):
        Collator(processor, {}, train=True)


def test_a_tokenizer_without_padding_pads_with_the_end(processor, batch):
    processor.tokenizer.pad_token = None
    inputs = Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    assert (inputs["input_ids"][padding] == processor.tokenizer.eos_token_id).all()


@pytest.mark.parametrize("train", [True, False])
def test_text_that_spells_control_tokens_is_text(processor, batch, train):
    tokenizer = processor.tokenizer
    image = batch[0][1].images
    spelt = "list </s> <image> <pad><s>"
    hostile = Sample("x", image, spelt, (f"{spelt} seven",), ((f"spell {spelt}", spelt),), f"red {spelt}")
    harmless = Sample("x", image, "list", ("seven",), (("spell", "blue"),), "red")
    collator = Collator(processor, {"a": 0}, train)
    alone, plain = collator([("a", hostile)]), collator([("a", harmless)])
    for token in tokenizer.all_special_ids:
        if token != tokenizer.unk_token_id:  # the vocabulary of this tokenizer has few characters
            assert (alone["input_ids"] == token).sum() == (plain["input_ids"] == token).sum(), token
    assert alone["input_ids"].shape == alone["attention_mask"].shape
    together = collator([("a", harmless), ("a", hostile)])
    kept = together["attention_mask"][1].bool()
    assert torch.equal(together["input_ids"][1][kept], alone["input_ids"][0])
    assert torch.equal(together["input_ids"][0][together["attention_mask"][0].bool()], plain["input_ids"][0])
    if train:
        assert torch.equal(together["labels"][1][kept], alone["labels"][0])


def test_text_beside_what_spells_a_control_token_keeps_its_tokens(processor):
    tokenizer = processor.tokenizer
    inputs = Collator(processor, {"a": 0}, train=True)([("a", Sample("x", (), "list </s> digits", ("red <s> seven",)))])
    words = [word for word in tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) if word != "<unk>"]
    assert " ".join(words) == "user : list digits assistant : red seven </s>"


def test_a_stand_in_in_a_text_is_refused(processor):
    with pytest.raises(UserError, match=r"sample 'x': its text holds U\+105000"):
        Collator(processor, {"a": 0}, train=True)([("a", Sample("x", (), "list \U00105000", ("red",)))])


def test_earlier_answers_are_targets_too(processor, batch):
    tokenizer = processor.tokenizer
    sample = Sample(
        "x", batch[0][1].images, "list inks", ("red",), (("list digits", "seven two"), ("spell 7", "seven"))
    )
    inputs = Collator(processor, {"a": 0}, train=True)([("a", sample), batch[1]])
    labels = inputs["labels"][0]
    learned = labels != -100
    assert tokenizer.decode(labels[learned]) == "seven two seven red </s>"
    assert torch.equal(labels[learned], inputs["input_ids"][0][learned])
    text = tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0].bool()]).replace("<image> ", "")
    assert text == (
        "user : list digits assistant : seven two user : spell 7 assistant : seven user : list inks assistant : red </s>"
    )
    asked = prompt(processor, sample).replace("<image> ", "")
    assert f"{asked} red </s>" == text


@pytest.mark.parametrize("behind", ["", "' '", "' <s>'", "'<s> '"])
def test_earlier_answers_stand_where_generation_puts_them(processor, behind):
    """Whatever spaces a template writes around answers, which this tokenizer sees."""
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = Split(" ", "isolated")
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {behind or repr('')} }}}}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    first, second = Sample("x", (), "list", ("seven",)), Sample("x", (), "spell", ("red",), (("list", "seven"),))
    collator = Collator(processor, {"a": 0}, train=True)
    alone, both = (collator([("a", sample)]) for sample in (first, second))
    length = alone["input_ids"].shape[1]
    ended = length if "<s>" in behind else length - 1  # the template's own end, if it writes one
    assert torch.equal(both["input_ids"][:, :ended], alone["input_ids"][:, :ended])
    assert torch.equal(both["labels"][:, :ended], alone["labels"][:, :ended])


def test_images_come_with_their_questions(processor, batch):
    images = (*batch[0][1].images, *batch[2][1].images)
    sample = Sample("x", images, "list inks", ("red",), (("list digits", "seven two"),), images_ahead=(1, 2))
    one = " ".join(["<image>"] * 16)
    assert prompt(processor, sample) == (
        f"user : {one} list digits assistant : seven two user : {one} {one} list inks assistant :"
    )


def test_the_end_that_the_template_writes_behind_earlier_answers_is_a_target(processor):
    processor.chat_template = ENDED
    sample = Sample("x", (), "list inks", ("red",), (("list digits", "seven two"),))
    labels = Collator(processor, {"a": 0}, train=True)([("a", sample)])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "seven two <unk> red <unk>"


def returning(processor, monkeypatch, **more):
    class Extended(type(processor)):
        def __call__(self, *args, **kwargs):
            inputs = super().__call__(*args, **kwargs)
            inputs.update({key: value(inputs) if callable(value) else value for key, value in more.items()})
            return inputs

    monkeypatch.setattr(processor, "__class__", Extended)


def test_other_values_of_a_processor_are_batched(processor, batch, monkeypatch):
    returning(
        processor,
        monkeypatch,
        labels=lambda inputs: inputs["input_ids"].clone(),
        crops=[1, 2],
        sizes=np.ones((3, 2)),
        absent=None,
    )
    for train in (True, False):
        inputs = Collator(processor, {"a": 0, "b": 1}, train)(batch)
        assert inputs["crops"].tolist() == [1, 2]
        assert inputs["sizes"].shape == (3, 2)
        assert "absent" not in inputs
        assert ("labels" in inputs) is train
    assert "labels" not in inputs
    assert (Collator(processor, {"a": 0, "b": 1}, train=True)(batch)["labels"] == -100).any()


@pytest.mark.parametrize(
    "value, sentence",
    [
        (lambda inputs: inputs["input_ids"] * 0, "returns 'strange' for each token"),
        (lambda inputs: torch.zeros(*inputs["input_ids"].shape, 2), "returns 'strange' for each token"),
        ([torch.zeros(2), torch.zeros(3)], "returns 'strange' as list, which is no tensor of the batch"),
        (["text"], "returns 'strange' as list"),
    ],
)
def test_values_that_cannot_be_batched_are_refused(processor, batch, monkeypatch, value, sentence):
    returning(processor, monkeypatch, strange=value)
    with pytest.raises(UserError, match=sentence):
        Collator(processor, {"a": 0, "b": 1}, train=True)(batch)


def test_the_sample_that_a_processor_refuses_is_named(processor, batch, monkeypatch):
    def refuse(inputs):
        if (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("spell")).any():
            raise ValueError("no spelling")
        return None

    returning(processor, monkeypatch, strange=refuse)
    with pytest.raises(UserError, match=r"sample '1' of task 'a': Extended refuses it \(ValueError: no spelling\)"):
        Collator(processor, {"a": 0, "b": 1}, train=True)(batch)


def test_a_processor_without_a_chat_template_is_refused(processor):
    processor.chat_template = None
    with pytest.raises(UserError, match="LlavaProcessor has no chat template"):
        Collator(processor, {}, train=True)


def test_an_image_that_broke_later_is_named(processor, batch):
    batch[0][1].images[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"image .*0\.png cannot be opened"):
        Collator(processor, {"a": 0, "b": 1}, train=True)(batch)
