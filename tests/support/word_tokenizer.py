"""A tokenizer whose tokens are whole words."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_tokenizer(words, *control, **options):
    """Ids 0 to 3 are SPECIAL's, then come the other control tokens, such as <image>, then the words."""
    vocabulary = [*SPECIAL.values(), *control, *words]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    more = {"additional_special_tokens": list(control)} if control else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, **more, **options)
