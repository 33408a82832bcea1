"""The small files that stand beside weights and go with them wherever they go: converted, cached, published. The one list."""

import re

_SIDE_FILE = re.compile(
    r"config\.json|generation_config\.json|(?:video_)?preprocessor_config\.json|processor_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model(?:\.v[0-9]+)?|tekken\.json"
    r"|[\w-]+\.tiktoken|tiktoken\.model|spiece\.model|sentencepiece(?:\.bpe)?\.model|vocab\.(?:json|txt|bpe)|merges\.txt"
    r"|chat_template\.(?:json|jinja)|(?:LICENSE|NOTICE)(?:[-_][A-Za-z]\w*)?(?:\.md|\.txt)?",
    re.ASCII,
)


def is_side_file(name: str, code: bool = False) -> bool:
    """Whether a file called `name`, beside weights, is one that goes with them; `code`: a model's own Python too."""
    return bool(_SIDE_FILE.fullmatch(name)) or (code and name.endswith(".py") and not name.startswith("."))
