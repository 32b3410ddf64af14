"""What is asked of every kind of record."""

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.demonstrations import load_demonstrations
from megatron_rlhf.data.prompts import load_prompts
from megatron_rlhf.data.tokenizer import Tokenizer

LOADERS = {
    "demonstrations": lambda path, tokenizer: load_demonstrations(path, tokenizer, 9, 9, 9),
    "comparisons": lambda path, tokenizer: load_comparisons(path, tokenizer, 9, 9, 9),
    "prompts": lambda path, tokenizer: load_prompts(path, tokenizer, 9),
}
GOOD = {"prompt": "a", "response": "ab", "responses": ["a", "b"], "ranks": [0, 1]}


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        *(
            (kind, {"prompt": "x"}, "the tokenizer has no token for the prompt 'x', nor a beginning-of-text")
            for kind in LOADERS
        ),
        *((kind, {"prompt": ""}, "the prompt is empty; this tokenizer has no beginning-of-text") for kind in LOADERS),
        ("demonstrations", {"response": "x"}, "the tokenizer has no token for the response 'x'"),
        ("comparisons", {"responses": ["a", "x"]}, "the tokenizer has no token for the response 'x'"),
    ],
)
def test_texts_without_tokens_are_named(write_records, kind, change, says):
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<end>": 2}, []))  # leaves out what it does not know
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))
    path = write_records(GOOD, GOOD | change)
    with pytest.raises(UserError) as error:
        LOADERS[kind](path, tokenizer)
    assert str(error.value).startswith(f"{path}, line 2: {says}")
