"""The order in which stored samples are replayed, and batches of several tasks."""

import json

import pytest
import torch
from support.suite import without_image

from lilora.continual import clip
from lilora.continual.kinds import instructions
from lilora.continual.manifest import load_manifest
from lilora.continual.mixing import ReplaySampler, TaskSamples, memory_of
from lilora.continual.process_checks import require_images_alike
from lilora.errors import UserError

PARTS = [list("abcdefg"), list("hijkl"), list("mn")]


def test_the_samples_of_tasks_come_one_task_after_the_other():
    data = TaskSamples(PARTS)
    assert list(data) == [(number, sample) for number, part in enumerate(PARTS) for sample in part]
    for index in (-1, len(data)):
        with pytest.raises(IndexError):
            data[index]


def test_a_memory_is_of_its_task_and_the_same_for_every_stage():
    data = TaskSamples(PARTS)
    memory = memory_of(data, 1, "second", 3, seed=0)
    assert len(set(memory)) == 3
    assert {data[index][0] for index in memory} == {1}
    later = TaskSamples([PARTS[2], PARTS[0], PARTS[1]])
    assert [later[i][1] for i in memory_of(later, 2, "second", 3, seed=0)] == [data[i][1] for i in memory]
    assert sorted(memory_of(data, 1, "second", 9, seed=0)) == list(range(7, 12))
    assert len({tuple(memory_of(data, 1, "second", 3, seed)) for seed in range(9)}) > 1


@pytest.mark.parametrize("own, step, share", [(12, 4, 0.5), (7, 4, 0.25), (10, 16, 0.3), (1, 2, 0.5), (9, 6, 0.9)])
def test_every_step_has_its_share_of_stored_samples_and_every_epoch_all_of_the_task(own, step, share):
    memory = list(range(own, own + 5))
    sampler = ReplaySampler(own, memory, step, share, seed=3)
    replayed = round(step * share)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler), "a resumed run draws the same"
        assert len(order) == len(sampler)
        assert sorted(index for index in order if index < own) == list(range(own))
        assert set(order) <= {*range(own), *memory}
        steps = [order[start : start + step] for start in range(0, len(order), step)]
        for full in steps[:-1]:
            old = [index for index in full if index >= own]
            assert len(old) == replayed
            assert replayed > 5 or len(set(old)) == replayed
        epochs.append(order)
    assert own == 1 or len(set(map(tuple, epochs))) == 3
    other = ReplaySampler(own, memory, step, share, seed=4)
    assert own == 1 or list(other) != epochs[0]


@pytest.mark.parametrize("step, share", [(1, 0.5), (4, 0.1), (4, 0.9)])
def test_a_step_without_new_or_without_replayed_samples_is_refused(step, share):
    with pytest.raises(UserError, match=f"a step has {step} sample.*raise --batch-size or --gradient-accumulation"):
        ReplaySampler(5, [5], step, share, seed=0)


def test_a_batch_of_instructions_of_several_tasks(suite):
    from transformers import AutoProcessor

    manifest = load_manifest(suite / "tasks.yaml", ["colour", "count"])
    processor = AutoProcessor.from_pretrained(manifest.model)
    data, collate = instructions(manifest.tasks, processor)
    assert len(data) == 24
    inputs = collate([data[3], data[15]])
    for row, spec, index in zip(inputs["input_ids"], manifest.tasks, (3, 3), strict=True):
        alone, collate_alone = instructions([spec], processor)
        wanted = collate_alone([alone[index]])["input_ids"][0]
        assert torch.equal(row[: len(wanted)], wanted)
    assert "task_ids" not in inputs


def test_images_in_some_tasks_only_matter_where_tasks_are_mixed(suite):
    from lilora.continual.instructions import TaskManifest, TaskSpec

    tasks = load_manifest(suite / "tasks.yaml", ["colour"]).tasks
    records = json.loads(tasks[0].train.read_text())
    without = suite / "without.json"
    without.write_text(json.dumps([without_image(record) for record in records]))
    manifest = TaskManifest(name="both", tasks=[*tasks, TaskSpec(name="blind", train=without)])
    require_images_alike(manifest, mixed=False)
    with pytest.raises(UserError, match="task 'colour, blind' has samples with images and without"):
        require_images_alike(manifest, mixed=True)


class Words:
    """A processor whose ids are the characters of a prompt."""

    def tokenizer(self, prompts, **options):
        return {"input_ids": [prompt.encode() for prompt in prompts]}


def test_classes_of_one_name_are_one_class_of_a_batch_of_several_tasks(monkeypatch):
    from lilora.continual.classification import ImageTask, LabelledImage

    monkeypatch.setattr(clip, "pixels", lambda processor, batch: {})
    one = ImageTask(name="one", train="a", test="b", templates=("a {}",))
    two = ImageTask(name="two", train="a", test="b", templates=("the {}",))
    collate = clip.PairCollator([one, two], [["cat", "dog"], ["car", "cat"]], Words())
    batch = [(task, LabelledImage(0, None, label)) for task in (0, 1) for label in (0, 1)]
    inputs = collate(batch)
    assert inputs["input_ids"] == [b"a cat", b"a dog", b"the car", b"the cat"]
    assert inputs["labels"].tolist() == [0, 1, 2, 0]
