"""Batches of conversations as a multimodal model takes them, with labels at the answers."""

import copy
import inspect
import re
from collections.abc import Iterator, Sequence

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lilora.errors import UserError

from .images import images_for
from .instructions import Sample

IGNORED = -100  # the label that the loss leaves out

# Stand-ins are characters for private use: one for the answers of earlier turns, one for each control token in a text.
_ANSWER, _FIRST_CONTROL = "\U00105000", 0x105001
_STAND_INS = re.compile("[\U00105000-\U0010fffd]")
_PROBES = ("qwhatq", "qthatq")


class Collator:
    """Batches of (task name, Sample) for any processor with a chat template.

    The prompt is the sample's conversation as the chat template renders it: the system turn, the earlier questions with
    their answers, and the last question, with the images of a question ahead of it. A template whose contents are strings in
    place of lists gets the images as the processor's image token, each on a line of its own, ahead of the question.

    Returns what the processor gives for the prompts (input_ids and attention_mask [B, L] int64, pixel_values when there are
    images, ...) and task_ids [B] int32 from `task_index`. With `train`, the first of the answers and the token `end` follow
    each prompt, padding is on the right, and labels [B, L] int64 are those of all answers and their ends, -100 elsewhere;
    otherwise padding is on the left, as generation needs, and there are no labels. Answers are tokenised on their own, so
    that prompts are the very tokens that generation will see. What a sample says is text: where it spells a control token
    (`</s>`, `<image>`) it is tokenised as the characters that it is.

    end: id of the token that ends an answer: the first control token that the chat template writes behind one, or the
    tokenizer's end of sequence if it writes none.

    Raises UserError when the processor has no chat template, when this one does not render questions, answers, images or
    the system turn of a sample, when nothing ends an answer, when the processor refuses a sample or returns something
    whose values for an answer are not known, and when an image cannot be opened.
    """

    def __init__(self, processor, task_index: dict[str, int], train: bool):
        if not getattr(processor, "chat_template", None):
            raise UserError(
                f"{type(processor).__name__} has no chat template; use the instruction-tuned checkpoint of the model "
                "or set processor.chat_template."
            )
        self.processor = processor
        self.task_index = task_index
        self.train = train
        self._name = type(processor).__name__
        self._control = _control_tokens(processor)
        self._control_pattern = re.compile("|".join(map(re.escape, self._control)) or "(?!)")
        self._marked = None  # the processor with a tokenizer that knows stand-ins, once there is one
        self._plain: dict[int, list[int]] = {}  # a stand-in's id -> the tokens of the text that it stands for
        self._answer_suffixed = "suffix" in inspect.signature(type(processor).__call__).parameters  # PaliGemma
        self._appended = _appended(processor.tokenizer)
        self._choose_contents()
        self.end = self._find_end()
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.convert_ids_to_tokens(self.end)

    def __call__(self, batch: list[tuple[str, Sample]]) -> dict[str, Tensor]:
        samples = [sample for _, sample in batch]
        try:
            texts = [self._rendered(sample) for sample in samples]
            inputs = self._completed(self._processed(texts, samples), samples, self._appended_to(texts))
        except UserError:
            raise
        except Exception as error:  # of the processor's: whatever it cannot take
            if len(batch) > 1:
                for alone in batch:
                    self([alone])
            names = ", ".join(repr(sample.id) for sample in samples)
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"sample {names} of task {batch[0][0]!r}: {self._name} refuses it ({type(error).__name__}: {reason}); mend it "
                "or take it out."
            ) from error
        inputs["task_ids"] = torch.tensor([self.task_index[name] for name, _ in batch], dtype=torch.int32)
        return inputs

    def stops(self, model: nn.Module) -> list[int]:
        """Ids of the tokens at which generation stops: `end`, and those that the model's generation config names."""
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
        return list(dict.fromkeys([self.end, *(token for token in own if token is not None)]))

    # --- what the template makes of a conversation ------------------------------------------------------------------

    def _choose_contents(self) -> None:
        """Whether the template wants contents as lists of parts or as strings, and whether it has a place for images."""
        question, _ = _PROBES
        self._parts = True
        rendered = self._try([("user", question, 0)])
        if rendered is None or question not in rendered or re.search(r"""['"](type|text)['"]\s*:""", rendered):
            self._parts = False
            rendered = self._try([("user", question, 0)])
            if rendered is None or question not in rendered:
                raise UserError(
                    f"the chat template of {self._name} renders no question of a user, as a string or as a list of parts; "
                    "set processor.chat_template."
                )
        self._takes_images = self._try([("user", question, 1)]) not in (None, rendered)

    def _find_end(self) -> int:
        question, answer = _PROBES
        tokenizer = self.processor.tokenizer
        rendered = self._try([("user", question, 0), ("assistant", answer, 0)], add_generation_prompt=False) or ""
        written = self._control_pattern.search(rendered.rpartition(answer)[2]) if answer in rendered else None
        end = tokenizer.eos_token_id if written is None else tokenizer.convert_tokens_to_ids(written[0])
        if end is None:
            raise UserError(
                f"nothing ends an answer: the chat template of {self._name} writes no token behind it, and its tokenizer has "
                "no end of sequence; set processor.tokenizer.eos_token."
            )
        return end

    def _try(self, turns: list[tuple[str, str, int]], add_generation_prompt: bool = True) -> str | None:
        """The text of a conversation, None where the template refuses it."""
        try:
            return self._render(turns, add_generation_prompt)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None

    def _render(self, turns: list[tuple[str, str, int]], add_generation_prompt: bool = True) -> str:
        """turns: (role, text, number of images) each."""
        messages = [{"role": role, "content": self._content(text, images)} for role, text, images in turns]
        return self.processor.apply_chat_template([messages], add_generation_prompt=add_generation_prompt)[0]

    def _content(self, text: str, images: int) -> str | list[dict[str, str]]:
        if self._parts:
            return [{"type": "image"}] * images + [{"type": "text", "text": text}]
        if images and not getattr(self.processor, "image_token", None):
            raise ValueError(f"{self._name} names no image token")
        return f"{self.processor.image_token}\n" * images + text if images else text

    def _rendered(self, sample: Sample) -> str:
        """The prompt of a sample, with stand-ins for control tokens in its texts and for the answers of earlier turns."""
        where = f"sample {sample.id!r}"
        if sample.images and not self._takes_images:
            raise UserError(f"{where}: the chat template of {self._name} has no place for its image; take it out.")
        if sample.history and self._answer_suffixed:
            raise UserError(
                f"{where}: {self._name} takes one question and one answer; make it one sample for each pair."
            )
        turns = [("system", self._guarded(sample.system, where), 0)] if sample.system else []
        texts = [text for _, text, _ in turns]
        images = sample.images_ahead or (len(sample.images), *(0 for _ in sample.history))
        prompts = []
        questions = [*(question for question, _ in sample.history), sample.question]
        for question, count in zip(questions, images, strict=True):
            texts.append(self._guarded(question, where))
            turns.append(("user", texts[-1], count))
            prompts.append(self._render(turns))
            turns.append(("assistant", _ANSWER, 0))
        text = prompts[-1]
        missing = [part for part in texts if part.strip() not in text]
        if missing or text.count(_ANSWER) != len(sample.history):
            lost = f"the text {missing[0][:80]!r}" if missing else "an earlier answer"
            raise UserError(f"{where}: the chat template of {self._name} leaves out {lost}; take it out.")
        return self._tightened(text, prompts[:-1])

    def _tightened(self, text: str, prompts: list[str]) -> str:
        """The text without the spaces that a template writes around earlier answers, which generation does not see.

        prompts: what generation would see ahead of each of them.
        """
        pieces, end = text.split(_ANSWER), self.processor.tokenizer.convert_ids_to_tokens(self.end)
        tight = list(pieces)
        for i, prompt in enumerate(prompts):
            before = _ANSWER.join(pieces[: i + 1])
            if before.startswith(prompt) and not (extra := before[len(prompt) :]).strip():
                tight[i] = tight[i].removesuffix(extra)
            if pieces[i + 1].lstrip().startswith(end):
                tight[i + 1] = pieces[i + 1].lstrip()
        return _ANSWER.join(tight)

    # --- text that spells control tokens ----------------------------------------------------------------------------

    def _guarded(self, text: str, where: str) -> str:
        """The text with a stand-in for each control token that it spells."""
        if found := _STAND_INS.search(text):
            raise UserError(f"{where}: its text holds U+{ord(found[0]):X}, a character for private use; take it out.")
        return self._control_pattern.sub(lambda match: chr(_FIRST_CONTROL + self._control.index(match[0])), text)

    def _tokenizer_of(self, texts: Sequence[str]):
        """The processor whose tokenizer knows the stand-ins of these texts."""
        used = {character for text in texts for character in _STAND_INS.findall(text)}
        if not used:
            return self._marked or self.processor
        if self._marked is None:
            self._marked = copy.deepcopy(self.processor)
        tokenizer, own = self._marked.tokenizer, self.processor.tokenizer
        for character in sorted(used - set(tokenizer.get_added_vocab())):
            tokenizer.add_tokens([AddedToken(character, normalized=False, special=False)])
            if character != _ANSWER:
                token = self._control[ord(character) - _FIRST_CONTROL]
                self._plain[tokenizer.convert_tokens_to_ids(character)] = _as_text(own, token)
        return self._marked

    def _answer_ids(self, answers: Sequence[str], where: str) -> list[list[int]]:
        """The tokens of each answer, without an end."""
        guarded = [self._guarded(answer, where) for answer in answers]
        rows = self._tokenizer_of(guarded).tokenizer(guarded, add_special_tokens=False)["input_ids"]
        return [[token for i in row for token in self._plain.get(i, [i])] for row in rows]

    # --- what the processor makes of the texts ----------------------------------------------------------------------

    def _processed(self, texts: list[str], samples: list[Sample]) -> dict[str, Tensor]:
        """What the processor returns: tensors alone, input_ids [B, L] and attention_mask among them."""
        images = [images_for(self.processor, sample.images) for sample in samples]
        outputs = self._tokenizer_of(texts)(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="right" if self.train else "left",
            return_tensors="pt",
            **({"add_special_tokens": False} if self._begun(texts) else {}),
        )
        inputs = {
            key: self._tensor(key, value) for key, value in outputs.items() if key != "labels" and value is not None
        }
        if not {"input_ids", "attention_mask"} <= inputs.keys():
            raise UserError(f"{self._name} returns {', '.join(outputs)}, and input_ids and attention_mask are wanted.")
        return inputs

    def _begun(self, texts: list[str]) -> bool:
        """Whether the template itself has written the beginning of a text; the tokenizer may do so otherwise."""
        bos = self.processor.tokenizer.bos_token
        return bool(bos) and all(text.startswith(bos) for text in texts)

    def _appended_to(self, texts: list[str]) -> list[int]:
        return [] if self._begun(texts) else self._appended

    def _tensor(self, key: str, value) -> Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self._name} returns {key!r} as {type(value).__name__}, which is no tensor of the batch; set the processor "
                "to return what can be stacked."
            ) from error

    def _completed(self, inputs: dict[str, Tensor], samples: list[Sample], appended: list[int]) -> dict[str, Tensor]:
        """Put the tokens in place of the stand-ins, and with `train` the answers behind the prompts, and add labels.

        appended: what the tokenizer has put behind the prompts, which is taken off.
        """
        shape, mask = inputs["input_ids"].shape, inputs["attention_mask"].bool()
        fills = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": int(self._answer_suffixed)}
        rows = []
        for ids, kept, sample in zip(inputs["input_ids"], mask, samples, strict=True):
            prompt = ids[kept].tolist()
            if appended and prompt[-len(appended) :] == appended:
                prompt = prompt[: -len(appended)]
            rows.append(self._row(prompt, sample))

        def padded(rows: list[Tensor], value: int) -> Tensor:
            side = "right" if self.train else "left"
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        outputs = {
            "input_ids": padded([torch.tensor(ids) for ids, _, _ in rows], self.processor.tokenizer.pad_token_id)
        }
        if self.train:
            outputs["labels"] = padded([torch.tensor(labels) for _, labels, _ in rows], IGNORED)
        for key, value in inputs.items():
            if key in fills:
                old = [value[i][mask[i]] for i in range(len(rows))]
                outputs[key] = padded([_taken(old[i], source, fills[key]) for i, (_, _, source) in enumerate(rows)], 0)
            elif key != "input_ids":
                if value.shape[:2] == shape and value.dim() > 1:
                    raise UserError(
                        f"{self._name} returns {key!r} for each token, and what it is for the tokens of an answer is not known; "
                        "set the processor not to return it."
                    )
                outputs[key] = value
        return outputs

    def _row(self, prompt: list[int], sample: Sample) -> tuple[list[int], list[int], list[int]]:
        """(ids, labels, source) of a sample without padding; source: where in the prompt a token was, -1 for a new one."""
        known = [*(answer for _, answer in sample.history), *(sample.answers[:1] if self.train else ())]
        answers = iter(self._answer_ids(known, f"sample {sample.id!r}") if known else [])
        mark = None
        if sample.history:
            mark = self._marked.tokenizer.convert_tokens_to_ids(_ANSWER)
        ids, labels, source = [], [], []

        def put(tokens: Sequence[int], target: bool, at: int = -1) -> None:
            ids.extend(tokens)
            labels.extend(tokens if target else [IGNORED] * len(tokens))
            source.extend([at] * len(tokens))

        for at, token in enumerate(prompt):
            if token == mark:
                put(next(answers), True)
            elif token in self._plain:
                put(self._plain[token], False, at)
            else:
                put([token], token == self.end and prompt[at - 1 : at] == [mark], at)
        if self.train:
            put([*next(answers), self.end], True)
        return ids, labels, source


def _taken(row: Tensor, source: list[int], fill: int) -> Tensor:
    """row [l] at each of the positions `source`, `fill` where it is -1."""
    at = torch.tensor(source)
    return torch.where(at < 0, torch.tensor(fill, dtype=row.dtype), row[at.clamp(min=0)])


def _control_tokens(processor) -> list[str]:
    """What users' text must not become, longest first: special tokens, those that the template writes, images and such."""
    template = str(processor.chat_template)
    media = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")} - {None}
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in template} | media
    return sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))


def _as_text(tokenizer, token: str) -> list[int]:
    """The tokens of the characters of a control token."""
    known = tokenizer.get_vocab().get(token)
    for pieces in ([token], [token[:1], token[1:]]):
        rows = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [i for row in rows for i in row]
        if known not in ids:
            return ids
    raise UserError(
        f"the tokenizer makes a control token of the text {token!r} in a sample; take it out of the sample."
    )


def _appended(tokenizer) -> list[int]:
    """What the tokenizer puts behind a text, such as its end of sequence."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts: Iterator[int] = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    start = next(starts, None)
    return [] if start is None else full[start + len(plain) :]
