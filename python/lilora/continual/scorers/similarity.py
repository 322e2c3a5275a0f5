"""How near an answer's meaning is to a reference's, by sentence embeddings of a model that the user gives."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lilora.errors import UserError

from .registry import register_corpus_scorer

_BATCH = 32
_PARTS = ("Transformer", "Pooling", "Normalize")  # of a sentence-transformers folder


@register_corpus_scorer
def similarity(predictions: list[str], references: list[list[str]], model: Path) -> float:
    """Mean cosine of the sentence embeddings of answer and nearest reference, at least 0.

    `scorer_model` names the folder of the model: one of sentence-transformers with mean pooling, or any text encoder of
    transformers, whose last hidden states are averaged over tokens. Source: the evaluation of Continual-NExT (its README and
    sim.py), whose model is paraphrase-multilingual-MiniLM-L12-v2.
    """
    return float(_cosines(predictions, references, model).clamp_min(0).mean())


@register_corpus_scorer
def similarity_80(predictions: list[str], references: list[list[str]], model: Path) -> float:
    """The share of answers with such a cosine of at least 0.8. Source: PCLR's evaluation of Continual-NExT."""
    return float((_cosines(predictions, references, model) >= 0.8).double().mean())


def _cosines(predictions: list[str], references: list[list[str]], model: Path) -> Tensor:
    """[n] fp64 of each answer and its nearest reference; 1 for equal texts."""
    embed = _encoder(model)  # also where no text needs it: a run shall know of a model that is missing before it trains
    nearest = torch.ones(len(predictions), dtype=torch.float64)
    others = [i for i, (said, own) in enumerate(zip(predictions, references, strict=True)) if said not in own]
    if others:
        texts = list(dict.fromkeys(text for i in others for text in (predictions[i], *references[i])))
        rows = dict(zip(texts, embed(texts), strict=True))
        for i in others:
            nearest[i] = max(float(rows[predictions[i]] @ rows[reference]) for reference in references[i])
    return nearest


@cache
def _encoder(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    """texts -> embeddings [n, D] fp64 of norm 1."""
    from transformers import AutoModel, AutoTokenizer

    longest = _longest(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"scorer_model {folder} holds no readable text encoder ({reason}); give the folder of one"
        ) from error
    longest = min(longest or tokenizer.model_max_length, tokenizer.model_max_length)

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), _BATCH):
            inputs = tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=longest < 10**6,  # tokenizers without a limit say 10^30
                max_length=longest if longest < 10**6 else None,
                return_tensors="pt",
            )
            hidden = model(**inputs).last_hidden_state.double()  # [B, L, D]
            mask = inputs["attention_mask"][..., None].double()
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1))
        return torch.cat(parts)

    return embed


def _longest(folder: Path) -> int | None:
    """Tokens of a text at most, as a folder of sentence-transformers says; UserError for one that does not pool means."""
    if not folder.is_dir():
        raise UserError(f"scorer_model {folder} is no folder; put a sentence-embedding model there or name another")
    try:
        kinds = [part["type"].rpartition(".")[2] for part in _json(folder / "modules.json", [])]
        pooling = _json(folder / "1_Pooling" / "config.json", {})
        modes = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
        longest = _json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"scorer_model {folder} has broken files ({type(error).__name__}: {error}); replace it"
        ) from error
    if not set(kinds) <= set(_PARTS) or modes not in ([], ["pooling_mode_mean_tokens"]):
        raise UserError(
            f"scorer_model {folder} is made of {', '.join(kinds)} with {', '.join(modes)}; give a model that averages tokens"
        )
    return longest


def _json(file: Path, otherwise: list | dict) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else otherwise
